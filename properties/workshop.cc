// See workshop.h.
#include "properties/workshop.h"

#include <map>

#include "checkpoint/deepspeed/names.h"
#include "checkpoint/deepspeed/reader.h"
#include "checkpoint/deepspeed/reshard_target.h"
#include "checkpoint/deepspeed/universal_blueprint.h"
#include "properties/expert_source.h"
#include "properties/listing_storage.h"
#include "properties/synthetic.h"
#include "reshard/executor.h"

namespace isoshard::properties {
namespace {

using checkpoint::ShardedState;

constexpr const char* kOrderPath = "/order.txt";

// What a reader would open that takes the i-th optimizer file of a listing for rank i.
void take_listing_for_ranks(Storage& storage, const std::string& folder, Storage& listing) {
  std::vector<std::string> listed;
  std::map<int, std::string> by_rank;
  for (const DirectoryEntry& entry : listing.list(folder)) {
    const checkpoint::FileName name = checkpoint::parse_file_name(entry.name);
    if (name.kind != checkpoint::FileName::Kind::kOptim) continue;
    listed.push_back(entry.name);
    by_rank[name.dp] = entry.name;
  }
  for (const std::string& name : listed) {
    storage.rename_over(folder + "/" + name, folder + "/" + name + ".listed");
  }
  for (const auto& [rank, name] : by_rank) {
    storage.rename_over(folder + "/" + listed[static_cast<size_t>(rank)] + ".listed",
                        folder + "/" + name);
  }
}

// The second stage begins a layer earlier, if that leaves the first one any.
void shift_stage(std::vector<int>* parts) {
  if (parts->size() > 2 && (*parts)[1] > 1) --(*parts)[1];
}

// The model's heads, if they divide an axis that is cut; others are taken for a mistake, and change
// no width.
int64_t heads_told(const Model& model) {
  using reference::Cut;
  for (size_t i = 0; model.heads > 0 && i < model.parameters.size(); ++i) {
    const ModelParameter& parameter = model.parameters[i];
    if (parameter.cut == Cut::kWhole || rule_of(model, i).heads == 0) continue;
    std::vector<int64_t> totals = parameter.parts;
    if (parameter.cut != Cut::kParts)
      totals = {parameter.shape[parameter.cut == Cut::kRow ? 1 : 0]};
    for (int64_t total : totals) {
      if (total % model.heads == 0) return model.heads;
    }
  }
  return 0;
}

}  // namespace

Workshop::Workshop(const Model& model, Mutant mutant) : model_(model), mutant_(mutant) {
  write_param_order(storage_, kOrderPath, model);
}

ShardedState Workshop::source(const Job& job, const std::string& folder) {
  if (model_.experts.empty())
    write_source(storage_, folder, model_, job);
  else
    write_expert_source(storage_, folder, model_, job);
  return read(folder);
}

ShardedState Workshop::write(const ShardedState& state,
                             std::vector<checkpoint::FileBlueprint> files,
                             const std::string& folder) {
  storage_.make_directories(folder);
  for (const checkpoint::FileBlueprint& file : files) {
    const std::string path = folder + "/" + file.path;
    storage_.make_directories(path.substr(0, path.rfind('/')));
  }
  const reshard::ReshardPlan plan = reshard::make_plan(state, std::move(files));
  reshard::execute(storage_, state, plan, folder, {.workers = 1});
  return read(folder);
}

ShardedState Workshop::reshard(const ShardedState& state, const Job& job,
                               const std::string& folder) {
  const ShardedState source = mutate_source(mutant_, with_splits(state, job), job);
  return write(source, blueprints(source, job), folder);
}

// A source of one tensor-parallel rank does not say how its tensors are cut: a run of two does.
ShardedState Workshop::with_splits(const ShardedState& state, const Job& job) {
  ShardedState result = state;
  if (job.tensor == 1 || state.topology.tensor > 1 || model_.callers_splits) return result;
  constexpr const char* kDonor = "/of two tensor-parallel ranks";
  if (!storage_.is_directory(kDonor))
    write_source(storage_, kDonor, model_, {.stage = 1, .tensor = 2});
  checkpoint::adopt_splits(&result, read(kDonor));
  return result;
}

std::vector<checkpoint::FileBlueprint> Workshop::blueprints(const ShardedState& state,
                                                            const Job& job) const {
  const Topology topology{.data = job.data,
                          .sequence = job.sequence,
                          .tensor = job.tensor,
                          .expert = job.expert,
                          .pipeline = job.pipeline};
  checkpoint::ReshardOptions options{
      .allow_dropped = {},
      .splits = {.kv_heads = heads_told(model_), .grain = model_.grain},
      .stages = {},
      .beyond_deepspeed = model_.autoep,
      .moe_max_group_size = model_.most,
      .experts_grouped = mutant_ == Mutant::kKeptGroups};
  if (model_.layers > 0) options.stages.parts = parts_of(model_, job.pipeline);
  if (mutant_ == Mutant::kShiftedStage) shift_stage(&options.stages.parts);
  for (const ModelParameter& parameter : model_.parameters) {
    if (parameter.layers.size() > 1)
      options.stages.tied["k"] = {parameter.layers.begin(), parameter.layers.end()};
  }
  std::vector<checkpoint::FileBlueprint> files =
      checkpoint::reshard_blueprints(state, topology, job.stage, options).files;
  mutate_files(mutant_, state, job, &files);
  return files;
}

ShardedState Workshop::universal(const ShardedState& state, const std::string& folder) {
  const bool believed =
      mutant_ == Mutant::kBelievedUniversal && state.topology.tensor * state.topology.pipeline == 1;
  const ShardedState source = believed ? checkpoint::as_deepspeed_believes(state) : state;
  return write(source, checkpoint::universal_blueprints(source, {}).files, folder);
}

ShardedState Workshop::weights(const ShardedState& state, const std::string& folder,
                               const checkpoint::WeightsOptions& options) {
  ShardedState source = state;
  for (checkpoint::ParameterState& parameter : source.parameters) {
    const bool truncate = mutant_ == Mutant::kTruncatedWeights && parameter.group >= 0;
    if (truncate && parameter.model_copy >= 0) parameter.weight = parameter.model_copy;
  }
  return write(source, checkpoint::weights_blueprints(source, options).files, folder);
}

ShardedState Workshop::read(const std::string& folder, uint64_t shuffle) {
  const checkpoint::ReadOptions options{.tag = "",
                                        .param_order = model_.experts.empty() ? kOrderPath : "",
                                        .workers = 1,
                                        .moe_max_group_size = model_.most};
  if (shuffle == 0) return checkpoint::read_checkpoint(storage_, folder, options);
  ListingStorage listing(storage_, shuffle);
  if (mutant_ == Mutant::kListedRanks) {
    take_listing_for_ranks(storage_, folder, listing);
    checkpoint::ReadOptions renamed = options;
    renamed.allow_renamed = true;
    return checkpoint::read_checkpoint(listing, folder, renamed);
  }
  return checkpoint::read_checkpoint(listing, folder, options);
}

ShardedState Workshop::read_inferring(const std::string& folder) {
  ShardedState state =
      checkpoint::read_checkpoint(storage_, folder, {.tag = "", .param_order = "", .workers = 1});
  mutate_names(mutant_, &state);
  return state;
}

reshard::Digest Workshop::digest(const ShardedState& state) {
  if (mutant_ == Mutant::kUncheckedRecords) return digest_without_checks(state);
  return mutate_digest(mutant_, state, reshard::compute_digest(storage_, state, {.workers = 1}));
}

}  // namespace isoshard::properties
