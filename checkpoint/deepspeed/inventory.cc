// See inventory.h.
#include "checkpoint/deepspeed/inventory.h"

#include <algorithm>

#include "checkpoint/deepspeed/names.h"
#include "checkpoint/deepspeed/source.h"
#include "core/error.h"
#include "core/mutant.h"

namespace isoshard::checkpoint {

const char* const kCovered =
    "ZeRO stages 0 to 3, BF16_Optimizer, Ulysses, AutoTP, AutoEP, "
    "native MoE at stages 0 to 2";
const char* const kElsewhere =
    "rename a file that only its name makes so, or convert the checkpoint with DeepSpeed "
    "(ds_to_universal.py); docs/SUPPORT.md lists what is covered";

namespace {

[[noreturn]] void refuse(ErrorCode code, const std::string& what, const std::string& file,
                         const std::string& expected, const std::string& found,
                         const std::string& next) {
  throw Error(ErrorInfo{.code = code,
                        .what = what,
                        .file = file,
                        .expected = expected,
                        .found = found,
                        .next = next});
}

void refuse_uncovered(const FileName& name, const std::string& file, const std::string& path) {
  using Kind = FileName::Kind;
  if (file == "offloaded_tensors")
    refuse(ErrorCode::kUnsupported, "Optimizer state offloaded to NVMe is not supported.", path,
           "no offloaded_tensors folder", "one", "save without NVMe offload");
  if (name.kind == Kind::kExpertOptim && name.mp != 0)
    refuse(ErrorCode::kUnsupported,
           "Experts of stage 0 with tensor-parallel ranks are not supported yet.", path, kCovered,
           file, kElsewhere);
}

void check_forms(const Inventory& inventory, const std::string& folder) {
  if (!inventory.expert_optim.empty() && (inventory.stage3() || !inventory.optim.empty()))
    refuse(ErrorCode::kMismatch,
           "Optimizer files of stage 0 and of other stages lie in one folder.", folder, "one form",
           inventory.expert_optim.begin()->second + " and " +
               (inventory.optim.empty() ? inventory.first_model()
                                        : inventory.optim.begin()->second.begin()->second),
           "find out which save is the newer one; do not delete before");
  if (inventory.stage3() && !inventory.model.empty())
    refuse(ErrorCode::kMismatch, "Model files of stage 3 and of stages 0 to 2 lie in one folder.",
           folder, "one form", inventory.model.begin()->second + " and " + inventory.first_model(),
           "find out which save is the newer one");
  if (!inventory.stage3() && inventory.model.empty()) {
    size_t files = 0;
    for (const auto& [mp, ranks] : inventory.optim) files += ranks.size();
    refuse(ErrorCode::kIncomplete, "The checkpoint is incomplete: there is no model file.", folder,
           "mp_rank_00_model_states.pt or zero_pp_rank_0_mp_rank_00_model_states.pt",
           std::to_string(files) + " optimizer files", "bring it from the node of rank 0");
  }
}

}  // namespace

Inventory take_inventory(Storage& storage, const std::string& folder) {
  Inventory inventory;
  using Kind = FileName::Kind;
  for (const DirectoryEntry& entry : storage.list(folder)) {
    const FileName name = parse_file_name(entry.name);
    refuse_uncovered(name, entry.name, join(folder, entry.name));
    if (name.kind == Kind::kOther) inventory.other.push_back(entry.name);
    if (name.kind == Kind::kExpert) inventory.experts.push_back(entry.name);
    if (name.kind == Kind::kLayer) inventory.layers.push_back(entry.name);
    if (name.kind == Kind::kOther || name.kind == Kind::kExpert || name.kind == Kind::kLayer)
      continue;
    Inventory::ByRank* where = &inventory.model;
    if (name.kind == Kind::kModelOfRank) where = &inventory.model_of_rank[name.mp];
    if (name.kind == Kind::kOptim) where = &inventory.optim[name.mp];
    if (name.kind == Kind::kExpertOptim) where = &inventory.expert_optim;
    const int rank = name.kind == Kind::kModel ? name.mp : name.dp;
    const auto [known, fresh] = where->emplace(rank, entry.name);
    if (!fresh && !mutant("rank_file_twice")) {
      refuse(ErrorCode::kMismatch,
             "Two files stand for the same rank; one is left over from another save.", folder,
             "one file for rank " + std::to_string(rank), known->second + " and " + entry.name,
             "remove the older one after looking at both");
    }
  }
  check_forms(inventory, folder);
  return inventory;
}

std::vector<std::string> complete(const std::map<int, std::string>& files, int64_t count,
                                  const std::string& folder, const std::string& what) {
  std::string missing, extra;
  for (int64_t rank = 0; rank < count; ++rank) {
    if (files.count(static_cast<int>(rank)) == 0 && missing.size() < 200)
      missing += (missing.empty() ? "rank " : ", ") + std::to_string(rank);
  }
  for (const auto& [rank, name] : files) {
    if (rank >= count) extra += (extra.empty() ? "" : ", ") + name;
  }
  if (!missing.empty() && !mutant("missing_shard_ignored")) {
    refuse(ErrorCode::kIncomplete, "The checkpoint is incomplete: " + what + " files are missing.",
           folder, std::to_string(count) + " files, ranks 0 to " + std::to_string(count - 1),
           "missing: " + missing,
           "bring the missing files from the node that wrote them, or use an older checkpoint");
  }
  if (!extra.empty() && !mutant("larger_world_ignored")) {
    refuse(ErrorCode::kMismatch,
           "The folder holds " + what + " files of a larger world: shards of two saves are mixed.",
           folder, std::to_string(count) + " files", "also " + extra,
           "find out which save is the newer one; do not delete before");
  }
  std::vector<std::string> names;
  for (const auto& [rank, name] : files) names.push_back(name);
  if (mutant("ranks_sorted_as_text")) std::ranges::sort(names);
  return names;
}

}  // namespace isoshard::checkpoint
