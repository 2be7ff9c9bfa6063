// What one rank of a training run holds: its parts of the parameters, of the fp32 masters and of
// the optimizer's states, and the counters. Training changes it, a save writes it, a load fills it.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "core/dtype.h"

namespace isoshard {

// Elements [begin, begin + count) of a parameter stand at `at` of a buffer.
struct BufferPiece {
  int parameter = 0;  // number in TrainingState::parameters
  int64_t begin = 0;
  int64_t count = 0;
  int64_t at = 0;
  bool operator==(const BufferPiece&) const = default;
};

struct TrainedParameter {
  std::string name;
  // Its name in the module that is saved: `name`, but for a PipelineModule, which counts layers:
  // "3.mlp.up_proj.weight".
  std::string module_name = {};
  Shape shape;              // of this rank's tensor- or expert-parallel shard
  Shape whole;              // of all ranks together
  int split_axis = -1;      // −1: the shard is the whole
  int64_t split_begin = 0;  // where it begins on that axis
  // Of all tensor-parallel ranks on that axis; empty where they hold the same.
  std::vector<int64_t> split_widths = {};
  bool expert = false;
  int group = 0;  // number in TrainingState::groups; −1: frozen
  // Values as they are used, rounded to dtype; empty at stage 3, where they are gathered on use. Of
  // a frozen one, which has no master, they are this rank's slot there (frozen_slot()).
  std::vector<float> values;
  int64_t values_begin = 0;  // which element of the shard the first of them is

  bool frozen() const { return group < 0; }
};

// A setting of the optimizer, as torch keeps it in param_groups.
using Setting =
    std::variant<std::monostate, bool, int64_t, double, std::vector<double>, std::string>;

// One parameter group of the optimizer, and this rank's buffer of it.
struct TrainedGroup {
  std::vector<std::pair<std::string, Setting>> settings;  // without "params", in torch's order
  double weight_decay = 0.0;
  bool expert = false;
  std::vector<int> parameters;      // in the optimizer's order
  std::vector<BufferPiece> pieces;  // what this rank's buffer holds
  int64_t buffer_size = 0;          // elements, padding included
  std::vector<float> master;
  std::vector<std::pair<std::string, std::vector<float>>> states;
};

struct TrainingCounters {
  int64_t steps = 0;  // global_steps, skipped ones included
  int64_t skipped_steps = 0;
  int64_t optimizer_steps = 0;
  int64_t samples = 0;              // consumed so far: the position in the data
  int64_t schedule_iteration = -1;  // last_batch_iteration of the learning rate's schedule
  bool operator==(const TrainingCounters&) const = default;
};

// deepspeed/runtime/fp16/loss_scaler.py: DynamicLossScaler, or LossScaler where it is not dynamic.
struct LossScale {
  bool dynamic = false;
  double scale = 1.0;
  int64_t window = 1000;  // good steps before the scale is doubled
  double least = 1.0;
  int64_t hysteresis = 2;  // overflows that are borne before it is halved
  int64_t hysteresis_left = 2;
  int64_t iteration = 0;
  int64_t last_overflow = -1;
  bool operator==(const LossScale&) const = default;
};

struct TrainingState {
  DType dtype = DType::kFloat32;
  int stage = 0;
  bool pipeline_module = false;  // the model is a PipelineModule, of one stage or more
  std::vector<TrainedParameter> parameters;
  std::vector<TrainedGroup> groups;
  TrainingCounters counters;
  LossScale loss_scale;
  bool counts_steps = false;  // the optimizer keeps "step" for every group
  bool scheduled = false;     // there is a schedule of learning rates
  double clip = 0.0;          // gradient_clipping
  // Fixed-point sums of gradients: by tensor, the largest summand of the last step. Saved as client
  // state, "isoshard_fixed_exponents".
  std::vector<std::pair<std::string, float>> fixed_largest;
  std::vector<std::pair<std::string, std::string>> aliases;  // second name, name: tied parameters
};

}  // namespace isoshard
