// See laws.h. Laws about the digest iso1.
#include <algorithm>

#include "core/error.h"
#include "core/random.h"
#include "properties/expect.h"
#include "properties/laws.h"
#include "properties/workshop.h"

namespace isoshard::properties {

using checkpoint::ShardedState;
using reshard::Digest;
using reshard::SectionDigest;

namespace {

// Sections of `other` that both hold and that differ; "hyper" and the root included.
std::string sections_that_differ(const Digest& digest, const Digest& other) {
  std::string names;
  for (const SectionDigest& section : digest.sections) {
    const SectionDigest* found = reshard::find_section(other, section.section);
    if (found == nullptr) return section.section + " is missing";
    const bool both = section.absent.empty() && found->absent.empty();
    if (both && section.hex != found->hex) names += section.section + " ";
  }
  return names;
}

// The module's dtype is float32 and nothing else lies among the weights: then fp32 weights files
// hold the same section.
bool weights_section_fits(const Model& model) {
  for (size_t i = 0; i < model.parameters.size(); ++i) {
    if (!model.owned(i) && model.dtype != DType::kFloat32) return false;
  }
  return model.buffers.empty();
}

struct FlipChoice {
  Flip flip;
  std::string section;
};

FlipChoice choose_flip(const Case& value) {
  Random random(value.choice);
  const Model& model = value.model;
  std::vector<FlipChoice> choices;
  for (size_t i = 0; i < model.parameters.size(); ++i) {
    if (numel(model.parameters[i].shape) == 0) continue;
    const int tensor = static_cast<int>(i);
    if (!model.owned(i)) {
      choices.push_back({{Flip::Where::kFrozen, tensor}, "weights"});
      continue;
    }
    choices.push_back({{Flip::Where::kMaster, tensor}, "weights"});
    for (size_t s = 0; s < model.states.size(); ++s) {
      choices.push_back({{Flip::Where::kState, tensor, static_cast<int>(s)}, model.states[s].name});
    }
  }
  for (size_t i = 0; i < std::min(model.buffers.size(), model.parameters.size()); ++i) {
    if (numel(model.buffers[i].shape) > 0) {
      choices.push_back({{Flip::Where::kBuffer, static_cast<int>(i)}, "buffers"});
    }
  }
  FlipChoice chosen =
      choices[static_cast<size_t>(random.below(static_cast<int64_t>(choices.size())))];
  chosen.flip.bit = random.below(int64_t{1} << 40);
  return chosen;
}

}  // namespace

std::string digest_is_constant(const Case& value, Mutant mutant) {
  Workshop workshop(value.model, mutant);
  const ShardedState a = workshop.source(value.a, "/a");
  const Digest expected = workshop.digest(a);
  const auto compare = [&](const std::string& place, const ShardedState& state) {
    const Digest digest = workshop.digest(state);
    const std::string names = sections_that_differ(expected, digest);
    if (!names.empty()) return place + ": " + names + "differ";
    return digest.root == expected.root ? std::string() : place + ": another root";
  };
  std::string reason = compare("B", workshop.reshard(a, value.b, "/b"));
  if (reason.empty() && has_universal_form(value.model))
    reason = compare("universal", workshop.universal(a, "/u"));
  if (!reason.empty() || !weights_section_fits(value.model)) return reason;
  const Digest weights = workshop.digest(workshop.weights(a, "/w", {}));
  const bool same = reshard::find_section(weights, "weights")->hex ==
                    reshard::find_section(expected, "weights")->hex;
  return same ? "" : "fp32 weights: weights differ";
}

std::string one_bit_changes_one_section(const Case& value, Mutant mutant) {
  const FlipChoice chosen = choose_flip(value);
  Model flipped = value.model;
  flipped.flip = chosen.flip;
  Workshop workshop(value.model, mutant), other(flipped, mutant);
  const Digest before = workshop.digest(workshop.source(value.a, "/a"));
  const Digest after = other.digest(other.source(value.a, "/a"));
  const std::string names = sections_that_differ(before, after);
  if (names != chosen.section + " ") {
    return "a bit of " + chosen.section + " changes: " + (names.empty() ? "nothing" : names);
  }
  return before.root == after.root ? "the root stays" : "";
}

// Two parameters of one shape and group exchange their names, and so their contents.
std::string a_swap_changes_the_digest(const Case& value, Mutant mutant) {
  Model model = value.model;
  if (model.parameters.size() < 2 || model.layers > 0) return "";  // a name says the layer
  ModelParameter& first = model.parameters[0];
  ModelParameter& second = model.parameters[1];
  second.shape = first.shape;
  // A group that loses its whole parameter could leave a tensor-parallel rank without any.
  for (ModelParameter& parameter : model.parameters) parameter.cut = reference::Cut::kWhole;
  second.group = first.group;
  second.zeros = first.zeros;
  Model swapped = model;
  std::swap(swapped.parameters[0].name, swapped.parameters[1].name);
  const bool equal = model.owned(0) ? state_bits(model, 0, -1) == state_bits(model, 1, -1)
                                    : module_bytes(model, 0) == module_bytes(model, 1);
  if (equal || optimizer_groups(model).empty()) return "";
  Workshop workshop(model, mutant), other(swapped, mutant);
  const Digest before = workshop.digest(workshop.source(value.a, "/a"));
  const Digest after = other.digest(other.source(value.a, "/a"));
  const std::string names = sections_that_differ(before, after);
  return names.find("weights ") == std::string::npos ? "weights stay under a swap" : "";
}

// One bit of a payload record of A is turned over on the disk.
std::string a_damaged_file_is_refused(const Case& value, Mutant mutant) {
  Workshop workshop(value.model, mutant);
  const ShardedState a = workshop.source(value.a, "/a");
  const Digest before = workshop.digest(a);
  Random random(value.choice);
  const auto pick = [&](size_t count) {
    return static_cast<size_t>(random.below(static_cast<int64_t>(count)));
  };
  const checkpoint::SourceFile& file = a.files[pick(a.files.size())];
  const auto& storages = file.torch->storages();
  if (storages.empty()) return "";
  const checkpoint::ZipRecord& record = file.torch->record(static_cast<int>(pick(storages.size())));
  if (record.size_bytes == 0) return "";
  const int64_t at = record.data_offset + random.below(record.size_bytes);
  std::byte byte;
  file.torch->file().read_at(at, {&byte, 1});
  byte ^= std::byte{1} << random.below(8);
  const std::unique_ptr<WritableFile> writable = workshop.storage().open_write(file.path);
  writable->write_at(at, {&byte, 1});
  writable->close();
  try {
    const Digest after = workshop.digest(workshop.read("/a"));
    return before.root == after.root ? "" : "a damaged record changes the digest silently";
  } catch (const Error& error) {
    return error.info().code == ErrorCode::kCorrupt ? "" : error.what();
  }
}

}  // namespace isoshard::properties
