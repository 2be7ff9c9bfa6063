// Strict both ways: a manifest is read by its members and then compared with the text that would
// be written for it, piece by piece, so that no byte of it goes unchecked and none is kept twice.
#include "checkpoint/manifest.h"

#include <openssl/evp.h>

#include <algorithm>
#include <memory>
#include <new>
#include <string_view>

#include "checkpoint/manifest_events.h"
#include "core/check.h"
#include "core/error.h"
#include "core/mutant.h"
#include "core/utf8.h"

namespace isoshard::checkpoint {
namespace {

using Json = nlohmann::json;

constexpr int kSchema = 1;
constexpr size_t kLongestStretch = 1 << 16;  // no path, hash or version is near it
constexpr const char* kKind = "isoshard-manifest";
constexpr std::string_view kSelfHash = ",\n \"self_hash\": ";
constexpr std::string_view kEnd = "\n}\n";

class Sha256 {
 public:
  Sha256() { ready_ = context_ && EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) == 1; }

  void update(std::string_view text) {
    ready_ = ready_ && EVP_DigestUpdate(context_.get(), text.data(), text.size()) == 1;
  }

  std::string finish() {
    unsigned char digest[EVP_MAX_MD_SIZE];
    unsigned length = 0;
    ready_ = ready_ && EVP_DigestFinal_ex(context_.get(), digest, &length) == 1;
    if (!ready_) throw std::bad_alloc();  // nothing else of it can fail
    constexpr char kDigits[] = "0123456789abcdef";
    std::string result = "sha256:";
    for (unsigned i = 0; i < length; ++i) {
      result += kDigits[digest[i] >> 4];
      result += kDigits[digest[i] & 15];
    }
    return result;
  }

 private:
  std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context_{EVP_MD_CTX_new(),
                                                                   EVP_MD_CTX_free};
  bool ready_ = false;
};

std::string sha256_of_body(std::string_view body) {
  Sha256 sum;
  sum.update(body);
  sum.update(kEnd);
  return sum.finish();
}

std::string json_text(const std::string& text) { return Json(text).dump(); }

// The text of a manifest without its own hash, by pieces, up to the end of its last member.
template <typename Take>
void write_body(const std::vector<const ManifestFile*>& files, const std::string& version,
                const Take& take) {
  take("{\n \"files\": [");
  for (size_t i = 0; i < files.size(); ++i) {
    const ManifestFile& file = *files[i];
    take((i == 0 ? "\n  {\n   \"hash\": " : ",\n  {\n   \"hash\": ") + json_text(file.hash) +
         ",\n   \"path\": " + json_text(file.path) +
         ",\n   \"size_bytes\": " + std::to_string(file.size_bytes) + "\n  }");
  }
  take((files.empty() ? std::string("]") : std::string("\n ]")) + ",\n \"kind\": \"" + kKind +
       "\",\n \"program_version\": " + json_text(version) +
       ",\n \"schema\": " + std::to_string(kSchema));
}

std::vector<const ManifestFile*> pointers_to(const std::vector<ManifestFile>& files) {
  std::vector<const ManifestFile*> pointers;
  pointers.reserve(files.size());
  for (const ManifestFile& file : files) pointers.push_back(&file);
  return pointers;
}

// Whether a text of the JSON, or what stands between two, is longer than any of a manifest: the
// parser keeps a text, and all signs without a text or number among them.
bool has_long_stretch(const std::string& text) {
  bool inside = false;
  size_t length = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    if (inside && text[i] == '\\') {
      ++i;
      ++length;
    } else if (text[i] == '"') {
      inside = !inside;
      length = 0;
    }
    if (++length > kLongestStretch) return true;
  }
  return false;
}

// No fewer than there are entries, unless they are shorter than any that is written.
size_t most_entries(const std::string& text) {
  constexpr size_t kShortestEntry = 48;
  return std::min(static_cast<size_t>(std::ranges::count(text, '{')), text.size() / kShortestEntry);
}

class ManifestReader {
 public:
  ManifestReader(const std::string& text, const std::string& path) : text_(text), path_(path) {}

  Manifest read() const {
    ManifestEvents events(most_entries(text_));
    parse(&events);
    if (!events.is_object) fail({.what = "The manifest is no JSON object."});
    refuse(why_no_text(events.kind, "kind", ""));
    if (events.kind.text != kKind) {
      fail({"The file is no manifest of this program.", "kind", quote(kKind),
            quote(events.kind.text)});
    }
    refuse(why_no_count(events.schema, "schema", ""));
    if (events.schema.number != kSchema && !mutant("manifest_any_schema")) {
      fail({"The manifest has a form that this version does not know.", "schema",
            std::to_string(kSchema), events.schema.text});
    }
    check_self_hash(events);
    refuse(why_no_text(events.program_version, "program_version", ""));
    if (!events.files.there) fail({"A member of the manifest is missing.", "", "\"files\"", ""});
    if (events.files.type != Json::value_t::array)
      fail({"The manifest has no list of files.", "files", "", ""});
    refuse(events.fault);
    check_form(events);
    return {std::move(events.listed), std::move(events.program_version.text)};
  }

