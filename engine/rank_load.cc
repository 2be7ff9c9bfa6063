// See rank_load.h. Every record that is read is compared with its CRC.
#include "engine/rank_load.h"

#include <algorithm>
#include <cstring>
#include <set>

#include "checkpoint/deepspeed/fields.h"
#include "checkpoint/deepspeed/names.h"
#include "checkpoint/format/crc.h"
#include "core/cast.h"
#include "core/error.h"

namespace isoshard::engine {
namespace {

using checkpoint::Fields;
using checkpoint::NodeId;
using checkpoint::TensorView;
using checkpoint::TorchFile;

// Values of the pickle that JSON has; others are their kind's name in angle brackets.
Json json_of(const checkpoint::Pickle& pickle, NodeId node) {
  using checkpoint::Kind;
  switch (pickle.kind(node)) {
    case Kind::kNone:
      return nullptr;
    case Kind::kBool:
      return pickle.integer_value(node) != 0;
    case Kind::kInt:
      return pickle.integer_value(node);
    case Kind::kFloat:
      return pickle.real_value(node);
    case Kind::kString:
      return pickle.text(node);
    case Kind::kTuple:
    case Kind::kList: {
      Json list = Json::array();
      for (const NodeId item : pickle.items(node)) list.push_back(json_of(pickle, item));
      return list;
    }
    case Kind::kDict: {
      Json object = Json::object();
      const std::vector<NodeId>& entries = pickle.items(node);
      for (size_t i = 0; i + 1 < entries.size(); i += 2) {
        const Json key = json_of(pickle, entries[i]);
        object[key.is_string() ? key.get<std::string>() : key.dump()] =
            json_of(pickle, entries[i + 1]);
      }
      return object;
    }
    default:
      break;
  }
  return "<" + std::string(checkpoint::name(pickle.kind(node))) + ">";
}

class RankReader {
 public:
  RankReader(Storage& storage, const std::string& path) : file_(storage, path), fields_(file_) {}

  const Fields& fields() const { return fields_; }
  NodeId need(NodeId mapping, const std::string& key) const { return fields_.need(mapping, key); }

  // A contiguous tensor's values; `count` is how many there must be.
  std::vector<float> values(NodeId node, int64_t count, const std::string& what) {
    const TensorView view = fields_.tensor(node, what);
    const int64_t found = numel(view.shape);
    if (found != count || !view.is_contiguous()) {
      throw Error(ErrorInfo{.code = ErrorCode::kMismatch,
                            .what = "A tensor of the checkpoint has another size than this run's.",
                            .file = file_.path(),
                            .entry = what,
                            .expected = std::to_string(count) + " elements",
                            .found = std::to_string(found),
                            .next = "load it into the topology it was saved by, or reshard it"});
    }
    std::vector<float> result(static_cast<size_t>(count));
    if (count == 0) return result;
    check_record(view.storage);
    const int64_t item = item_size_bytes(view.dtype);
    std::vector<std::byte> bytes(static_cast<size_t>(count * item));
    file_.file().read_at(file_.data_offset(view), bytes);
    cast(view.dtype, bytes, DType::kFloat32, std::as_writable_bytes(std::span(result)));
    return result;
  }

  int64_t integer(NodeId mapping, const std::string& key) const {
    return fields_.integer(need(mapping, key), key);
  }

 private:
  void check_record(int storage) {
    if (!checked_.insert(storage).second) return;
    const checkpoint::ZipRecord& record = file_.record(storage);
    std::vector<std::byte> bytes(static_cast<size_t>(record.size_bytes));
    file_.file().read_at(record.data_offset, bytes);
    if (checkpoint::crc32_of(bytes) == record.crc32) return;
    throw Error(
        ErrorInfo{.code = ErrorCode::kCorrupt,
                  .what = "A record does not have the CRC that its archive says.",
                  .file = file_.path(),
                  .entry = record.name,
                  .next = "take another checkpoint; isoshard verify tells what is damaged"});
  }

