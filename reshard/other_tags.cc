// See other_tags.h.
#include "reshard/other_tags.h"

#include <algorithm>

#include "checkpoint/cancel.h"
#include "checkpoint/deepspeed/source.h"
#include "checkpoint/manifest.h"
#include "core/error.h"
#include "core/utf8.h"
#include "reshard/doctor.h"
#include "reshard/report_text.h"

namespace isoshard::reshard {
namespace {

using State = OtherTag::State;

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

bool is_higher(const std::string& a, const std::string& b) {
  const std::string one = number_of(a), other = number_of(b);
  if (one.size() != other.size()) return one.size() > other.size();
  return one == other ? a > b : one > other;
}

// What a manifest says that sizes contradict; empty for one of an earlier save, none of whose
// checkpoint files is there as it was.
std::string why_not_as_published(Storage& storage, const std::string& folder) {
  const std::string path = checkpoint::join(folder, checkpoint::kManifestName);
  if (!storage.is_file(path)) return "";
  const checkpoint::Manifest manifest = checkpoint::parse_manifest(
      read_small_file(storage, path, checkpoint::kLargestManifestBytes), path);
  std::string wrong;
  bool any = false;
  for (const checkpoint::ManifestFile& file : manifest.files) {
    checkpoint::throw_if_cancelled();
    const std::string there = checkpoint::join(folder, file.path);
    const bool fits =
        storage.is_file(there) && storage.open_read(there)->size_bytes() == file.size_bytes;
    any = any || (fits && file.path.ends_with(".pt"));
    if (!fits && wrong.empty())
      wrong = quote(file.path) + " is not there as MANIFEST.json lists it";
  }
  return any ? wrong : "";
}

std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

OtherTag look_at(Storage& storage, const std::string& source, const std::string& tag,
                 checkpoint::ReadOptions read) {
  read.tag = tag;
  read.prove = false;
  OtherTag result{.tag = tag, .found = {}};
  try {
    const Diagnosis diagnosis = examine(storage, source, {.read = read, .other_tags = false});
    if (!diagnosis.symptoms.empty()) {
      const Symptom& first = diagnosis.symptoms.front();
      result.found = first.rule + ": " + first_line(first.found);
      return result;
    }
    result.found = why_not_as_published(storage, checkpoint::join(source, tag));
    if (!result.found.empty()) return result;
    result.state = State::kWhole;
    result.found = diagnosis.description;
  } catch (const Error& error) {
    const ErrorInfo& info = error.info();
    if (info.code == ErrorCode::kInterrupted) throw;
    if (!verdict_of(info.code)) result.state = State::kUnknown;
    result.found = info.what + (info.file.empty() ? "" : " (" + quote(info.file) + ")");
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
    names = checkpoint::tags_in(storage, source, true);
    std::erase_if(names, [&](const std::string& name) {
      return name == except || !why_unsafe_name(name).empty() ||
             storage.is_file(checkpoint::join(checkpoint::join(source, name), "latest"));
    });
  } catch (const Error& error) {
    if (error.info().code == ErrorCode::kInterrupted) throw;
    return found;
  }
  std::ranges::sort(names, is_higher);
  for (const std::string& name : names) {
    checkpoint::throw_if_cancelled();
    found.push_back(look_at(storage, source, name, options));
    if (found.back().state == State::kWhole || found.size() == kMost) break;
  }
  return found;
}

std::string tell(const std::vector<OtherTag>& tags) {
  if (tags.empty()) return "";
  const OtherTag& last = tags.back();
  const bool unknown =
      std::ranges::any_of(tags, [](const OtherTag& tag) { return tag.state == State::kUnknown; });
  std::string text = "no other tag of the folder is ";
  if (tags.size() == kMost)
    text = "none of the " + std::to_string(kMost) + " other tags with the highest numbers is ";
  text += unknown ? "known to be whole" : "whole";
  if (last.state == State::kWhole) {
    text = "by the numbers in the names, the last other tag whose headers are whole is " +
           quote(last.tag) + " (" + last.found +
           "); its payloads are not read: isoshard verify, with --tag";
  }
  std::vector<std::string> others;
  for (const OtherTag& tag : tags) {
    if (tag.state == State::kWhole) continue;
    const char* word = tag.state == State::kNot ? "not whole: " : "not looked at: ";
    others.push_back(word + quote(tag.tag) + ": " + tag.found);
  }
  return others.empty() ? text : with_details(text, others);
}

std::string save_folder_of(Storage& storage, const std::string& source) {
  const auto points = [&](const std::string& folder) {
    return storage.is_file(checkpoint::join(folder, "latest")) ||
           storage.is_file(checkpoint::join(folder, "latest_universal"));
  };
  if (!storage.is_directory(source)) return "";
  if (points(source)) return source;
  const std::vector<std::string> inner = checkpoint::save_folders_in(storage, source);
  return inner.size() == 1 ? checkpoint::join(source, inner[0]) : "";
}

}  // namespace isoshard::reshard
