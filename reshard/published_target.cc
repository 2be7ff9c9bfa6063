// See published_target.h.
#include "reshard/published_target.h"

#include <map>

#include "checkpoint/deepspeed/source.h"
#include "checkpoint/manifest.h"
#include "checkpoint/shallow_json.h"
#include "checkpoint/small_file.h"
#include "core/error.h"
#include "reshard/digest.h"
#include "reshard/manifest_check.h"

namespace isoshard::reshard {

using nlohmann::json;

namespace {

constexpr int64_t kLargestPointer = 1 << 16, kLargestCertificate = int64_t{1} << 28;
constexpr const char* kCertificate = "certificate.json";

bool holds(Storage& storage, const std::string& path, const std::string& text) {
  return storage.is_file(path) && storage.open_read(path)->size_bytes() < kLargestPointer &&
         read_small_file(storage, path, kLargestPointer) == text;
}

// The plan's files and the certificate, no others, of the plan's sizes.
bool has_the_plans_files(const checkpoint::Manifest& manifest, const ReshardPlan& plan) {
  std::map<std::string, int64_t> sizes;
  for (const TargetFile& target : plan.targets) sizes[target.path()] = target.size_bytes();
  if (manifest.files.size() != sizes.size() + 1) return false;
  for (const checkpoint::ManifestFile& file : manifest.files) {
    if (file.path == kCertificate) continue;
    const auto planned = sizes.find(file.path);
    if (planned == sizes.end() || planned->second != file.size_bytes) return false;
  }
  return true;
}

// A part, but for the source, in which the certificate is not what the command would write; or "".
std::string differing_part(json found, const ConvertOptions& options) {
  if (found["target"].is_object()) found["target"].erase("digests");
  json expected = options.certificate;
  expected["target"] = expected.value("target", json::object());
  if (found["target"].is_null()) found["target"] = json::object();
  for (const char* list : {"lossy", "synthesised", "dropped", "skipped"}) {
    if (!expected.contains(list)) expected[list] = json::array();
  }
  for (const char* free : {"source", "program", "carried", "not_fitting", "inferred"})
    expected.erase(free);
  for (const auto& [key, value] : expected.items()) {
    if (found[key] != value) return key;
  }
  return "";
}

// As Conversion writes it.
json source_part(Storage& storage, const checkpoint::ShardedState& state,
                 const ConvertOptions& options) {
  StreamOptions stream = options.stream;
  stream.digest =
      digested_leaves(state, options.weights_only ? Sections::kWeightsAndBuffers : Sections::kAll);
  const Digest digest = make_digest(state, digest_leaves(storage, state, stream).leaves);
  json source = options.certificate.value("source", json::object());
  for (const SectionDigest& section : digest.sections)
    source["digests"][section.section] = stated(section);
  return source;
}

}  // namespace

std::vector<std::string> missing_beside(Storage& storage, const ConvertOptions& options) {
  std::vector<std::string> missing;
  for (const auto& [from, to] : options.side_files) {
    if (!storage.is_file(to) || !checkpoint::same_bytes(storage, from, to)) missing.push_back(to);
  }
  const std::string& pointer = options.latest_path;
  if (!pointer.empty() && !holds(storage, pointer, options.latest_text)) missing.push_back(pointer);
  return missing;
}

void place_beside(Storage& storage, const ConvertOptions& options) {
  for (const auto& [from, to] : options.side_files) checkpoint::copy_file(storage, from, to);
  if (!options.latest_path.empty())
    checkpoint::replace_small_file(storage, options.latest_path, options.latest_text);
}

std::string why_another_target(Storage& storage, const checkpoint::ShardedState& state,
                               const ReshardPlan& plan, const ConvertOptions& options) {
  const std::string path = checkpoint::join(options.target, checkpoint::kManifestName);
  const checkpoint::Manifest manifest = checkpoint::parse_manifest(
      read_small_file(storage, path, checkpoint::kLargestManifestBytes), path);
  if (!has_the_plans_files(manifest, plan)) return "its files are not those of this command's plan";
  const ManifestReport report =
      check_manifest(storage, options.target, manifest, {}, options.stream.workers);
  if (!report.holds()) return "it is not as its MANIFEST.json says";
  const std::string text =
      read_small_file(storage, checkpoint::join(options.target, kCertificate), kLargestCertificate);
  json found = checkpoint::read_shallow_json(text).value;
  if (!found.is_object()) return "its certificate cannot be read";
  if (const std::string part = differing_part(found, options); !part.empty())
    return "its certificate tells of another " + part;
  if (found["source"] != source_part(storage, state, options))
    return "its certificate tells of another source";
  return "";
}

}  // namespace isoshard::reshard
