// Canonical lines and their SHA-256. What iso1 means never changes.
#include "reshard/digest.h"

#include <algorithm>
#include <cctype>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <tuple>

#include "checkpoint/deepspeed/hyper.h"
#include "checkpoint/deepspeed/reader.h"
#include "checkpoint/format/crc.h"
#include "core/mutant.h"

namespace isoshard::reshard {

using checkpoint::Flavour;
using checkpoint::ParameterState;
using checkpoint::ShardedState;

namespace {

std::string json_text(const std::string& text) { return nlohmann::json(text).dump(); }

// A state's name is plain where it is letters, digits, '_' and '.', and JSON text otherwise.
std::string state_text(const std::string& text) {
  const bool plain = std::all_of(text.begin(), text.end(), [](unsigned char c) {
    return std::isalnum(c) != 0 || c == '_' || c == '.';
  });
  return plain && !text.empty() ? text : json_text(text);
}

std::string shape_text(const Shape& shape) { return nlohmann::json(shape).dump(); }

constexpr const char* kNotOpened = "the optimizer's files were not opened";

class Builder {
 public:
  Builder(const ShardedState& state, const std::vector<LeafCrc>& crcs)
      : state_(state), crcs_(crcs) {}

  Digest run() {
    for (const ParameterState& parameter : state_.parameters) add_parameter(parameter);
    for (const checkpoint::BufferState& buffer : state_.buffers)
      add("buffers", buffer.name, "buffer", buffer.leaf);
    for (const checkpoint::Alias& alias : state_.aliases) {
      lines_["weights"].push_back(
          {alias.name, "alias",
           json_text(alias.name) + "\talias\t" + json_text(alias.target) + "\n", 0});
    }
    Digest digest;
    for (auto& [section, lines] : lines_) {
      if (!mutant("digest_in_order_of_files")) std::sort(lines.begin(), lines.end());
      digest.sections.push_back(close(section, lines));
    }
    add_hyper(&digest);
    add_absent(&digest);
    std::sort(digest.sections.begin(), digest.sections.end(),
              [](const SectionDigest& a, const SectionDigest& b) {
                return mutant("digest_sections_by_name") ? a.section < b.section
                                                         : rank(a) < rank(b);
              });
    std::string root;
    for (const SectionDigest& section : digest.sections) {
      if (section.absent.empty() || mutant("digest_root_of_absent"))
        root += section.section + "\t" + section.hex + "\n";
    }
    digest.root = checkpoint::sha256_hex(root);
    std::sort(leaves_.begin(), leaves_.end(), [](const LeafLine& a, const LeafLine& b) {
      return std::tie(a.name, a.state) < std::tie(b.name, b.state);
    });
    digest.leaves = std::move(leaves_);
    return digest;
  }

 private:
  struct Line {
    std::string name, state, text;
    int64_t elements;
    bool operator<(const Line& other) const {
      return std::tie(name, state, text) < std::tie(other.name, other.state, other.text);
    }
  };

  // weights, then optimizer states by name, then steps, buffers, hyper.
  static std::pair<int, std::string> rank(const SectionDigest& s) {
    const int order = s.section == "weights"   ? 0
                      : s.section == "steps"   ? 2
                      : s.section == "buffers" ? 3
                      : s.section == "hyper"   ? 4
                                               : 1;
    return {order, s.section};
  }

