// A made-up training job: what its state is, before any rank or file. Values are a function of
// (seed, parameter, state, global index), so every element knows where it came from. Link 1 of the
// tensor's journey, for the properties.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/dtype.h"
#include "reference/reshard.h"
#include "reference/tensor_parallel.h"

namespace isoshard::properties {

struct ModelParameter {
  std::string name;
  Shape shape;
  int group = 0;       // of the optimizer; −1: frozen
  std::string alias;   // a second, tied name; empty: none
  bool zeros = false;  // mostly zero, long enough to be written as a hole
  // How tensor-parallel ranks share it; kParts: rows of the blocks.
  reference::Cut cut = reference::Cut::kWhole;
  std::vector<int64_t> parts = {};
  std::optional<Shape> whole = {};  // of part_of(): the shape on all ranks together
  std::vector<int> layers = {};     // of a pipeline: those that use it; several: it is tied
};

struct ModelBuffer {
  std::string name;
  DType dtype = DType::kFloat32;
  Shape shape;
};

// A tensor the optimizer keeps for each parameter; float32, bfloat16 or float16.
struct StateKind {
  std::string name;
  DType dtype = DType::kFloat32;
};

// A number the optimizer keeps; the group's number is added to it, so that groups differ.
struct ScalarKind {
  enum class Form { kTensor, kInt, kFloat, kNone };
  std::string name;
  Form form = Form::kTensor;
  int value = 3;
};

// One bit of one element, turned over: for the digest's laws.
struct Flip {
  enum class Where { kNowhere, kMaster, kState, kFrozen, kBuffer };
  Where where = Where::kNowhere;
  int tensor = 0;   // number of the parameter or buffer
  int state = 0;    // kState
  int64_t bit = 0;  // of the tensor's little-endian bytes, modulo their number
};

struct Model {
  uint64_t seed = 1;
  DType dtype = DType::kBFloat16;          // of the module: float32, bfloat16 or float16
  std::vector<ModelParameter> parameters;  // in the module's order; at least one is owned
  std::vector<ModelBuffer> buffers;        // the i-th stands behind the i-th parameter
  std::vector<StateKind> states;
  std::vector<ScalarKind> scalars;
  bool reversed = false;  // the optimizer lists each group backwards
  bool round_robin = false;
  bool aligned = false;         // zero_optimization.parameter_alignment
  bool bf16_optimizer = false;  // grad_accum_dtype fp32: its form at stage 1
  bool dynamic_scale = false;   // DynamicLossScaler
  bool client_state = false;
  int64_t sub_group_size = 1'000'000'000;
  int64_t heads = 0;  // key-value heads that tensor-parallel ranks keep whole; 0: none
  int64_t grain = 1;
  bool maps = true;               // the files record affine maps; false: lists of patterns alone
  int layers = 0;                 // of a PipelineModule; 0: it is none
  std::vector<int> experts = {};  // of each layer of experts, which are group 1 (and on)
  int64_t most = 0;               // elements of a rank's group of experts; 0: one group of all
  bool autoep = false;            // a layer's experts are stacked in w1, w2, w3; else native MoE
  bool data_first = false;        // use_data_before_expert_parallelism
  bool callers_splits = false;    // a pipeline whose caller names them at every number of ranks
  // Of part_of():
  int mp_rank = 0, tensor_rank = 0, tensor_ranks = 1;
  std::pair<int, int> stage = {0, 0};  // its layers [first, second)
  Flip flip;

  bool owned(size_t number) const {
    return parameters[number].group >= 0 && numel(parameters[number].shape) > 0;
  }
  // The optimizer owns elements of it, but none on this rank.
  bool elsewhere(size_t number) const {
    const ModelParameter& parameter = parameters[number];
    return parameter.group >= 0 && parameter.whole && numel(*parameter.whole) > 0 &&
           numel(parameter.shape) == 0;
  }
  bool stepped() const { return !states.empty() || !scalars.empty(); }
};

// One job: how many ranks share the state, and how.
struct Job {
  int data = 1;
  int sequence = 1;
  int stage = 1;
  int tensor = 1;
  int pipeline = 1;
  int expert = 1;
  int mp_ranks() const { return tensor * pipeline; }
  int ranks() const { return data * sequence; }
  bool operator==(const Job&) const = default;
};

std::ostream& operator<<(std::ostream& out, const Model& model);
std::ostream& operator<<(std::ostream& out, const Job& job);

// The rule by which a parameter is cut; DeepSpeed looks at its name.
reference::CutRule rule_of(const Model& model, size_t number);

// What one mp rank holds of the model, as a model of its own: stage · tensor + tensor-parallel
// rank.
Model part_of(const Model& model, const Job& job, int mp);
// What one tensor-parallel rank holds of all stages.
Model shard_of(const Model& model, int rank, int ranks);
// "mp_rank_03", as its files are named.
std::string mp_name(const Model& part);
// The file of a pipeline's layer on that rank.
std::string layer_name(const Model& shard, int layer);
// What that file holds: name in the layer, number of the parameter or, behind them, of the buffer.
struct LayerEntry {
  std::string name;
  size_t parameter = 0;
  bool buffer = false;
};
std::vector<LayerEntry> entries_of(const Model& model, int layer);

// PipelineModule.parts for that many stages, each of which holds a parameter of the optimizer.
std::vector<int> parts_of(const Model& model, int stages);
// Names of the buffers that the stage `part` holds.
std::vector<std::string> buffers_on(const Model& part);

// Numbers of the owned parameters of every group, in the optimizer's order; groups without any are
// left out, as the optimizer never sees them.
std::vector<std::vector<int>> optimizer_groups(const Model& model);
reference::GroupSizes group_sizes(const Model& model);

// BF16_Optimizer writes this stage.
bool uses_bf16_optimizer(const Model& model, int stage);
// The reference's rules for that job.
reference::Form form_of(const Model& model, const Job& job);

// Signalling NaN that stands in every padding element of a source and in no tensor.
uint32_t poison(DType dtype);

// float32 for the master (state −1).
DType state_dtype(const Model& model, int state);
// Bits of the master (state −1) or of optimizer state `state` of a parameter.
reference::Bits state_bits(const Model& model, int parameter, int state);
// The same for all groups, as the reference takes them.
reference::Groups whole_state(const Model& model, int state);

// Bytes of what the module holds under a parameter's name; of a buffer.
std::string module_bytes(const Model& model, size_t parameter);
std::string buffer_bytes(const Model& model, size_t buffer);

// Little-endian bytes of 16- or 32-bit elements.
std::string pack(const reference::Bits& bits, DType dtype);

// The value of a scalar for a group, as checkpoint::scalar_text prints it.
std::string scalar_value_text(const ScalarKind& scalar, int group);

}  // namespace isoshard::properties
