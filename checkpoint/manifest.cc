// Strict both ways: a manifest is read by its members and then compared with the text that would
// be written for it, so that no byte of it goes unchecked.
#include "checkpoint/manifest.h"

#include <openssl/evp.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "checkpoint/shallow_json.h"
#include "core/check.h"
#include "core/error.h"
#include "core/mutant.h"
#include "core/utf8.h"

namespace isoshard::checkpoint {
namespace {

using Json = nlohmann::json;  // keeps members sorted by name

constexpr int kSchema = 1;
constexpr int kIndent = 1;
constexpr int kDeepest = 3;           // the manifest, its list, an entry
constexpr size_t kMemoryFactor = 12;  // no entry takes more than this for each byte of its text
constexpr const char* kKind = "isoshard-manifest";

std::string text_of(const Json& json) { return json.dump(kIndent) + "\n"; }

std::string sha256(const std::string& text) {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned length = 0;
  const int done = EVP_Digest(text.data(), text.size(), digest, &length, EVP_sha256(), nullptr);
  CHECK(done == 1, "SHA-256 is not available");
  constexpr char kDigits[] = "0123456789abcdef";
  std::string result = "sha256:";
  for (unsigned i = 0; i < length; ++i) {
    result += kDigits[digest[i] >> 4];
    result += kDigits[digest[i] & 15];
  }
  return result;
}

bool is_hash(const std::string& text) {
  const size_t colon = text.find(':');
  if (colon == 0 || colon == std::string::npos || colon + 1 == text.size()) return false;
  return text.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789", 0) == colon &&
         text.find_first_not_of("0123456789abcdef", colon + 1) == std::string::npos;
}

struct Fault {
  std::string what = "";
  std::string entry = "";
  std::string expected = "";
  std::string found = "";
};

class ManifestReader {
 public:
  explicit ManifestReader(const std::string& path) : path_(path) {}

  Manifest read(const std::string& text) const {
    const Json json = parse(text);
    if (!json.is_object()) fail({.what = "The manifest is no JSON object."});
    const std::string kind = string_member(json, "kind", "");
    if (kind != kKind) {
      fail({"The file is no manifest of this program.", "kind", quote(kKind), quote(kind)});
    }
    if (const int64_t schema = integer_member(json, "schema", "");
        schema != kSchema && !mutant("manifest_any_schema")) {
      fail({"The manifest has a form that this version does not know.", "schema",
            std::to_string(kSchema), std::to_string(schema)});
    }
    check_self_hash(json);
    Manifest manifest{.files = {}, .program_version = string_member(json, "program_version", "")};
    for (const Json& entry : files_of(json)) add_file(entry, &manifest);
    if (to_json(manifest) != text && !mutant("manifest_form_unchecked")) {
      fail({"The manifest is not in the form in which it is written.", "",
            "sorted members and files, no others, indent 1, one newline at the end", ""});
    }
    return manifest;
  }

 private:
  [[noreturn]] void fail(Fault fault) const {
    throw Error(ErrorInfo{.code = ErrorCode::kCorrupt,
                          .what = std::move(fault.what),
                          .file = path_,
                          .entry = std::move(fault.entry),
                          .expected = std::move(fault.expected),
                          .found = std::move(fault.found),
                          .next = "copy the folder again from where it came, or convert again"});
  }

  // JSON libraries keep one of two equal keys in silence; two readers could keep different ones.
  Json parse(const std::string& text) const {
    const auto most_bytes = static_cast<int64_t>(kMemoryFactor * (text.size() + 1024));
    ShallowJson read = read_shallow_json(text, {.levels = kDeepest, .memory_bytes = most_bytes});
    if (!read.key.empty()) {
      fail({.what = "A key of the manifest stands there twice.", .entry = quote(read.key)});
    }
    if (!read.why.empty()) fail({.what = "The manifest cannot be read: " + read.why + "."});
    return std::move(read.value);
  }

