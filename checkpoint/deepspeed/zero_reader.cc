// A tag folder of partition files: every mp rank is read by the form of its files, then joined.
#include <algorithm>
#include <map>
#include <set>

#include "checkpoint/cancel.h"
#include "checkpoint/deepspeed/experts.h"
#include "checkpoint/deepspeed/folded_experts.h"
#include "checkpoint/deepspeed/hyper.h"
#include "checkpoint/deepspeed/inventory.h"
#include "checkpoint/deepspeed/merge.h"
#include "checkpoint/deepspeed/module_weights.h"
#include "checkpoint/deepspeed/mp_checks.h"
#include "checkpoint/deepspeed/pipeline.h"
#include "checkpoint/deepspeed/rank_checks.h"
#include "checkpoint/deepspeed/reader.h"
#include "checkpoint/deepspeed/slice_shapes.h"
#include "checkpoint/deepspeed/zero0_files.h"
#include "checkpoint/deepspeed/zero_files.h"
#include "core/check.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

// Files above the first need no pickle any more: what was read of it stands in the state.
void drop_pickles(ShardedState* state) {
  std::set<int> keep(state->own_client_state.begin(), state->own_client_state.end());
  keep.insert(state->model_files[0]);
  if (!state->optim_files.empty()) keep.insert(state->optim_files[0]);
  for (const ParameterState& parameter : state->parameters) {
    for (const Scalar& scalar : parameter.scalars) keep.insert(scalar.value.file);
  }
  for (const std::vector<int>* files : {&state->model_files, &state->optim_files}) {
    for (int file : *files) {
      if (!keep.contains(file)) state->files[static_cast<size_t>(file)].torch->drop_pickle();
    }
  }
}

[[noreturn]] void refuse_uncovered(const std::string& what, const std::string& file,
                                   const std::string& entry, const std::string& found = "") {
  throw Error(ErrorInfo{.code = ErrorCode::kUnsupported,
                        .what = what,
                        .file = file,
                        .entry = entry,
                        .expected = kCovered,
                        .found = found,
                        .next = kElsewhere});
}

class ZeroReader {
 public:
  ZeroReader(ShardedState* state, Storage& storage, const ReadOptions& options)
      : state_(*state),
        storage_(storage),
        options_(options),
        inventory_(take_inventory(storage, state->folder)) {}

  void run() {
    state_.model_files_only = closed();
    tell_others();
    const int first = open_files(&state_, storage_, {inventory_.first_model()}, options_)[0];
    const ModelStates model = with_degrees(read_model_states(state_, first));
    state_.version = model.version;
    const auto mp_ranks = static_cast<int>(inventory_.mp_ranks());
    set_topology(&state_, model, mp_ranks, options_.sequence_degree);
    check_mp_ranks(model);
    const Fields fields(state_.document(first));
    const TensorParallelInfo info(fields, first,
                                  fields.maybe(fields.root(), "universal_checkpoint_info"));
    folded_ = fields.maybe(fields.root(), "folding") != kNoNode;
    if (state_.topology.pipeline > 1 || !inventory_.layers.empty()) {
      read_stages(first, info);
    } else if (folded_) {
      read_folded(first, info);
    } else if (mp_ranks == 1 && (inventory_.stage3() || !info.says_anything())) {
      open_rank(0, first, &state_);
      read_rank(&state_, model);
    } else {
      read_parts(first, info);
    }
    if (!folded_) drop_pickles(&state_);  // each file's `folding` goes along to its own topology
  }

