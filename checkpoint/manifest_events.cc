// See manifest_events.h.
#include "checkpoint/manifest_events.h"

#include "core/error.h"
#include "core/mutant.h"
#include "core/utf8.h"

namespace isoshard::checkpoint {
namespace {

using Json = nlohmann::json;
using Type = Json::value_t;

constexpr size_t kDeepest = 3;  // the manifest, its list, an entry

ManifestFault why_missing(const char* key, const std::string& entry) {
  return {"A member of the manifest is missing.", entry, quote(key), ""};
}

std::string shown(const ManifestMember& member) {
  return member.type == Type::string ? Json(member.text).dump() : member.text;
}

}  // namespace

bool is_manifest_hash(const std::string& text) {
  const size_t colon = text.find(':');
  if (colon == 0 || colon == std::string::npos || colon + 1 == text.size()) return false;
  return text.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789", 0) == colon &&
         text.find_first_not_of("0123456789abcdef", colon + 1) == std::string::npos;
}

ManifestFault why_no_text(const ManifestMember& member, const char* key, const std::string& entry) {
  if (!member.there) return why_missing(key, entry);
  if (member.type == Type::string) return {};
  return {"A member of the manifest has the wrong type.", entry, quote(key) + " is a string",
          quote(shown(member))};
}

ManifestFault why_no_count(const ManifestMember& member, const char* key,
                           const std::string& entry) {
  if (!member.there) return why_missing(key, entry);
  if (member.type == Type::number_unsigned && member.number <= INT64_MAX) return {};
  return {"A number of the manifest is out of range.", entry,
          quote(key) + " is a whole number from 0 to 2^63 - 1", quote(shown(member))};
}

ManifestEvents::ManifestEvents(size_t most_files) : most_files_(most_files) {
  listed.reserve(most_files);
}

ManifestMember* ManifestEvents::member_named(const std::string& text) {
  if (is_in(Place::kManifest)) {
    if (text == "kind") return &kind;
    if (text == "schema") return &schema;
    if (text == "self_hash") return &self_hash;
    if (text == "program_version") return &program_version;
    if (text == "files") return &files;
  } else if (is_in(Place::kEntry)) {
    if (text == "path") return &path_;
    if (text == "size_bytes") return &size_;
    if (text == "hash") return &hash_;
  }
  return nullptr;
}

bool ManifestEvents::key(string_t& text) {
  slot_ = member_named(text);
  has_others = has_others || slot_ == nullptr;
  if (slot_ == nullptr || !slot_->there) return true;
  key_twice = text;
  return false;
}

bool ManifestEvents::value(ManifestMember member) {
  if (is_in(Place::kFiles)) {
    end_entry();
  } else if (slot_ != nullptr) {
    *slot_ = std::move(member);
  }
  slot_ = nullptr;
  return true;
}

bool ManifestEvents::begin(Type type) {
  const bool lists = slot_ == &files && type == Type::array;
  const bool entry = is_in(Place::kFiles) && type == Type::object;
  if (is_in(Place::kFiles) && !entry) end_entry();
  if (slot_ != nullptr) *slot_ = {true, type, type == Type::array ? "array" : "object", 0};
  slot_ = nullptr;
  if (places_.empty()) {
    is_object = type == Type::object;
    return open(is_object ? Place::kManifest : Place::kOther);
  }
  if (lists) return open(Place::kFiles);
  if (entry) path_ = size_ = hash_ = {};
  return open(entry ? Place::kEntry : Place::kOther);
}

bool ManifestEvents::open(Place place) {
  places_.push_back(place);
  if (places_.size() <= kDeepest) return true;
  why = "nested deeper than " + std::to_string(kDeepest) + " levels";
  return false;
}

bool ManifestEvents::start_object(size_t) { return begin(Type::object); }

bool ManifestEvents::start_array(size_t) { return begin(Type::array); }

bool ManifestEvents::end_array() {
  places_.pop_back();
  return true;
}

bool ManifestEvents::end_object() {
  const bool entry = is_in(Place::kEntry);
  if (entry) end_entry();
  places_.pop_back();
  return true;
}

bool ManifestEvents::parse_error(size_t at, const std::string&, const Json::exception&) {
  why = "no JSON at byte " + std::to_string(at);
  return false;
}

void ManifestEvents::end_entry() {
  if (fault.what.empty()) {
    fault = is_in(Place::kEntry) ? fault_of_entry()
                                 : ManifestFault{"An entry of the manifest is no JSON object.",
                                                 "files[" + std::to_string(entries_) + "]", "", ""};
  }
  if (fault.what.empty())
    listed.push_back(
        {std::move(path_.text), static_cast<int64_t>(size_.number), std::move(hash_.text)});
  ++entries_;
}

ManifestFault ManifestEvents::fault_of_entry() {
  const std::string index = "files[" + std::to_string(entries_) + "]";
  if (ManifestFault none = why_no_text(path_, "path", index); !none.what.empty()) return none;
  const std::string entry = index + " " + quote(path_.text);
  if (const std::string reason = why_unsafe_name(path_.text);
      !reason.empty() && !mutant("manifest_unsafe_path"))
    return {"A path in the manifest is not safe: " + reason + ".", entry, "", ""};
  if (ManifestFault none = why_no_count(size_, "size_bytes", entry); !none.what.empty())
    return none;
  if (ManifestFault none = why_no_text(hash_, "hash", entry); !none.what.empty()) return none;
  if (!is_manifest_hash(hash_.text) && !mutant("manifest_malformed_hash"))
    return {"A hash in the manifest is malformed.", entry, "algorithm:hex", quote(hash_.text)};
  if (!listed.empty() && !(listed.back().path < path_.text))
    return {"The files of the manifest are not sorted, or one stands there twice.", entry, "", ""};
  if (listed.size() >= most_files_)
    return {"The manifest is not in the form in which it is written.", entry,
            "each entry on lines of its own", ""};
  return {};
}

}  // namespace isoshard::checkpoint
