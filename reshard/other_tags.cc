// See other_tags.h.
#include "reshard/other_tags.h"

#include <algorithm>

#include "checkpoint/cancel.h"
#include "checkpoint/deepspeed/source.h"
#include "checkpoint/manifest.h"
#include "checkpoint/publication.h"
#include "core/error.h"
#include "core/utf8.h"
#include "reshard/report_text.h"

namespace isoshard::reshard {
namespace {

constexpr size_t kMost = 16;

// The digits of the last number in a name without leading zeros: "global_step100" → "100".
std::string number_of(const std::string& name) {
  const std::string digits = "0123456789";
  const size_t last = name.find_last_of(digits);
  if (last == name.npos) return "";
  const size_t before = name.find_last_not_of(digits, last);
  const size_t first = before == name.npos ? 0 : before + 1;
  const size_t significant = std::min(name.find_first_not_of('0', first), last);
  return name.substr(significant, last + 1 - significant);
}

bool is_newer(const std::string& a, const std::string& b) {
  const std::string one = number_of(a), other = number_of(b);
  if (one.size() != other.size()) return one.size() > other.size();
  return one == other ? a > b : one > other;
}

// Why a folder whose headers are fine is not whole all the same; empty if it is.
std::string why_unfinished(Storage& storage, const std::string& folder) {
  const auto has = [&](const char* name) {
    return storage.is_file(checkpoint::join(folder, name));
  };
  if (checkpoint::is_unfinished(storage, folder))
    return "a command of isoshard that wrote it did not come to its end";
  if (has("certificate.json") && !has(checkpoint::kManifestName))
    return "certificate.json without MANIFEST.json";
  return "";
}

OtherTag look_at(Storage& storage, const std::string& source, const std::string& tag,
                 checkpoint::ReadOptions options) {
  options.tag = tag;
  options.prove = false;
  OtherTag result{.tag = tag, .found = {}};
  try {
    const checkpoint::ShardedState state = checkpoint::read_checkpoint(storage, source, options);
    result.found = why_unfinished(storage, checkpoint::join(source, tag));
    result.whole = result.found.empty();
    if (result.whole) {
      result.found = checkpoint::name(state.flavour);
      result.found += ", " + to_string(state.topology);
    }
  } catch (const Error& error) {
    if (error.info().code == ErrorCode::kInterrupted) throw;
    const std::string& file = error.info().file;
    result.found = error.info().what + (file.empty() ? "" : " (" + quote(file) + ")");
  }
  return result;
}

}  // namespace

std::vector<OtherTag> other_tags(Storage& storage, const std::string& source,
                                 const std::string& except,
                                 const checkpoint::ReadOptions& options) {
  std::vector<OtherTag> found;
  std::vector<std::string> names;
  try {
    if (storage.is_directory(source)) names = checkpoint::tags_in(storage, source);
  } catch (const Error& error) {
    if (error.info().code == ErrorCode::kInterrupted) throw;
  }
  std::erase(names, except);
  std::ranges::sort(names, is_newer);
  for (const std::string& name : names) {
    checkpoint::throw_if_cancelled();
    found.push_back(look_at(storage, source, name, options));
    if (found.back().whole || found.size() == kMost) break;
  }
  return found;
}

std::string tell(const std::string& source, const std::vector<OtherTag>& tags) {
  if (tags.empty()) return "";
  const OtherTag& last = tags.back();
  std::string text = "no other of its newest " + std::to_string(kMost) + " tags is whole";
  if (last.whole) {
    text = "the newest other tag whose headers are whole is " + quote(last.tag) + " (" +
           last.found + "); its payloads are not read: isoshard verify " + quote(source) +
           " --tag " + quote(last.tag);
  } else if (tags.size() < kMost) {
    text = "no other tag of the folder is whole";
  }
  std::vector<std::string> torn;
  for (const OtherTag& tag : tags) {
    if (!tag.whole) torn.push_back("not whole: " + quote(tag.tag) + ": " + tag.found);
  }
  return torn.empty() ? text : with_details(text, torn);
}

}  // namespace isoshard::reshard