 private:
  [[noreturn]] void fail(ManifestFault fault) const {
    throw Error(ErrorInfo{.code = ErrorCode::kCorrupt,
                          .what = std::move(fault.what),
                          .file = path_,
                          .entry = std::move(fault.entry),
                          .expected = std::move(fault.expected),
                          .found = std::move(fault.found),
                          .next = "copy the folder again from where it came, or convert again"});
  }

  void refuse(const ManifestFault& fault) const {
    if (!fault.what.empty()) fail(fault);
  }

  // JSON libraries keep one of two equal keys in silence; two readers could keep different ones.
  void parse(ManifestEvents* events) const {
    if (has_long_stretch(text_)) {
      fail({.what = "The manifest cannot be read: a text of it, or what stands between two, has "
                    "more than " +
                    std::to_string(kLongestStretch) + " bytes."});
    }
    Json::sax_parse(text_, events);
    if (!events->key_twice.empty()) {
      fail(
          {.what = "A key of the manifest stands there twice.", .entry = quote(events->key_twice)});
    }
    if (!events->why.empty()) fail({.what = "The manifest cannot be read: " + events->why + "."});
  }

  // It is the last member, and hashes the text as it would be without it. One that fits what the
  // text says, and not the text, is of a manifest that was written anew by something else.
  void check_self_hash(const ManifestEvents& events) const {
    const std::string& found = events.self_hash.text;
    refuse(why_no_text(events.self_hash, "self_hash", ""));
    const size_t at = text_.rfind(kSelfHash);
    const std::string expected =
        sha256_of_body(std::string_view(text_).substr(0, at == text_.npos ? 0 : at));
    if (found == expected || mutant("manifest_self_hash_unchecked")) return;
    Sha256 sum;  // of what is known in it; others would make it differ in more than form
    write_body(pointers_to(events.listed), events.program_version.text,
               [&](std::string_view piece) { sum.update(piece); });
    sum.update(kEnd);
    if (!events.has_others && found == sum.finish()) fail_form();
    fail({"The manifest does not have the hash it carries: it was changed or damaged.", "self_hash",
          expected, quote(found)});
  }

  [[noreturn]] void fail_form() const {
    fail({"The manifest is not in the form in which it is written.", "",
          "sorted members and files, no others, indent 1, one newline at the end", ""});
  }

  void check_form(const ManifestEvents& events) const {
    size_t at = 0;
    bool equal = true;
    const auto compare = [&](std::string_view piece) {
      equal = equal && text_.compare(at, piece.size(), piece) == 0;
      at = std::min(at + piece.size(), text_.size());
    };
    write_body(pointers_to(events.listed), events.program_version.text, compare);
    compare(std::string(kSelfHash) + json_text(events.self_hash.text) + std::string(kEnd));
    if ((!equal || at != text_.size()) && !mutant("manifest_form_unchecked")) fail_form();
  }

  const std::string& text_;
  const std::string& path_;
};

}  // namespace

std::string to_json(const Manifest& manifest) {
  std::vector<const ManifestFile*> files = pointers_to(manifest.files);
  std::ranges::sort(files, {}, [](const ManifestFile* file) { return file->path; });
  for (size_t i = 0; i < files.size(); ++i) {
    const ManifestFile& file = *files[i];
    CHECK(why_unsafe_name(file.path).empty(), quote(file.path) + " cannot stand in a manifest");
    CHECK(i == 0 || files[i - 1]->path != file.path, quote(file.path) + " is listed twice");
    CHECK(file.size_bytes >= 0, "negative size of " + quote(file.path));
    CHECK(is_manifest_hash(file.hash), "malformed hash of " + quote(file.path));
  }
  std::string text;
  write_body(files, manifest.program_version, [&](std::string_view piece) { text += piece; });
  const std::string hash = sha256_of_body(text);
  text += std::string(kSelfHash) + json_text(hash) + std::string(kEnd);
  if (text.size() <= kLargestManifestBytes) return text;
  throw Error(ErrorInfo{.code = ErrorCode::kLimit,
                        .what = "The manifest would be larger than one is read again.",
                        .entry = std::to_string(files.size()) + " files",
                        .expected = "at most " + std::to_string(kLargestManifestBytes) + " bytes",
                        .found = std::to_string(text.size()) + " bytes",
                        .next = "convert to a form with fewer files"});
}

Manifest parse_manifest(const std::string& text, const std::string& path) {
  if (text.size() <= kLargestManifestBytes) return ManifestReader(text, path).read();
  throw Error(ErrorInfo{.code = ErrorCode::kLimit,
                        .what = "The manifest is larger than any that is written.",
                        .file = path,
                        .expected = "at most " + std::to_string(kLargestManifestBytes) + " bytes",
                        .found = std::to_string(text.size()) + " bytes",
                        .next = "copy the folder again from where it came, or convert again"});
}

}  // namespace isoshard::checkpoint