 private:
  void tell_others();
  ModelStates with_degrees(ModelStates model) const;
  void check_mp_ranks(const ModelStates& model) const;
  // The optimizer's files are not opened.
  bool closed() const { return options_.model_files_only && !inventory_.stage3(); }
  std::vector<std::string> model_names(int mp, int64_t dp, const std::string& what);
  void open_rank(int mp, int first, ShardedState* part);
  void read_module(ShardedState* part, const ModelStates& model, const ExpertInfo& experts);
  void read_rank(ShardedState* part, const ModelStates& model);
  void read_stage0(ShardedState* part, const ModelStates& model);
  void check_experts(const ExpertInfo& experts, const ModelStates& model) const;
  std::vector<MpPart> read_mp_ranks(int first);
  void read_parts(int first, const TensorParallelInfo& info);
  void name_slices(int mp, MpPart* part);
  void require_splits(int first, const TensorParallelInfo& info) const;
  void read_stages(int first, const TensorParallelInfo& info);
  void join_layers(const std::vector<MpPart>& stages, const std::vector<int>& layers,
                   ShardedState* whole);
  void read_dense(ShardedState* part, const ModelStates& model);
  void read_folded(int first, const TensorParallelInfo& info);

  ShardedState& state_;
  Storage& storage_;
  const ReadOptions& options_;
  const Inventory inventory_;
  bool folded_ = false;         // AutoEP with AutoTP
  std::string missing_models_;  // ranks, at stage 3
  // Of a pipeline, by tensor-parallel rank; the shapes where no model file has them.
  std::vector<std::vector<int>> layer_files_;
  std::vector<LayerShapes> layer_shapes_;
};

void ZeroReader::tell_others() {
  for (const std::string& name : inventory_.other) {
    if (name != "MANIFEST.json" && name != "certificate.json") {
      state_.notices.push_back(
          "a file that is no part of a DeepSpeed checkpoint lies in the folder: " + quote(name));
    }
  }
}

// Older pipelines do not record their degrees: the files of layer 1 count the tensor-parallel
// ranks.
ModelStates ZeroReader::with_degrees(ModelStates model) const {
  if (model.has_degrees || inventory_.layers.empty()) return model;
  const auto ranks = std::ranges::count_if(
      inventory_.layers, [](const std::string& name) { return name.starts_with("layer_01-"); });
  model.tp_degree = std::max<int64_t>(1, ranks);
  model.pp_degree = static_cast<int64_t>(inventory_.mp_ranks()) / model.tp_degree;
  model.has_degrees = true;
  return model;
}

// The model files are those of mp ranks 0 … tp·pp−1, and no optimizer file is of another.
void ZeroReader::check_mp_ranks(const ModelStates& model) const {
  const int64_t expected = state_.topology.tensor * state_.topology.pipeline;
  std::map<int, std::string> firsts = inventory_.model, optims;
  for (const auto& [mp, ranks] : inventory_.model_of_rank) firsts[mp] = ranks.begin()->second;
  for (const auto& [mp, ranks] : inventory_.optim) optims[mp] = ranks.begin()->second;
  complete(firsts, expected, state_.folder, "model");
  const bool stage0_pipeline = !inventory_.layers.empty() && !inventory_.optim.empty();
  if ((model.has_param_shapes || stage0_pipeline) && !closed())
    complete(optims, expected, state_.folder, "optimizer");
}

// Stage 3: the model files of one mp rank. Rank 0's alone is enough where every rank's optimizer
// file is there and nothing is frozen: the others repeat it, but for buffers and client state.
std::vector<std::string> ZeroReader::model_names(int mp, int64_t dp, const std::string& what) {
  const Inventory::ByRank& there = inventory_.model_of_rank.at(mp);
  const auto optim = inventory_.optim.find(mp);
  const bool all_optim =
      optim != inventory_.optim.end() && static_cast<int64_t>(optim->second.size()) == dp;
  std::string missing;
  for (int rank = 0; rank < dp; ++rank) {
    if (!there.contains(rank)) missing += (missing.empty() ? "" : ", ") + std::to_string(rank);
  }
  if (missing.empty() || !there.contains(0) || !all_optim ||
      there.rbegin()->first >= static_cast<int>(dp))
    return complete(there, dp, state_.folder, what);
  const std::string text = what + " files of ranks " + missing +
                           " are missing: a client state or buffers of their own that they held "
                           "are not known; rank 0's are taken for all";
  state_.notices.push_back(text);
  state_.skipped.push_back(text);
  missing_models_ = missing;
  return {there.at(0)};
}

