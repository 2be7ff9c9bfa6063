// See rank_files.h.
#include "engine/rank_files.h"

#include <algorithm>

#include "core/check.h"
#include "core/error.h"
#include "engine/expert_files.h"
#include "engine/layer_files.h"

namespace isoshard::engine {

using checkpoint::FileBlueprint;

namespace {

std::string pipeline_unsupported(const TrainingState& state, const Topology& topology) {
  if (has_experts(state)) return "DeepSpeed has no AutoEP in a PipelineModule";
  if (topology.tensor > 1) {
    return "DeepSpeed leaves tensor-parallel layers of a pipeline to the model's own code";
  }
  if (topology.sequence > 1) return "DeepSpeed has no sequence-parallel ranks in a pipeline";
  if (state.stage > 1) {
    return "DeepSpeed's pipelines have no ZeRO above 1 (AssertionError, \"incompatible with "
           "pipeline "
           "parallelism\")";
  }
  if (state.stage == 0 && state.dtype == DType::kBFloat16) {
    return "a bf16 pipeline at stage 0 is BF16_Optimizer's form, which DeepSpeed saves and cannot "
           "load (KeyError: 0)";
  }
  if (state.stage == 0)
    return "isoshard does not read the pipelines of stage 0 that have no masters";
  return "";
}

}  // namespace

Support supports(const TrainingState& state, const Topology& topology) {
  const bool experts = has_experts(state);
  if (state.pipeline_module || topology.pipeline > 1) {
    return {pipeline_unsupported(state, topology)};
  }
  if (experts && topology.tensor > 1) {
    if (topology.expert == 1) {
      return {
          "DeepSpeed has AutoTP with experts only where they are shared (ValueError, "
          "\"requires expert_parallel.autoep_size > 1\")"};
    }
    if (state.stage == 0 || state.stage == 3) {
      return {"isoshard does not read AutoEP folded with AutoTP at stages 0 and 3"};
    }
  }
  if (experts && topology.sequence > 1 && state.stage == 3) {
    return {"DeepSpeed has no AutoEP with sequence parallelism at stage 3 (AssertionError)"};
  }
  if (topology.tensor > 1 && topology.sequence > 1) {
    return {
        "DeepSpeed has no run of sequence- and tensor-parallel ranks together "
        "(ValueError, \"mutually exclusive\")"};
  }
  if (state.stage == 0 && state.dtype == DType::kFloat16) {
    return {"fp16 at stage 0 is FP16_Optimizer's form, of GPUs alone"};
  }
  return {""};
}

std::vector<FileBlueprint> rank_files(const TrainingState& state, const RankPlace& place,
                                      const SaveContent& content) {
  if (const Support support = supports(state, place.topology); !support) {
    throw Error(
        ErrorInfo{.code = ErrorCode::kUnsupported,
                  .what = "This run cannot be saved in DeepSpeed's files: " + support.why + ".",
                  .entry = to_string(place.topology) + " stage " + std::to_string(state.stage),
                  .next = "choose another topology or stage; isoshard simulate "
                          "--topologies … runs others like it in memory"});
  }
  std::vector<std::string> reserved = {"checkpoint_parallel_dimensions"};
  if (has_experts(state)) {
    reserved.insert(reserved.end(),
                    {"ds_autoep_layers", "autoep_layers", "universal_checkpoint_info", "folding"});
  }
  for (const std::string& key : reserved) {
    if (!content.client_state.contains(key)) continue;
    throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                          .what = "client_state contains a reserved key (DeepSpeed: KeyError).",
                          .entry = key,
                          .next = "give the entry another name"});
  }
  for (const TrainedParameter& p : state.parameters) {
    CHECK(state.pipeline_module || p.module_name == p.name, p.name + " has two names");
  }
  std::vector<FileBlueprint> files;
  if (state.stage == 3 || place.zero_rank() == 0) {
    files.push_back(model_file(state, place, content));
    for (const LayerPlace& layer : layers_with_files(state, place)) {
      files.push_back(layer_file(state, layer, content.exclude_frozen));
    }
  }
  if (state.stage > 0) files.push_back(optim_file(state, place, content));
  if (state.stage < 3) add_expert_files(state, place, content, &files);
  return files;
}

}  // namespace isoshard::engine
