// See universal_load.h.
#include "engine/universal_load.h"

#include <algorithm>
#include <set>
#include <span>

#include "checkpoint/deepspeed/names.h"
#include "checkpoint/deepspeed/reader.h"
#include "core/cast.h"
#include "core/error.h"
#include "engine/rank_fields.h"
#include "engine/rank_reader.h"
#include "reshard/tensor_values.h"

namespace isoshard::engine {
namespace {

using checkpoint::ParameterState;
using checkpoint::ShardedState;

// Elements [begin, begin + count) of the rank's shard, from the values of the whole.
void copy_shard(const TrainedParameter& p, std::span<const float> whole, int64_t begin,
                std::span<float> target) {
  std::vector<int64_t> at(p.shape.size());  // the element's index, by axis
  int64_t rest = begin;
  for (size_t axis = p.shape.size(); axis-- > 0;) {
    at[axis] = rest % p.shape[axis];
    rest /= p.shape[axis];
  }
  for (float& value : target) {
    int64_t place = 0;
    for (size_t axis = 0; axis < at.size(); ++axis) {
      const bool cut = static_cast<int>(axis) == p.split_axis;
      place = place * p.whole[axis] + at[axis] + (cut ? p.split_begin : 0);
    }
    value = whole[static_cast<size_t>(place)];
    for (size_t axis = at.size(); axis-- > 0;) {
      if (++at[axis] < p.shape[axis]) break;
      at[axis] = 0;
    }
  }
}

class UniversalReader {
 public:
  UniversalReader(Storage& storage, const std::string& folder)
      : source_(checkpoint::read_checkpoint(storage, folder, {.workers = 1})) {
    using checkpoint::Flavour;
    if (source_.flavour == Flavour::kUniversal12 || source_.flavour == Flavour::kUniversal3) return;
    throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                          .what = "This is no universal folder (DeepSpeed: ValueError, \"Invalid "
                                  "for universal checkpoint\").",
                          .file = folder,
                          .expected = "what isoshard convert --to universal writes",
                          .found = checkpoint::name(source_.flavour)});
  }

  void fill(TrainedGroup* group, const TrainingState& state, bool with_states) {
    for (auto& [name, values] : group->states) std::ranges::fill(values, 0.0f);
    for (const BufferPiece& piece : group->pieces) {
      if (piece.count == 0) continue;
      const TrainedParameter& p = state.parameters[static_cast<size_t>(piece.parameter)];
      const ParameterState& found = find(p);
      take(p, found.weight, piece, &group->master);
      for (auto& [name, values] : group->states) {
        if (!with_states || !source_.stepped) continue;
        const int leaf = source_.state_leaf(found, name);
        if (leaf < 0) refuse(p, name, "nothing");
        take(p, leaf, piece, &values);
      }
      if (steps_ < 0 && with_states) steps_ = steps_of(found);
    }
  }

  // A frozen parameter, which the form has where it was made of stages 0 to 2 or holds the ranks'
  // model files; DeepSpeed leaves it as it is (docs/deepspeed_errata.md).
  void fill_frozen(TrainedParameter* p) {
    const ParameterState* found = source_.find_parameter(p->module_name);
    if (found == nullptr || found->weight < 0) return;
    if (found->shape != p->whole) refuse(*p, "", to_string(found->shape));
    const int64_t count = static_cast<int64_t>(p->values.size());
    take(*p, found->weight, {.begin = p->values_begin, .count = count}, &p->values);
  }

  // That the optimizer has taken, of the first parameter; −1 where it counts none.
  int64_t steps() const { return steps_; }
  const std::string& folder() const { return source_.folder; }

 private:
  [[noreturn]] void refuse(const TrainedParameter& p, const std::string& what,
                           const std::string& found) const {
    throw Error(ErrorInfo{.code = ErrorCode::kMismatch,
                          .what = "The universal folder does not hold this run's model.",
                          .file = source_.folder,
                          .entry = quote(p.module_name) + " " + what,
                          .expected = to_string(p.whole),
                          .found = found,
                          .next = "name the checkpoint of this model"});
  }

  const ParameterState& find(const TrainedParameter& p) const {
    const ParameterState* found = source_.find_parameter(p.module_name);
    if (found == nullptr) refuse(p, "", "nothing");
    if (found->shape != p.whole) refuse(p, "", to_string(found->shape));
    return *found;
  }