  const Json& member(const Json& json, const char* key, const std::string& entry) const {
    const auto found = json.find(key);
    if (found == json.end()) {
      fail({"A member of the manifest is missing.", entry, quote(key), ""});
    }
    return *found;
  }

  std::string string_member(const Json& json, const char* key, const std::string& entry) const {
    const Json& value = member(json, key, entry);
    if (!value.is_string()) {
      fail({"A member of the manifest has the wrong type.", entry, quote(key) + " is a string",
            value.type_name()});
    }
    return value.get<std::string>();
  }

  int64_t integer_member(const Json& json, const char* key, const std::string& entry) const {
    const Json& value = member(json, key, entry);
    if (!value.is_number_unsigned() || value.get<uint64_t>() > INT64_MAX) {
      fail({"A number of the manifest is out of range.", entry,
            quote(key) + " is a whole number from 0 to 2^63 - 1", quote(value.dump())});
    }
    return value.get<int64_t>();
  }

  void check_self_hash(const Json& json) const {
    const std::string found = string_member(json, "self_hash", "");
    Json rest = json;
    rest.erase("self_hash");
    if (const std::string expected = sha256(text_of(rest));
        found != expected && !mutant("manifest_self_hash_unchecked")) {
      fail({"The manifest does not have the hash it carries: it was changed or damaged.",
            "self_hash", expected, quote(found)});
    }
  }

  const Json& files_of(const Json& json) const {
    const Json& files = member(json, "files", "");
    if (!files.is_array()) fail({"The manifest has no list of files.", "files", "", ""});
    return files;
  }

  void add_file(const Json& json, Manifest* manifest) const {
    const std::string index = "files[" + std::to_string(manifest->files.size()) + "]";
    if (!json.is_object()) fail({"An entry of the manifest is no JSON object.", index, "", ""});
    ManifestFile file{.path = string_member(json, "path", index), .size_bytes = 0, .hash = ""};
    const std::string entry = index + " " + quote(file.path);
    if (const std::string reason = why_unsafe_name(file.path);
        !reason.empty() && !mutant("manifest_unsafe_path")) {
      fail({"A path in the manifest is not safe: " + reason + ".", entry, "", ""});
    }
    file.size_bytes = integer_member(json, "size_bytes", entry);
    file.hash = string_member(json, "hash", entry);
    if (!is_hash(file.hash) && !mutant("manifest_malformed_hash")) {
      fail({"A hash in the manifest is malformed.", entry, "algorithm:hex", quote(file.hash)});
    }
    if (!manifest->files.empty() && !(manifest->files.back().path < file.path)) {
      fail({"The files of the manifest are not sorted, or one stands there twice.", entry, "", ""});
    }
    manifest->files.push_back(std::move(file));
  }

  const std::string& path_;
};

}  // namespace

std::string to_json(const Manifest& manifest) {
  std::vector<ManifestFile> files = manifest.files;
  std::sort(files.begin(), files.end(),
            [](const ManifestFile& a, const ManifestFile& b) { return a.path < b.path; });
  Json entries = Json::array();
  for (size_t i = 0; i < files.size(); ++i) {
    const ManifestFile& file = files[i];
    CHECK(why_unsafe_name(file.path).empty(), quote(file.path) + " cannot stand in a manifest");
    CHECK(i == 0 || files[i - 1].path != file.path, quote(file.path) + " is listed twice");
    CHECK(file.size_bytes >= 0, "negative size of " + quote(file.path));
    CHECK(is_hash(file.hash), "malformed hash of " + quote(file.path));
    entries.push_back({{"path", file.path},
                       {"size_bytes", static_cast<uint64_t>(file.size_bytes)},
                       {"hash", file.hash}});
  }
  Json json = {{"schema", kSchema},
               {"kind", kKind},
               {"program_version", manifest.program_version},
               {"files", std::move(entries)}};
  json["self_hash"] = sha256(text_of(json));
  return text_of(json);
}

Manifest parse_manifest(const std::string& text, const std::string& path) {
  return ManifestReader(path).read(text);
}

}  // namespace isoshard::checkpoint