// Opens the files of one mp rank; `first` is its first model file, or −1 if that is not open yet.
void ZeroReader::open_rank(int mp, int first, ShardedState* part) {
  const std::string folder = state_.folder;
  std::vector<std::string> models = {inventory_.stage3() ? "" : inventory_.model.at(mp)};
  const std::string of_rank = mp == 0 ? "" : " (mp rank " + std::to_string(mp) + ")";
  if (inventory_.stage3()) {
    const int64_t dp = state_.topology.zero_ranks();
    models = model_names(mp, dp, "model" + of_rank);
  }
  if (first >= 0) {
    part->model_files = {first};
    models.erase(models.begin());
  }
  for (int file : open_files(part, storage_, models, options_)) part->model_files.push_back(file);
  const auto optim = inventory_.optim.find(mp);
  if (optim == inventory_.optim.end() || closed()) return;
  const Fields fields(part->document(part->model_files[0]));
  if (fields.maybe(fields.root(), "param_shapes") == kNoNode && inventory_.layers.empty()) {
    throw Error(ErrorInfo{
        .code = ErrorCode::kUnsupported,
        .what = "Optimizer files lie beside a model file without param_shapes: stale files.",
        .file = folder,
        .expected = "no optimizer files at stage 0",
        .found = optim->second.begin()->second,
        .next = "remove stale files after looking at them"});
  }
  const int64_t dp = state_.topology.zero_ranks();
  part->optim_files = open_files(
      part, storage_, complete(optim->second, dp, folder, "optimizer" + of_rank), options_);
}

void ZeroReader::read_rank(ShardedState* part, const ModelStates& model) {
  const bool lacks = inventory_.stage3() && part->model_files.size() < part->optim_files.size();
  const NodeId layers =
      autoep_layers(Fields(part->document(model.file)), part->document(model.file).pickle().root);
  if (lacks && (!model.frozen_shapes.empty() || layers != kNoNode)) {
    throw Error(ErrorInfo{
        .code = ErrorCode::kIncomplete,
        .what = "The checkpoint is incomplete: model files are missing, which hold frozen "
                "parameters or say who has which experts.",
        .file = state_.folder,
        .expected = std::to_string(part->optim_files.size()) + " files",
        .found = "missing: rank " + missing_models_,
        .next = "bring the missing files from the node that wrote them"});
  }
  if (folded_) return read_dense(part, model);
  if (!inventory_.stage3() && !model.has_param_shapes) return read_stage0(part, model);
  const ExpertInfo experts(*part, model);
  if (experts.present() || !inventory_.experts.empty()) check_experts(experts, model);
  if (closed()) return read_module(part, model, experts);
  if (inventory_.stage3()) {
    if (!inventory_.experts.empty())
      part->notices.push_back("files of single experts are not read at stage 3, as DeepSpeed does");
    if (experts.present())
      read_experts(part, model, experts, /*stage3=*/true, options_.any_expert_format);
    else
      read_zero3(part, model);
    compare_ranks(part, model);
  } else if (experts.present()) {
    read_experts(part, model, experts, /*stage3=*/false, /*any_format=*/false);
    add_expert_copies(part, experts, open_files(part, storage_, inventory_.experts, options_));
  } else {
    read_zero12(part, model);
  }
  add_module_entries(part, experts.with_router_aliases(*part, model));
  if (inventory_.stage3() && experts.present()) give_expert_dtype(part, model, experts);
  check_scalars(*part);
}

