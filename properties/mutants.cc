// See mutants.h.
#include "properties/mutants.h"

#include <algorithm>
#include <functional>

#include "checkpoint/deepspeed/names.h"
#include "checkpoint/format/crc.h"
#include "properties/expect.h"

namespace isoshard::properties {
namespace {

using checkpoint::FileBlueprint;
using checkpoint::FileName;
using checkpoint::Leaf;
using checkpoint::LeafRun;
using checkpoint::ParameterState;
using checkpoint::ShardedState;
using checkpoint::StorageFill;

bool is_optim(const FileBlueprint& file) {
  return checkpoint::parse_file_name(file.path).kind == FileName::Kind::kOptim;
}

void for_each_run(std::vector<FileBlueprint>* files, const std::function<void(LeafRun*)>& visit) {
  for (FileBlueprint& file : *files) {
    if (!is_optim(file)) continue;
    for (StorageFill& fill : file.storages) {
      for (LeafRun& run : fill.runs) visit(&run);
    }
  }
}

void shift_run(std::vector<FileBlueprint>* files) {
  bool shifted = false;
  for_each_run(files, [&](LeafRun* run) {
    if (shifted || run->count < 2) return;
    ++run->begin;
    --run->count;
    shifted = true;
  });
}

void sort_ranks(std::vector<FileBlueprint>* files) {
  std::vector<std::string> names;
  for (const FileBlueprint& file : *files) {
    if (is_optim(file)) names.push_back(file.path);
  }
  std::sort(names.begin(), names.end());
  size_t next = 0;
  for (FileBlueprint& file : *files) {
    if (is_optim(file)) file.path = names[next++];
  }
}

// A leaf of one element that is the first poison found in the source's fp32 storages.
int padding_leaf(ShardedState* state) {
  const std::string pattern = pack({poison(DType::kFloat32)}, DType::kFloat32);
  for (int file : state->optim_files) {
    const checkpoint::TorchFile& document = state->document(file);
    for (size_t s = 0; s < document.storages().size(); ++s) {
      if (document.storages()[s].dtype != DType::kFloat32) continue;
      const checkpoint::ZipRecord& record = document.record(static_cast<int>(s));
      std::string bytes(static_cast<size_t>(record.size_bytes), '\0');
      document.file().read_at(record.data_offset, std::as_writable_bytes(std::span(bytes)));
      for (size_t at = 0; at < bytes.size(); at += 4) {
        if (bytes.compare(at, 4, pattern) != 0) continue;
        return state->add_leaf(
            {.name = "padding",
             .state = "padding",
             .shape = {1},
             .fragments = {{0, 1, file, record.data_offset + static_cast<int64_t>(at)}}});
      }
    }
  }
  return -1;
}

void keep_padding(const ShardedState& state, std::vector<FileBlueprint>* files) {
  const int leaf = static_cast<int>(state.leaves.size()) - 1;
  if (state.leaf(leaf).state != "padding") return;
  for (FileBlueprint& file : *files) {
    if (!is_optim(file)) continue;
    for (StorageFill& fill : file.storages) {
      int64_t end = 0;
      for (const LeafRun& run : fill.runs) end = std::max(end, run.at + run.count);
      const bool room =
          fill.dtype == DType::kFloat32 && !fill.copy && fill.literal.empty() && end < fill.numel;
      if (room) fill.runs.push_back({leaf, 0, 1, end});
    }
  }
}

// The optimizer files of tensor-parallel ranks 0 and 1 take each other's names.
void swap_shards(std::vector<FileBlueprint>* files) {
  const bool several = std::any_of(files->begin(), files->end(), [](const FileBlueprint& file) {
    return checkpoint::parse_file_name(file.path).mp == 1;
  });
  for (FileBlueprint& file : *files) {
    const FileName name = checkpoint::parse_file_name(file.path);
    if (several && is_optim(file) && name.mp < 2)
      file.path = checkpoint::optim_file_name(name.prefix, name.dp, 1 - name.mp);
  }
}

void transpose_ranks(const Job& job, std::vector<FileBlueprint>* files) {
  for (FileBlueprint& file : *files) {
    const FileName name = checkpoint::parse_file_name(file.path);
    if (!is_optim(file)) continue;
    const int mp = name.mp % job.tensor * job.pipeline + name.mp / job.tensor;
    file.path = checkpoint::optim_file_name(name.prefix, name.dp, mp);
  }
}

void repeat_layers(std::vector<FileBlueprint>* files) {
  const FileBlueprint* first = nullptr;
  for (FileBlueprint& file : *files) {
    if (file.path == "layer_01-model_00-model_states.pt") first = &file;
    const bool again = file.path == "layer_01-model_01-model_states.pt" && first != nullptr;
    if (!again || file.kind == FileBlueprint::Kind::kCopy) continue;
    file.storages = first->storages;
  }
}

void swap_stacks(ShardedState* state) {
  ParameterState *first = nullptr, *second = nullptr;
  for (ParameterState& parameter : state->parameters) {
    if (parameter.name == "m0.mlp.experts.w1") first = &parameter;
    if (parameter.name == "m0.mlp.experts.w3") second = &parameter;
  }
  if (first != nullptr && second != nullptr) std::swap(first->states, second->states);
}

// Experts 0 and 1 of the first layer.
std::pair<ParameterState*, ParameterState*> two_experts(ShardedState* state) {
  std::pair<ParameterState*, ParameterState*> found = {nullptr, nullptr};
  for (ParameterState& parameter : state->parameters) {
    if (parameter.name == "m0.deepspeed_moe.experts.deepspeed_experts.0.a.weight")
      found.first = &parameter;
    if (parameter.name == "m0.deepspeed_moe.experts.deepspeed_experts.1.a.weight")
      found.second = &parameter;
  }
  return found;
}

const ParameterState* first_owned(const ShardedState& state) {
  for (const ParameterState& parameter : state.parameters) {
    if (parameter.group >= 0) return &parameter;
  }
  return nullptr;
}

void drop_parameter(const ShardedState& state, std::vector<FileBlueprint>* files) {
  const int dropped = first_owned(state)->weight;
  for (FileBlueprint& file : *files) {
    if (!is_optim(file)) continue;
    for (StorageFill& fill : file.storages) {
      std::erase_if(fill.runs, [&](const LeafRun& run) { return run.leaf == dropped; });
    }
  }
}

void floor_slots(const ShardedState& state, const Job& job, std::vector<FileBlueprint>* files) {
  if (job.stage != 3) return;
  for (FileBlueprint& file : *files) {
    if (!is_optim(file)) continue;
    const int rank = checkpoint::parse_file_name(file.path).dp;
    for (StorageFill& fill : file.storages) {
      for (LeafRun& run : fill.runs) {
        const int64_t n = state.leaf(run.leaf).size_elements(), q = n / job.ranks();
        if (n % job.ranks() == 0 || q == 0) continue;
        run.begin = rank * q;
        run.count = std::min(run.count, q);
      }
    }
  }
}

// Replaces leaves of runs by others of the same size.
void replace_leaves(const std::vector<std::pair<int, int>>& pairs,
                    std::vector<FileBlueprint>* files) {
  for_each_run(files, [&](LeafRun* run) {
    for (const auto& [leaf, other] : pairs) {
      if (run->leaf != leaf) continue;
      run->leaf = other;
      return;
    }
  });
}

void swap_states(const ShardedState& state, std::vector<FileBlueprint>* files) {
  std::vector<std::pair<int, int>> pairs;
  for (const ParameterState& parameter : state.parameters) {
    if (parameter.states.size() < 2) continue;
    const int a = parameter.states[0], b = parameter.states[1];
    pairs.insert(pairs.end(), {{a, b}, {b, a}});
  }
  replace_leaves(pairs, files);
}

void round_masters(const ShardedState& state, std::vector<FileBlueprint>* files) {
  std::vector<std::pair<int, int>> pairs;
  for (const ParameterState& parameter : state.parameters) {
    if (parameter.group >= 0 && parameter.model_copy >= 0)
      pairs.emplace_back(parameter.weight, parameter.model_copy);
  }
  replace_leaves(pairs, files);
}

// The order that the writer's permutation undoes.
void unpermute(ShardedState* state, int ranks) {
  if (!state->round_robin) return;
  for (checkpoint::GroupState& group : state->groups) {
    const std::vector<int> order =
        reference::round_robin(static_cast<int>(group.parameters.size()), ranks);
    std::vector<int> undone(order.size());
    for (size_t k = 0; k < order.size(); ++k)
      undone[static_cast<size_t>(order[k])] = group.parameters[k];
    group.parameters = undone;
  }
}

void forget_last_rank(std::vector<FileBlueprint>* files) {
  FileBlueprint* last = nullptr;
  for (FileBlueprint& file : *files) {
    if (is_optim(file)) last = &file;
  }
  if (last == nullptr) return;
  for (StorageFill& fill : last->storages) fill.runs.clear();
}

std::string digest_of_files(const ShardedState& state) {
  std::string all;
  for (const checkpoint::SourceFile& file : state.files) {
    std::string bytes(static_cast<size_t>(file.bytes().size_bytes()), '\0');
    file.bytes().read_at(0, std::as_writable_bytes(std::span(bytes)));
    all += bytes;
  }
  return checkpoint::sha256_hex(all);
}

// Every section counts its bytes' values: the same whatever their order and owner.
void forget_places(const ShardedState& state, reshard::Digest* digest) {
  for (reshard::SectionDigest& section : digest->sections) {
    uint64_t sum = 0;
    for (const Leaf& leaf : state.leaves) {
      const bool weight =
          section.section == "weights" && (leaf.state == "fp32" || leaf.state == "param");
      if (!weight && leaf.state != section.section) continue;
      for (unsigned char byte : leaf_bytes(state, static_cast<int>(&leaf - state.leaves.data())))
        sum += byte;
    }
    if (!section.hex.empty()) section.hex = std::to_string(sum);
  }
}

}  // namespace

std::string name(Mutant mutant) {
  constexpr const char* kNames[] = {"None",
                                    "ShiftedRun",
                                    "AlphabeticalRanks",
                                    "KeptPadding",
                                    "DroppedParameter",
                                    "UnpermutedGroups",
                                    "FloorSlots",
                                    "SwappedStates",
                                    "RoundedMaster",
                                    "BelievedUniversal",
                                    "TruncatedWeights",
                                    "MisnamedSlots",
                                    "ForgottenRank",
                                    "ExchangedRanks",
                                    "FileDigest",
                                    "PlacelessDigest",
                                    "MergedSections",
                                    "UncheckedRecords",
                                    "ListedRanks",
                                    "LongFragment",
                                    "LostFragment",
                                    "CutHeads",
                                    "CeilWidths",
                                    "ColumnForRow",
                                    "SwappedShards",
                                    "ShiftedStage",
                                    "TransposedRanks",
                                    "StaleLayers",
                                    "SwappedExperts",
                                    "SwappedStacks",
                                    "DoubledExpert",
                                    "KeptGroups"};
  return kNames[static_cast<size_t>(mutant)];
}

ShardedState mutate_source(Mutant mutant, const ShardedState& source, const Job& job) {
  ShardedState state = source;
  if (mutant == Mutant::kKeptPadding) padding_leaf(&state);
  if (mutant == Mutant::kUnpermutedGroups) unpermute(&state, job.ranks());
  const auto [first, second] = two_experts(&state);
  if (second != nullptr && mutant == Mutant::kSwappedExperts)
    std::swap(first->states, second->states);
  if (mutant == Mutant::kSwappedStacks) swap_stacks(&state);
  if (second != nullptr && mutant == Mutant::kDoubledExpert) {
    second->weight = first->weight;
    second->model_copy = first->model_copy;
  }
  return state;
}

void mutate_names(Mutant mutant, ShardedState* state) {
  if (mutant != Mutant::kMisnamedSlots) return;
  const std::vector<int>& order = state->groups.at(0).parameters;
  if (order.size() < 2) return;
  ParameterState& first = state->parameters[static_cast<size_t>(order[0])];
  ParameterState& second = state->parameters[static_cast<size_t>(order[1])];
  std::swap(first.weight, second.weight);
  std::swap(first.states, second.states);
}

void mutate_files(Mutant mutant, const ShardedState& source, const Job& job,
                  std::vector<FileBlueprint>* files) {
  switch (mutant) {
    case Mutant::kShiftedRun:
      return shift_run(files);
    case Mutant::kAlphabeticalRanks:
      return sort_ranks(files);
    case Mutant::kKeptPadding:
      return keep_padding(source, files);
    case Mutant::kDroppedParameter:
      return drop_parameter(source, files);
    case Mutant::kSwappedShards:
      return swap_shards(files);
    case Mutant::kTransposedRanks:
      return transpose_ranks(job, files);
    case Mutant::kStaleLayers:
      return repeat_layers(files);
    case Mutant::kForgottenRank:
      return forget_last_rank(files);
    case Mutant::kFloorSlots:
      return floor_slots(source, job, files);
    case Mutant::kSwappedStates:
      return swap_states(source, files);
    case Mutant::kRoundedMaster:
      return round_masters(source, files);
    default:
      return;
  }
}

reshard::Digest mutate_digest(Mutant mutant, const ShardedState& state, reshard::Digest digest) {
  if (mutant == Mutant::kFileDigest) digest.root = digest_of_files(state);
  if (mutant == Mutant::kPlacelessDigest) forget_places(state, &digest);
  for (reshard::SectionDigest& section : digest.sections) {
    if (mutant == Mutant::kMergedSections && !section.hex.empty()) section.hex = digest.root;
  }
  return digest;
}

reshard::Digest digest_without_checks(const ShardedState& state) {
  reshard::Digest digest;
  for (int leaf : reshard::digested_leaves(state)) digest.root += leaf_bytes(state, leaf);
  return digest;
}

std::vector<RankFragment> mutate_fragments(Mutant mutant, std::vector<RankFragment> fragments) {
  if (mutant == Mutant::kLostFragment && !fragments.empty()) fragments.pop_back();
  if (mutant == Mutant::kLongFragment && fragments.size() > 1) {
    ++fragments[0].count;
    ++fragments[1].begin;
    --fragments[1].count;
  }
  return fragments;
}

}  // namespace isoshard::properties
