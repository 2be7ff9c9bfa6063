// Reading and printing of topologies.
#include "core/topology.h"

#include <algorithm>
#include <charconv>
#include <limits>
#include <set>

#include "core/error.h"
#include "core/mutant.h"

namespace isoshard {
namespace {

constexpr Axis kAxes[] = {Axis::kData, Axis::kSequence, Axis::kTensor, Axis::kExpert,
                          Axis::kPipeline};

int& degree_of(Topology& topology, Axis axis) {
  switch (axis) {
    case Axis::kData:
      return topology.data;
    case Axis::kSequence:
      return topology.sequence;
    case Axis::kTensor:
      return topology.tensor;
    case Axis::kExpert:
      return topology.expert;
    case Axis::kPipeline:
      break;
  }
  return topology.pipeline;
}

// "pp=3" for " pp=3", as it stands behind a comma.
std::string without_blanks(const std::string& text) {
  const size_t begin = text.find_first_not_of(' ');
  if (begin == std::string::npos) return "";
  return text.substr(begin, text.find_last_not_of(' ') - begin + 1);
}

Error bad_target(const std::string& text, const std::string& option, const std::string& part,
                 const std::string& why) {
  return Error(ErrorInfo{.code = ErrorCode::kUsage,
                         .what = "The topology cannot be read: " + why,
                         .entry = quote(part),
                         .expected = "axis=degree pairs, such as dp=4,sp=2,stage=3 "
                                     "(axes: dp sp tp ep pp; stage 0 to 3)",
                         .found = quote(text),
                         .next = "correct " + option});
}

}  // namespace

const char* name(Axis axis) {
  switch (axis) {
    case Axis::kData:
      return "dp";
    case Axis::kSequence:
      return "sp";
    case Axis::kTensor:
      return "tp";
    case Axis::kExpert:
      return "ep";
    case Axis::kPipeline:
      break;
  }
  return "pp";
}

int Topology::degree(Axis axis) const { return degree_of(const_cast<Topology&>(*this), axis); }

std::string to_string(const Topology& topology) {
  std::string text;
  for (Axis axis : kAxes) {
    const int degree = topology.degree(axis);
    if (degree == 1 && axis != Axis::kData) continue;
    text += (text.empty() ? "" : ".") + std::string(name(axis)) + std::to_string(degree);
  }
  return text;
}

TargetSpec parse_target(const std::string& text, const std::string& option) {
  TargetSpec spec;
  std::set<std::string> seen;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    const std::string part = without_blanks(text.substr(begin, end - begin));
    const size_t equals = part.find('=');
    if (equals == std::string::npos) throw bad_target(text, option, part, "a part has no '='.");
    int value = 0;
    const char* first = part.data() + equals + 1;
    const char* last = part.data() + part.size();
    const auto [stop, failure] = std::from_chars(first, last, value);
    const bool large = failure == std::errc::result_out_of_range && stop == last;
    if ((failure != std::errc() && !large) || stop != last)
      throw bad_target(text, option, part, "not a number.");
    if (large) value = part[equals + 1] == '-' ? -1 : std::numeric_limits<int>::max();
    const std::string key = part.substr(0, equals);
    if (!seen.insert(key).second && !mutant("target_axis_twice"))
      throw bad_target(text, option, part, "the axis is said twice.");
    bool known = false;
    if (key == "stage") {
      if (value < 0 || value > 3 + mutant("target_stage_four"))
        throw bad_target(text, option, part, "there is no such ZeRO stage; they are 0 to 3.");
      spec.stage = value;
      known = true;
    }
    for (Axis axis : kAxes) {
      if (key != name(axis)) continue;
      if (value < 1 - mutant("target_degree_zero") || value > 1000000)
        throw bad_target(text, option, part, "the degree is not from 1 to 1000000.");
      degree_of(spec.topology, axis) = value;
      known = true;
    }
    if (!known) throw bad_target(text, option, part, "unknown axis.");
    begin = end + 1;
  }
  return spec;
}

Topology resolve(const TargetSpec& spec, const Topology& source) {
  Topology result = source;
  for (Axis axis : kAxes) {
    const int degree = spec.topology.degree(axis);
    if (degree != 0 || mutant("target_axis_reset")) degree_of(result, axis) = degree;
  }
  int64_t ranks = 1;
  for (Axis axis : kAxes) {
    ranks *= result.degree(axis);  // below 2^31 times at most a million
    if (ranks <= std::numeric_limits<int>::max() || mutant("target_ranks_unlimited")) continue;
    throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                          .what = "The target has more ranks than can be counted.",
                          .expected = "at most 2147483647 ranks in all",
                          .next = "lower one of dp, sp, tp, ep, pp"});
  }
  return result;
}

}  // namespace isoshard