void ZeroReader::read_stage0(ShardedState* part, const ModelStates& model) {
  const ExpertInfo experts(*part, model);
  const ModelStates named = experts.with_router_aliases(*part, model);
  const auto counts = expert_counts(Fields(part->document(model.file)));
  const bool counted = counts && !counts->empty();
  if (inventory_.experts.empty() && inventory_.expert_optim.empty() && !experts.autoep() &&
      !counted)
    return read_zero0(part, named, experts, options_, storage_);
  if (inventory_.mp_ranks() > 1)
    refuse_uncovered("Experts of stage 0 with tensor-parallel ranks are not supported yet.",
                     state_.folder, "num_experts");
  std::map<int, int> optim;
  for (const auto& [rank, name] : inventory_.expert_optim) {
    if (!closed()) optim[rank] = open_files(part, storage_, {name}, options_)[0];
  }
  read_zero0_experts(part, named, experts, open_files(part, storage_, inventory_.experts, options_),
                     optim, options_, storage_);
}

void ZeroReader::read_module(ShardedState* part, const ModelStates& model,
                             const ExpertInfo& experts) {
  part->flavour = Flavour::kZero12;
  part->stage =
      static_cast<int>(zero_option(Fields(part->document(model.file)), model.config, "stage", 1));
  const std::vector<int> files = open_files(part, storage_, inventory_.experts, options_);
  if (experts.present()) {
    part->expert_layout = experts.autoep() ? ExpertLayout::kAutoEp : ExpertLayout::kNative;
    if (experts.autoep()) part->topology.expert = static_cast<int>(experts.layers()[0].ep_size);
  }
  list_parameters(part, model, experts, files);
  if (experts.present()) add_expert_copies(part, experts, files);
  add_module_entries(part, experts.with_router_aliases(*part, model));
  promote_copies(part, /*all=*/inventory_.layers.empty());
  std::set<std::string> held;
  for (const ParameterState& parameter : part->parameters) held.insert(parameter.name);
  for (const Alias& alias : part->aliases) held.insert(alias.name);
  for (const auto& [name, shape] : model.frozen_shapes) {
    if (held.contains(name) || !inventory_.layers.empty()) continue;
    throw Error(
        ErrorInfo{.code = ErrorCode::kIncomplete,
                  .what = "The model's files do not hold a frozen parameter that they name.",
                  .file = part->document(model.file).path(),
                  .entry = quote(name),
                  .next = "use another checkpoint"});
  }
}

void ZeroReader::check_experts(const ExpertInfo& experts, const ModelStates& model) const {
  const auto refuse = [&](const std::string& what, const std::string& entry) {
    refuse_uncovered(what, state_.folder, entry);
  };
  for (const NamedShapes& group : model.param_shapes) {
    const auto stacked = std::ranges::find_if(group, [](const auto& named) {
      return named.first.ends_with(".experts.w1") || named.first == "experts.w1";
    });
    if (!experts.autoep() && stacked != group.end())
      Fields(state_.document(model.file))
          .fail("Experts of AutoEP without its metadata (DeepSpeed: RuntimeError).",
                "ds_autoep_layers", "the layers of " + quote(stacked->first), "none");
  }
  if (!experts.present())
    refuse("Experts that the optimizer does not train (frozen) are not supported yet.",
           inventory_.experts[0]);
  if (inventory_.stage3() && !experts.autoep())
    refuse("Native MoE at stage 3, which DeepSpeed itself refuses (AssertionError).",
           "num_experts");
  if (inventory_.mp_ranks() > 1)
    refuse("Mixture-of-experts checkpoints with tensor-parallel ranks are not supported yet.",
           "num_experts");
  if (experts.native() && experts.autoep())
    refuse("Native MoE and AutoEP layers in one model are not supported yet.", "ds_autoep_layers");
}