  TorchFile file_;
  Fields fields_;
  std::set<int> checked_;
};

void copy_to(const std::vector<float>& source, std::vector<float>* target) {
  std::copy(source.begin(), source.end(), target->begin());
}

// state[i] of an optimizer: its tensors, and how many steps it has taken.
void load_states(RankReader& reader, NodeId states, int64_t number, int64_t count, int64_t at,
                 TrainedGroup* group) {
  const checkpoint::Pickle& pickle = reader.fields().pickle();
  const std::vector<NodeId>& entries = pickle.items(states);
  for (size_t i = 0; i + 1 < entries.size(); i += 2) {
    if (pickle.integer_value(entries[i]) != number) continue;
    for (auto& [name, values] : group->states) {
      const std::vector<float> found =
          reader.values(reader.need(entries[i + 1], name), count, "state " + name);
      std::copy(found.begin(), found.end(), values.begin() + at);
    }
  }
}

void load_scale(const Fields& fields, NodeId scaler, LossScale* scale) {
  const NodeId state = fields.state_of(scaler);
  const checkpoint::Pickle& pickle = fields.pickle();
  const auto number = [&](const std::string& key, double other) {
    const NodeId node = fields.maybe(state, key);
    if (node == checkpoint::kNoNode) return other;
    return pickle.kind(node) == checkpoint::Kind::kFloat
               ? pickle.real_value(node)
               : static_cast<double>(pickle.integer_value(node));
  };
  scale->scale = number("cur_scale", scale->scale);
  scale->dynamic = fields.truth(state, "dynamic");
  scale->iteration = static_cast<int64_t>(number("cur_iter", 0));
  scale->last_overflow = static_cast<int64_t>(number("last_overflow_iter", -1));
  scale->hysteresis_left =
      static_cast<int64_t>(number("cur_hysteresis", static_cast<double>(scale->hysteresis)));
}

// Steps that the optimizer has taken, as its first state says; 0: it has none.
int64_t optimizer_steps(RankReader& reader, NodeId states) {
  const std::vector<NodeId>& entries = reader.fields().pickle().items(states);
  if (entries.size() < 2) return 0;
  const NodeId step = reader.fields().maybe(entries[1], "step");
  if (step == checkpoint::kNoNode) return -1;
  return static_cast<int64_t>(reader.values(step, 1, "step")[0]);
}

void load_partitions(RankReader& reader, const RankPlace& place, TrainingState* state) {
  const Fields& fields = reader.fields();
  const bool stage3 = state->stage == 3;
  const NodeId optimizer = reader.need(fields.root(), "optimizer_state_dict");
  const std::vector<NodeId>& masters = fields.list(
      reader.need(optimizer, stage3 ? "fp32_flat_groups" : "single_partition_of_fp32_groups"),
      "masters");
  const NodeId states = reader.need(
      reader.need(optimizer, stage3 ? "optimizer_state_dict" : "base_optimizer_state"), "state");
  if (masters.size() != state->groups.size()) {
    fields.fail("The optimizer has another number of groups.", "masters",
                std::to_string(state->groups.size()), std::to_string(masters.size()));
  }
  for (size_t g = 0; g < state->groups.size(); ++g) {
    TrainedGroup& group = state->groups[g];
    int64_t length = group.buffer_size;
    if (!stage3) {
      const std::vector<NodeId>& paddings =
          fields.list(reader.need(optimizer, "group_paddings"), "group_paddings");
      length -= fields.integer(paddings.at(g), "group_paddings");
    }
    std::fill(group.master.begin(), group.master.end(), 0.0f);
    copy_to(reader.values(masters[g], length, "master of group " + std::to_string(g)),
            &group.master);
    load_states(reader, states, static_cast<int64_t>(g), group.buffer_size, 0, &group);
  }
  state->counters.optimizer_steps = optimizer_steps(reader, states);
  load_scale(fields, reader.need(optimizer, "loss_scaler"), &state->loss_scale);
  (void)place;
}

void load_stage0(RankReader& reader, TrainingState* state) {
  const Fields& fields = reader.fields();
  NodeId optimizer = reader.need(fields.root(), "optimizer");
  std::vector<NodeId> masters;
  if (const NodeId inner = fields.maybe(optimizer, "optimizer_state_dict");
      inner != checkpoint::kNoNode) {
    masters = fields.list(reader.need(optimizer, "fp32_groups"), "fp32_groups");
    optimizer = inner;
  }
  const NodeId states = reader.need(optimizer, "state");
  const NodeId module = reader.need(fields.root(), "module");
  int64_t number = 0;
  for (size_t g = 0; g < state->groups.size(); ++g) {
    TrainedGroup& group = state->groups[g];
    for (size_t k = 0; k < group.pieces.size(); ++k) {
      const BufferPiece& piece = group.pieces[k];
      const TrainedParameter& p = state->parameters[static_cast<size_t>(piece.parameter)];
      const NodeId master = masters.empty() ? reader.need(module, p.name)
                                            : fields.list(masters.at(g), "fp32_groups").at(k);
      const std::vector<float> values = reader.values(master, piece.count, p.name);
      std::copy(values.begin(), values.end(), group.master.begin() + piece.at);
      load_states(reader, states, number++, piece.count, piece.at, &group);
    }
  }
  state->counters.optimizer_steps = optimizer_steps(reader, states);
}

// DeepSpeed's own keys, all of them, and those that load_checkpoint takes out.
const std::set<std::string> kOwnKeys = {"module",
                                        "buffer_names",
                                        "optimizer",
                                        "param_shapes",
                                        "frozen_param_shapes",
                                        "shared_params",
                                        "frozen_param_fragments",
                                        "lr_scheduler",
                                        "data_sampler",
                                        "random_ltd",
                                        "sparse_tensor_module_names",
                                        "skipped_steps",
                                        "global_steps",
                                        "global_samples",
                                        "dp_world_size",
                                        "mp_world_size",
                                        "checkpoint_parallel_dimensions",
                                        "ds_config",
                                        "ds_version",
                                        "universal_checkpoint_info",
                                        "num_experts",
                                        "ds_autoep_layers",
                                        "folding"};

Json client_state(const Fields& fields, const LoadOptions& options) {
  std::set<std::string> left_out = {"module"};
  if (!options.load_module_only) {
    left_out.insert({"skipped_steps", "global_steps", "dp_world_size", "mp_world_size",
                     "data_sampler", "random_ltd"});
  }
  if (options.load_lr_scheduler_states) left_out.insert("lr_scheduler");
  if (options.load_optimizer_states) left_out.insert("optimizer");
  if (options.clean_client_state) left_out = kOwnKeys;
  Json state = Json::object();
  for (const auto& [key, node] : fields.named(fields.root(), "the model file")) {
    if (left_out.count(key) == 0) state[key] = json_of(fields.pickle(), node);
  }
  return state;
}

void load_counters(const RankReader& reader, const LoadOptions& options, TrainingState* state) {
  const Fields& fields = reader.fields();
  TrainingCounters& counters = state->counters;
  counters.steps = reader.integer(fields.root(), "global_steps");
  counters.skipped_steps = reader.integer(fields.root(), "skipped_steps");
  const NodeId samples = reader.need(fields.root(), "global_samples");
  const checkpoint::Pickle& pickle = fields.pickle();
  counters.samples = pickle.kind(samples) == checkpoint::Kind::kFloat
                         ? static_cast<int64_t>(pickle.real_value(samples))
                         : pickle.integer_value(samples);
  counters.schedule_iteration = counters.steps - counters.skipped_steps - 1;
  const NodeId scheduler = fields.maybe(fields.root(), "lr_scheduler");
  if (scheduler != checkpoint::kNoNode && options.load_lr_scheduler_states) {
    counters.schedule_iteration = reader.integer(scheduler, "last_batch_iteration");
  }
}

}  // namespace

LoadResult load_rank(Storage& storage, const std::string& folder, const RankPlace& place,
                     const LoadOptions& options, TrainingState* state) {
  const std::string name =
      state->stage == 3 ? checkpoint::model_file_name_of_rank(place.zero_rank(), place.mp_rank())
                        : checkpoint::model_file_name(place.mp_rank());
  LoadResult result{.path = folder + "/" + name};
  RankReader model(storage, *result.path);
  const Fields& fields = model.fields();
  const int64_t ranks = model.integer(fields.root(), "dp_world_size");
  const int64_t mp_ranks = model.integer(fields.root(), "mp_world_size");
  const int64_t own = place.topology.zero_ranks();
  if ((state->stage > 0 && ranks != own) || mp_ranks != place.topology.tensor) {
    throw Error(ErrorInfo{
        .code = ErrorCode::kMismatch,
        .what = "The checkpoint was saved by another number of ranks (DeepSpeed: "
                "ZeRORuntimeException).",
        .file = *result.path,
        .expected = std::to_string(own) + " data- and sequence-parallel ranks, tensor-parallel " +
                    std::to_string(place.topology.tensor),
        .found = std::to_string(ranks) + ", tensor-parallel " + std::to_string(mp_ranks),
        .next = "isoshard reshard --to dp=…,sp=…,tp=…"});
  }
  if (!options.load_module_only) load_counters(model, options, state);
  if (state->stage == 0) {
    load_stage0(model, state);
  } else {
    const std::string prefix = state->dtype == DType::kBFloat16 ? "bf16_" : "";
    RankReader optimizer(
        storage,
        folder + "/" + checkpoint::optim_file_name(prefix, place.zero_rank(), place.mp_rank()));
    load_partitions(optimizer, place, state);
  }
  if (state->counters.optimizer_steps < 0) {  // the optimizer counts none
    state->counters.optimizer_steps = state->counters.steps - state->counters.skipped_steps;
  }
  result.client_state = client_state(fields, options);
  return result;
}

}  // namespace isoshard::engine
