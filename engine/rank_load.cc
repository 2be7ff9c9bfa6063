// See rank_load.h. Every record that is read is compared with its CRC.
#include "engine/rank_load.h"

#include <algorithm>
#include <set>

#include "checkpoint/deepspeed/fields.h"
#include "checkpoint/deepspeed/hyper.h"
#include "checkpoint/deepspeed/names.h"
#include "checkpoint/format/crc.h"
#include "core/cast.h"
#include "core/error.h"
#include "core/zero_rules.h"

namespace isoshard::engine {
namespace {

using checkpoint::Fields;
using checkpoint::NodeId;
using checkpoint::TensorView;
using checkpoint::TorchFile;

// Values of the pickle that JSON has; others are their kind's name in angle brackets. Shared values
// are written out each time, so that a small pickle can mean a great deal: `left` says how many
// values there may be.
Json json_of(const checkpoint::Pickle& pickle, NodeId node, int depth, int64_t* left) {
  using checkpoint::Kind;
  if (--*left < 0 || depth > 64) {
    throw Error(ErrorInfo{.code = ErrorCode::kLimit,
                          .what = "The client state is too large or nested too deep.",
                          .expected = "up to 100000 values, 64 levels deep"});
  }
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
      for (const NodeId item : pickle.items(node)) {
        list.push_back(json_of(pickle, item, depth + 1, left));
      }
      return list;
    }
    case Kind::kDict: {
      Json object = Json::object();
      const std::vector<NodeId>& entries = pickle.items(node);
      for (size_t i = 0; i + 1 < entries.size(); i += 2) {
        const Json key = json_of(pickle, entries[i], depth + 1, left);
        object[key.is_string() ? key.get<std::string>() : key.dump()] =
            json_of(pickle, entries[i + 1], depth + 1, left);
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
    if (!is_floating(view.dtype) || !can_cast(view.dtype, DType::kFloat32)) {
      fields_.fail("A tensor of the checkpoint has a dtype that no state has.", what,
                   "float32, bfloat16 or float16", isoshard::name(view.dtype));
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

// Key, value, key, value, … of a dict.
const std::vector<NodeId>& entries_of(const Fields& fields, NodeId node, const std::string& what) {
  if (fields.pickle().kind(node) == checkpoint::Kind::kDict) return fields.pickle().items(node);
  fields.fail("An entry of the checkpoint is no dict.", what, "a dict",
              checkpoint::name(fields.pickle().kind(node)));
}

NodeId item_of(const Fields& fields, NodeId list, size_t number, const std::string& what) {
  const std::vector<NodeId>& items = fields.list(list, what);
  if (number < items.size()) return items[number];
  fields.fail("A list of the checkpoint is too short.", what,
              "an item for each of this run's groups and parameters",
              std::to_string(items.size()) + " items");
}

void clear_states(TrainingState* state) {
  for (TrainedGroup& group : state->groups) {
    for (auto& [name, values] : group.states) std::fill(values.begin(), values.end(), 0.0f);
  }
}

// state[number] of an optimizer: its tensors. An optimizer that has never stepped has none.
void load_states(RankReader& reader, NodeId states, int64_t number, int64_t count, int64_t at,
                 TrainedGroup* group) {
  const Fields& fields = reader.fields();
  const std::vector<NodeId>& entries = entries_of(fields, states, "state");
  for (size_t i = 0; i + 1 < entries.size(); i += 2) {
    if (fields.integer(entries[i], "a key of state") != number) continue;
    for (auto& [name, values] : group->states) {
      const std::vector<float> found =
          reader.values(reader.need(entries[i + 1], name), count, "state " + name);
      std::copy(found.begin(), found.end(), values.begin() + at);
    }
    return;
  }
  if (entries.empty()) return;
  fields.fail("The optimizer has no state for a part of the model.", "state",
              "an entry " + std::to_string(number), "none");
}

void load_scale(const Fields& fields, NodeId scaler, LossScale* scale) {
  const NodeId state = fields.state_of(scaler);
  const checkpoint::Pickle& pickle = fields.pickle();
  const auto number = [&](const std::string& key, double other) {
    const NodeId node = fields.maybe(state, key);
    if (node == checkpoint::kNoNode) return other;
    if (pickle.kind(node) == checkpoint::Kind::kFloat) return pickle.real_value(node);
    return static_cast<double>(fields.integer(node, key));
  };
  const auto whole = [&](const std::string& key, int64_t other) {
    const NodeId node = fields.maybe(state, key);
    return node == checkpoint::kNoNode ? other : fields.integer(node, key);
  };
  scale->scale = number("cur_scale", scale->scale);
  scale->dynamic = fields.truth(state, "dynamic");
  scale->iteration = whole("cur_iter", 0);
  scale->last_overflow = whole("last_overflow_iter", -1);
  scale->hysteresis_left = whole("cur_hysteresis", scale->hysteresis);
}

// Steps that the optimizer has taken, as its first state says; 0: it has none; −1: it counts none.
int64_t optimizer_steps(RankReader& reader, NodeId states) {
  const std::vector<NodeId>& entries = entries_of(reader.fields(), states, "state");
  if (entries.size() < 2) return 0;
  const NodeId step = reader.fields().maybe(entries[1], "step");
  if (step == checkpoint::kNoNode) return -1;
  const float steps = reader.values(step, 1, "step")[0];
  if (!(steps >= 0 && steps < 1e9f)) {
    reader.fields().fail("The optimizer's count of steps is none.", "step", "a number of steps",
                         std::to_string(steps));
  }
  return static_cast<int64_t>(steps);
}

// What the file's param_groups say of the settings that this run's have, such as lr.
void load_settings(const Fields& fields, NodeId groups, TrainingState* state) {
  const checkpoint::Pickle& pickle = fields.pickle();
  for (size_t g = 0; g < state->groups.size(); ++g) {
    const NodeId entry = item_of(fields, groups, g, "param_groups");
    for (auto& [key, setting] : state->groups[g].settings) {
      const NodeId found = fields.maybe(entry, key);
      if (found == checkpoint::kNoNode || !std::holds_alternative<double>(setting)) continue;
      if (pickle.kind(found) == checkpoint::Kind::kFloat) setting = pickle.real_value(found);
    }
  }
}

void load_partitions(RankReader& reader, const RankPlace& place, bool with_states,
                     TrainingState* state) {
  const Fields& fields = reader.fields();
  const bool stage3 = state->stage == 3;
  const NodeId saved = reader.need(fields.root(), "optimizer_state_dict");
  const NodeId masters =
      reader.need(saved, stage3 ? "fp32_flat_groups" : "single_partition_of_fp32_groups");
  const NodeId optimizer =
      reader.need(saved, stage3 ? "optimizer_state_dict" : "base_optimizer_state");
  const size_t groups = fields.list(masters, "masters").size();
  if (groups != state->groups.size()) {
    fields.fail("The optimizer has another number of groups.", "masters",
                std::to_string(state->groups.size()), std::to_string(groups));
  }
  clear_states(state);
  for (size_t g = 0; g < state->groups.size(); ++g) {
    TrainedGroup& group = state->groups[g];
    int64_t total = 0;
    for (const int number : group.parameters) {
      total += numel(state->parameters[static_cast<size_t>(number)].shape);
    }
    int64_t length = group.buffer_size;
    if (!stage3) length -= partition_padding(total, group.buffer_size, place.zero_rank());
    const std::vector<float> master = reader.values(item_of(fields, masters, g, "masters"), length,
                                                    "master of group " + std::to_string(g));
    std::fill(group.master.begin(), group.master.end(), 0.0f);
    std::copy(master.begin(), master.end(), group.master.begin());
    if (with_states) {
      load_states(reader, reader.need(optimizer, "state"), static_cast<int64_t>(g),
                  group.buffer_size, 0, &group);
    }
  }
  if (!with_states) return;
  load_settings(fields, reader.need(optimizer, "param_groups"), state);
  state->counters.optimizer_steps = optimizer_steps(reader, reader.need(optimizer, "state"));
  load_scale(fields, reader.need(saved, "loss_scaler"), &state->loss_scale);
}

void load_stage0(RankReader& reader, TrainingState* state) {
  const Fields& fields = reader.fields();
  NodeId optimizer = reader.need(fields.root(), "optimizer");
  NodeId masters = checkpoint::kNoNode;
  if (const NodeId inner = fields.maybe(optimizer, "optimizer_state_dict");
      inner != checkpoint::kNoNode) {
    masters = reader.need(optimizer, "fp32_groups");
    optimizer = inner;
  }
  const NodeId states = reader.need(optimizer, "state");
  const NodeId module = reader.need(fields.root(), "module");
  clear_states(state);
  int64_t number = 0;
  for (size_t g = 0; g < state->groups.size(); ++g) {
    TrainedGroup& group = state->groups[g];
    for (size_t k = 0; k < group.pieces.size(); ++k) {
      const BufferPiece& piece = group.pieces[k];
      const TrainedParameter& p = state->parameters[static_cast<size_t>(piece.parameter)];
      const NodeId master =
          masters == checkpoint::kNoNode
              ? reader.need(module, p.name)
              : item_of(fields, item_of(fields, masters, g, "fp32_groups"), k, "fp32_groups");
      const std::vector<float> values = reader.values(master, piece.count, p.name);
      std::copy(values.begin(), values.end(), group.master.begin() + piece.at);
      load_states(reader, states, number++, piece.count, piece.at, &group);
    }
  }
  load_settings(fields, reader.need(optimizer, "param_groups"), state);
  state->counters.optimizer_steps = optimizer_steps(reader, states);
}

// The weights alone, of stages 0 to 2: masters are the module's tensors, and the optimizer is as it
// was made.
void load_module(RankReader& reader, TrainingState* state) {
  const NodeId module = reader.need(reader.fields().root(), "module");
  for (TrainedGroup& group : state->groups) {
    for (const BufferPiece& piece : group.pieces) {
      const TrainedParameter& p = state->parameters[static_cast<size_t>(piece.parameter)];
      const std::vector<float> values =
          reader.values(reader.need(module, p.name), numel(p.shape), p.name);
      std::copy_n(values.begin() + piece.begin, piece.count, group.master.begin() + piece.at);
    }
  }
  clear_states(state);
  state->counters.optimizer_steps = 0;
}

// Masters rounded to the parameters' dtype, which is what a load of weights leaves.
void round_masters(TrainingState* state) {
  for (TrainedGroup& group : state->groups) {
    for (float& value : group.master) value = rounded_to(state->dtype, value);
  }
  state->counters.optimizer_steps = 0;
}

// Stages 1 to 3: names and shapes of the optimizer's parameters, in its order. Stage 0: the
// module's.
void check_model(RankReader& reader, const TrainingState& state) {
  const Fields& fields = reader.fields();
  const auto refuse = [&](const std::string& entry, const std::string& expected,
                          const std::string& found) {
    throw Error(ErrorInfo{.code = ErrorCode::kMismatch,
                          .what = "The checkpoint is of another model (DeepSpeed: RuntimeError, "
                                  "\"Error(s) in loading state_dict\").",
                          .file = fields.document().path(),
                          .entry = quote(entry),
                          .expected = expected,
                          .found = found,
                          .next = "name the checkpoint of this model"});
  };
  if (state.stage == 0) {
    const NodeId module = reader.need(fields.root(), "module");
    for (const TrainedParameter& p : state.parameters) {
      const Shape found = fields.tensor(reader.need(module, p.name), p.name).shape;
      if (found != p.shape) refuse(p.name, to_string(p.shape), to_string(found));
    }
    return;
  }
  const NodeId shapes = reader.need(fields.root(), "param_shapes");
  for (size_t g = 0; g < state.groups.size(); ++g) {
    const auto found = fields.named(item_of(fields, shapes, g, "param_shapes"), "param_shapes");
    size_t at = 0;
    for (const int number : state.groups[g].parameters) {
      const TrainedParameter& p = state.parameters[static_cast<size_t>(number)];
      if (numel(p.shape) == 0) continue;
      if (at == found.size()) refuse(p.name, to_string(p.shape), "nothing");
      const auto& [name, node] = found[at++];
      if (name != p.name)
        refuse(p.name, "in this place of group " + std::to_string(g), quote(name));
      const Shape shape = fields.shape(node, name);
      if (shape != p.shape) refuse(p.name, to_string(p.shape), to_string(shape));
    }
    if (at < found.size()) refuse(found[at].first, "no further parameter", "one");
  }
}

Json client_state(const Fields& fields, const LoadOptions& options) {
  std::set<std::string> left_out = {"module"};
  if (!options.load_module_only) {
    left_out.insert({"skipped_steps", "global_steps", "dp_world_size", "mp_world_size",
                     "data_sampler", "random_ltd"});
  }
  if (options.load_lr_scheduler_states) left_out.insert("lr_scheduler");
  if (options.load_optimizer_states) left_out.insert("optimizer");
  Json state = Json::object();
  int64_t left = 100'000;
  const std::vector<NodeId>& entries = entries_of(fields, fields.root(), "the model file");
  for (size_t i = 0; i + 1 < entries.size(); i += 2) {
    const std::string key = fields.text(entries[i], "a key of the model file");
    const bool left_behind =
        options.clean_client_state ? checkpoint::is_engine_key(key) : left_out.count(key) != 0;
    if (!left_behind) {
      state[key] = json_of(fields.pickle(), entries[i + 1], 0, &left);
    }
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
  if (pickle.kind(samples) == checkpoint::Kind::kFloat) {  // of Ulysses
    const double number = pickle.real_value(samples);
    if (!(number >= 0 && number < 0x1p53)) {
      fields.fail("global_samples is no number of samples.", "global_samples", "0 or more",
                  std::to_string(number));
    }
    counters.samples = static_cast<int64_t>(number);
  } else {
    counters.samples = fields.integer(samples, "global_samples");
  }
  if (!options.load_lr_scheduler_states) return;
  counters.schedule_iteration = counters.steps - counters.skipped_steps - 1;
  const NodeId scheduler = fields.maybe(fields.root(), "lr_scheduler");
  if (scheduler != checkpoint::kNoNode) {
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
  const bool with_states = options.load_optimizer_states && !options.load_module_only;
  const bool partitioned = state->stage == 3 || (state->stage > 0 && with_states);
  if ((partitioned && ranks != own) || mp_ranks != place.topology.tensor) {
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
  check_model(model, *state);
  if (!options.load_module_only) load_counters(model, options, state);
  if (state->stage == 0 && with_states) {
    load_stage0(model, state);
  } else if (state->stage < 3 && !with_states) {
    load_module(model, state);
  } else {
    const std::string prefix = state->dtype == DType::kBFloat16 ? "bf16_" : "";
    RankReader optimizer(
        storage,
        folder + "/" + checkpoint::optim_file_name(prefix, place.zero_rank(), place.mp_rank()));
    load_partitions(optimizer, place, with_states, state);
    if (!with_states) round_masters(state);
  }
  if (state->counters.optimizer_steps < 0) {  // the optimizer counts none
    state->counters.optimizer_steps = state->counters.steps - state->counters.skipped_steps;
  }
  result.client_state = client_state(fields, options);
  return result;
}

}  // namespace isoshard::engine