// Every mp rank as a checkpoint of its own. The list of files wanders along.
std::vector<MpPart> ZeroReader::read_mp_ranks(int first) {
  std::vector<MpPart> parts;
  nlohmann::json first_hyper;
  for (int mp = 0; mp < state_.topology.tensor * state_.topology.pipeline; ++mp) {
    throw_if_cancelled();
    MpPart part = lend_files(&state_);
    open_rank(mp, mp == 0 ? first : -1, &part.state);
    part.model = read_model_states(part.state, part.state.model_files[0]);
    const bool unnamed = !part.model.has_param_shapes && !part.state.optim_files.empty();
    if (unnamed) name_slices(mp, &part);
    read_rank(&part.state, part.model);
    if (unnamed) {
      part.state.stage = 0;
      add_model_optimizer(&part.state, part.model);
    }
    nlohmann::json hyper = shared_hyper(part.state);
    if (mp == 0)
      first_hyper = std::move(hyper);
    else if (hyper != first_hyper)
      refuse_hyper(part, first_hyper, hyper);
    state_.files = std::move(part.state.files);
    parts.push_back(std::move(part));
  }
  check_split_info(state_, parts);
  for (const MpPart& part : parts) {
    const ShardedState& from = part.state;
    const auto append = [](std::vector<int>* to, const std::vector<int>& list) {
      to->insert(to->end(), list.begin(), list.end());
    };
    append(&state_.model_files, from.model_files);
    append(&state_.optim_files, from.optim_files);
    append(&state_.own_client_state, from.own_client_state);
    add_once(&state_.notices, from.notices);
    add_once(&state_.skipped, from.skipped);
    add_once(&state_.inferred, from.inferred);
    add_once(&state_.not_verified, from.not_verified);
    if (&part != &parts[0] && client_state_json(state_.document(part.model.file)) !=
                                  client_state_json(state_.document(parts[0].model.file)))
      state_.own_client_state.push_back(part.model.file);
  }
  return parts;
}

void ZeroReader::read_stages(int first, const TensorParallelInfo& info) {
  const auto refuse = [&](const std::string& what, const std::string& found) {
    refuse_uncovered(what, state_.folder, "", found);
  };
  if (state_.topology.sequence > 1)
    refuse("A pipeline has no sequence-parallel ranks.",
           "sp=" + std::to_string(state_.topology.sequence));
  if (inventory_.stage3() || (inventory_.optim.empty() && !closed()))
    refuse("Pipelines are supported at stage 1, and in bf16 at stage 0.",
           inventory_.stage3() ? "stage 3" : "no optimizer files");
  require_splits(first, info);
  const int ranks = state_.topology.tensor;
  for (const auto& names : layer_files_by_rank(inventory_.layers, ranks, state_.folder))
    layer_files_.push_back(open_files(&state_, storage_, names, options_));
  std::vector<MpPart> files = read_mp_ranks(first);
  const auto stages_of = [&](int rank) {
    std::vector<MpPart> stages;
    for (size_t mp = static_cast<size_t>(rank); mp < files.size(); mp += static_cast<size_t>(ranks))
      stages.push_back(std::move(files[mp]));
    return stages;
  };
  if (ranks == 1 && !info.says_anything())
    return join_layers(stages_of(0), layer_files_[0], &state_);
  std::vector<MpPart> parts;
  for (int rank = 0; rank < ranks; ++rank) {
    const std::vector<MpPart> stages = stages_of(rank);
    MpPart part = lend_files(&state_, stages[0].model);
    join_layers(stages, layer_files_[static_cast<size_t>(rank)], &part.state);
    state_.files = std::move(part.state.files);
    parts.push_back(std::move(part));
  }
  merge_tensor_ranks(&state_, parts, info);
  adopt_stages(&state_, parts);
  tell_unused_patterns(&state_, info, options_.strict);
}

// Stage 0 in bf16: the layer files know the shapes.
void ZeroReader::name_slices(int mp, MpPart* part) {
  const int64_t stage =
      zero_option(Fields(part->state.document(part->model.file)), part->model.config, "stage", 0);
  if (stage != 0 || layer_files_.empty())
    part->state.refuse(ErrorCode::kMismatch, "A model file records no parameter shapes.",
                       "param_shapes", "present at stage " + std::to_string(stage), "none",
                       "put the files of one save together");
  for (size_t rank = layer_shapes_.size(); rank < layer_files_.size(); ++rank)
    layer_shapes_.push_back(read_layer_shapes(part->state, layer_files_[rank]));
  part->model.param_shapes =
      shapes_of_slices(part->state, layer_shapes_[static_cast<size_t>(mp) % layer_shapes_.size()]);
  part->model.has_param_shapes = true;
}