  void add(const std::string& section, const std::string& name, const std::string& state,
           int number) {
    const checkpoint::Leaf& leaf = state_.leaf(number);
    LeafLine line{name, state, leaf.dtype, leaf.shape, crcs_[static_cast<size_t>(number)]};
    lines_[section].push_back({name, state, leaf_line(line), leaf.size_elements()});
    if (line.crc.known) {
      leaves_.push_back(std::move(line));
    } else {
      not_read_.insert(section);
    }
  }
  void add_parameter(const ParameterState& parameter) {
    add("weights", parameter.name, "weight", parameter.weight);
    for (int number : parameter.states)
      add(state_.leaf(number).state, parameter.name, state_.leaf(number).state, number);
    for (const checkpoint::Scalar& scalar : parameter.scalars) {
      const std::string value = checkpoint::scalar_text(state_, scalar.value);
      if (value == "None" && !mutant("digest_of_unmade_states"))
        continue;  // a state that the optimizer has not made yet
      lines_["steps"].push_back(
          {parameter.name, scalar.name,
           json_text(parameter.name) + "\t" + state_text(scalar.name) + "\t" + value + "\n", 1});
    }
  }
  SectionDigest close(const std::string& section, const std::vector<Line>& lines) const {
    SectionDigest result{.section = section, .hex = "", .absent = ""};
    if (not_read_.contains(section)) {
      result.absent = kNotRead;
      return result;
    }
    std::string text;
    for (const Line& line : lines) {
      text += line.text;
      result.elements += line.elements;
      result.tensors += line.state != "alias";
    }
    result.hex = checkpoint::sha256_hex(text);
    return result;
  }
  void add_hyper(Digest* digest) {
    SectionDigest result{.section = "hyper", .hex = "", .absent = ""};
    if (state_.partial) {
      result.absent = "some names only were asked for";
    } else if (state_.model_files_only) {
      result.absent = kNotOpened;
    } else if (state_.flavour == Flavour::kWeights) {
      result.absent = "this format holds weights only";
    } else {
      result.hex = checkpoint::sha256_hex(checkpoint::hyper_json(state_).dump() + "\n");
    }
    digest->sections.push_back(result);
  }
  void add_absent(Digest* digest) {
    const bool weights = state_.flavour == Flavour::kWeights;
    const auto absent = [&](const std::string& section, const std::string& reason) {
      if (lines_.count(section) == 0)
        digest->sections.push_back({.section = section, .hex = "", .absent = reason});
    };
    absent("steps", weights                   ? "this format holds weights only"
                    : state_.model_files_only ? kNotOpened
                    : state_.stepped          ? "the optimizer counts no steps"
                                              : "the optimizer never stepped");
    absent("buffers", weights          ? "this format does not tell buffers from weights"
                      : state_.partial ? "none was asked for"
                                       : "the model has none");
  }

  const ShardedState& state_;
  const std::vector<LeafCrc>& crcs_;
  std::map<std::string, std::vector<Line>> lines_;
  std::vector<LeafLine> leaves_;
  std::set<std::string> not_read_;  // sections
};

}  // namespace

std::string leaf_line(const LeafLine& leaf) {
  return json_text(leaf.name) + "\t" + state_text(leaf.state) + "\t" +
         (mutant("digest_dtype_left_out") ? "float32" : name(leaf.dtype)) + "\t" +
         shape_text(leaf.shape) + "\t" + checkpoint::hex16(leaf.crc.ecma) + "\t" +
         checkpoint::hex16(mutant("digest_second_crc_left_out") ? leaf.crc.ecma : leaf.crc.jones) +
         "\n";
}

std::vector<int> digested_leaves(const ShardedState& state, Sections sections) {
  std::vector<int> result;
  for (const ParameterState& parameter : state.parameters) {
    result.push_back(parameter.weight);
    if (sections == Sections::kAll)
      result.insert(result.end(), parameter.states.begin(), parameter.states.end());
  }
  for (const checkpoint::BufferState& buffer : state.buffers) result.push_back(buffer.leaf);
  return result;
}

Digest make_digest(const ShardedState& state, const std::vector<LeafCrc>& crcs) {
  return Builder(state, crcs).run();
}

Digest compute_digest(Storage& storage, const ShardedState& state, const StreamOptions& options) {
  StreamOptions all = options;
  all.digest = digested_leaves(state);
  return make_digest(state, digest_leaves(storage, state, all).leaves);
}

std::string stated(const SectionDigest& section) {
  return section.absent.empty() ? "iso1:" + section.hex : "absent: " + section.absent;
}

bool has_digest(const Digest& digest, const std::string& expected) {
  const std::string hex = expected.starts_with("iso1:") ? expected.substr(5) : expected;
  return digest.root == hex || std::ranges::any_of(digest.sections, [&](const SectionDigest& s) {
           return (s.absent.empty() || mutant("expected_absent_section")) && s.hex == hex;
         });
}

const SectionDigest* find_section(const Digest& digest, const std::string& section) {
  for (const SectionDigest& candidate : digest.sections) {
    if (candidate.section == section) return &candidate;
  }
  return nullptr;
}

}  // namespace isoshard::reshard