  int64_t steps_of(const ParameterState& parameter) const {
    for (const checkpoint::Scalar& scalar : parameter.scalars) {
      if (scalar.name != "step") continue;
      const std::string text = checkpoint::scalar_text(source_, scalar.value);
      const bool digits = !text.empty() && text.find_first_not_of("0123456789") == text.npos;
      if (digits && text.size() <= 9) return std::stoll(text);
      throw Error(ErrorInfo{.code = ErrorCode::kCorrupt,
                            .what = "The optimizer's count of steps is none.",
                            .file = source_.folder,
                            .entry = quote(parameter.name) + " step",
                            .expected = "a number of steps",
                            .found = text,
                            .next = "take another checkpoint"});
    }
    return -1;
  }

  // Every record of a file that is read is compared with its CRC, once.
  void check_files(const checkpoint::Leaf& leaf) {
    for (const checkpoint::FileFragment& fragment : leaf.fragments) {
      if (!checked_.insert(fragment.file).second) continue;
      const checkpoint::TorchFile& file = source_.document(fragment.file);
      for (const checkpoint::ZipRecord& record : file.zip().records) check_record(file, record);
    }
  }

  void take(const TrainedParameter& p, int number, const BufferPiece& piece,
            std::vector<float>* target) {
    if (number != read_) {
      const checkpoint::Leaf& leaf = source_.leaf(number);
      if (!is_floating(leaf.dtype) || !can_cast(leaf.dtype, DType::kFloat32)) {
        refuse(p, leaf.state, isoshard::name(leaf.dtype));
      }
      if (leaf.size_elements() != numel(p.whole)) refuse(p, leaf.state, to_string(leaf.shape));
      check_files(leaf);
      std::vector<std::byte> bytes(static_cast<size_t>(leaf.size_bytes()));
      if (!bytes.empty()) reshard::read_elements(source_, leaf, 0, bytes);
      values_.resize(static_cast<size_t>(leaf.size_elements()));
      cast(leaf.dtype, bytes, DType::kFloat32, std::as_writable_bytes(std::span(values_)));
      read_ = number;
    }
    copy_shard(p, values_, piece.begin,
               std::span(*target).subspan(static_cast<size_t>(piece.at),
                                          static_cast<size_t>(piece.count)));
  }

  ShardedState source_;
  int read_ = -1;  // the leaf whose values these are
  std::vector<float> values_;
  std::set<int> checked_;  // files
  int64_t steps_ = -1;
};

}  // namespace

LoadResult load_universal(Storage& storage, const std::string& folder, const LoadOptions& options,
                          TrainingState* state) {
  const bool with_states = options.load_optimizer_states && !options.load_module_only;
  UniversalReader source(storage, folder);
  for (TrainedGroup& group : state->groups) source.fill(&group, *state, with_states);
  for (TrainedParameter& p : state->parameters) {
    if (p.frozen()) source.fill_frozen(&p);
  }
  std::string name = checkpoint::model_file_name(0);
  if (!storage.is_file(source.folder() + "/" + name)) {
    name = checkpoint::model_file_name_of_rank(0, 0);
  }
  LoadResult result{.path = source.folder() + "/" + name};
  RankReader model(storage, *result.path);
  if (!options.load_module_only) load_counters(model, options, state);
  state->counters.optimizer_steps = 0;
  if (with_states) {
    RankReader optimizer(storage, source.folder() + "/zero/optimizer_state.pt");
    const checkpoint::Fields& fields = optimizer.fields();
    const checkpoint::NodeId scaler = fields.maybe(fields.root(), "loss_scaler");
    if (scaler != checkpoint::kNoNode) load_scale(fields, scaler, &state->loss_scale);
    const checkpoint::NodeId groups = fields.maybe(fields.root(), "param_groups");
    if (groups != checkpoint::kNoNode) load_settings(fields, groups, state);
    // An optimizer that counts its steps says so with each parameter.
    state->counters.optimizer_steps =
        source.steps() < 0 ? state->counters.steps - state->counters.skipped_steps : source.steps();
  } else {
    for (TrainedGroup& group : state->groups) {
      for (float& value : group.master) value = rounded_to(state->dtype, value);
    }
  }
  result.client_state = client_state(model.fields(), options);
  return result;
}

}  // namespace isoshard::engine