// The stages of one tensor-parallel rank, whose layers have files of their own.
void ZeroReader::join_layers(const std::vector<MpPart>& stages, const std::vector<int>& layers,
                             ShardedState* whole) {
  join_stages(whole, stages);
  std::set<std::string> buffers;
  for (const MpPart& stage : stages)
    buffers.insert(stage.model.buffer_names.begin(), stage.model.buffer_names.end());
  add_layer_copies(whole, buffers, layers);
  promote_copies(whole);
  check_layer_copies(*whole, buffers);
}

// A tensor-parallel rank of a folded checkpoint without its experts, which tensor-parallel ranks do
// not share: read_folded() reads them by expert-parallel rank.
void ZeroReader::read_dense(ShardedState* part, const ModelStates& model) {
  const ExpertInfo experts(*part, model);
  read_zero12(part, model, groups_of_experts(*part, model, experts).dense);
  add_module_entries(part, experts.with_router_aliases(*part, model));
  check_scalars(*part);
}

void ZeroReader::read_folded(int first, const TensorParallelInfo& info) {
  if (closed()) {
    throw Error(
        ErrorInfo{.code = ErrorCode::kUnsupported,
                  .what = "Of AutoEP folded with AutoTP the model files alone are not read.",
                  .file = state_.folder,
                  .entry = "folding",
                  .expected = "the optimizer's masters",
                  .found = "model files alone",
                  .next = "export --dtype fp32, or reshard --to tp=1 and export that"});
  }
  if (inventory_.stage3() || inventory_.optim.empty())
    refuse_uncovered(
        "AutoEP folded with AutoTP is read at stages 1 and 2, with the optimizer's files.",
        state_.folder, "folding", inventory_.stage3() ? "stage 3" : "no optimizer files");
  const std::vector<MpPart> parts = read_mp_ranks(first);
  merge_tensor_ranks(&state_, parts, info);
  const ExpertInfo experts(state_, parts[0].model);
  read_folded_experts(&state_, parts, experts);
  add_expert_copies(&state_, experts, open_files(&state_, storage_, inventory_.experts, options_));
  tell_unused_patterns(&state_, info, options_.strict);
}

void ZeroReader::require_splits(int first, const TensorParallelInfo& info) const {
  if (state_.topology.tensor == 1 || info.says_anything()) return;
  throw Error(ErrorInfo{
      .code = ErrorCode::kUnsupported,
      .what = "The checkpoint has several tensor-parallel ranks and does not say how its tensors "
              "are cut (DeepSpeed: AssertionError, or joined along axis 0 whatever they are).",
      .file = state_.document(first).path(),
      .entry = "universal_checkpoint_info",
      .expected = "lists of patterns, or affine_map",
      .found = info.present() ? "nothing that speaks of a parameter" : "absent",
      .next = "save again with a DeepSpeed that records it (AutoTP: 0.18.9 or newer), or with the "
              "lists of patterns in the client state, as Megatron-DeepSpeed gives them"});
}

void ZeroReader::read_parts(int first, const TensorParallelInfo& info) {
  require_splits(first, info);
  const std::vector<MpPart> parts = read_mp_ranks(first);
  for (const MpPart& part : parts) {
    if (part.state.expert_layout != ExpertLayout::kNone)
      refuse_uncovered("Experts beside tensor-parallel patterns are not supported yet.",
                       state_.document(part.model.file).path(), "universal_checkpoint_info");
  }
  merge_tensor_ranks(&state_, parts, info);
  tell_unused_patterns(&state_, info, options_.strict);
}

}  // namespace

void read_zero(ShardedState* state, Storage& storage, const ReadOptions& options) {
  ZeroReader(state, storage, options).run();
}

}  // namespace isoshard::checkpoint
