// What a checkpoint holds, in logical terms: parameters and their states, each a leaf whose
// elements lie in fragments of files. Readers make it; digest, diff, verify, convert and reshard
// use it.
#pragma once

#include <map>
#include <memory>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "checkpoint/format/torch_file.h"
#include "checkpoint/tensor_split.h"
#include "core/dtype.h"
#include "core/error.h"
#include "core/topology.h"

namespace isoshard::checkpoint {

// One file of the source. `torch` is set for torch.save files, `plain` for others.
struct SourceFile {
  std::string path;      // as opened
  std::string relative;  // inside the checkpoint's folder
  std::shared_ptr<TorchFile> torch;
  std::shared_ptr<ReadableFile> plain;
  bool inside = true;  // it lies in the checkpoint's folder
  const ReadableFile& bytes() const { return torch ? torch->file() : *plain; }
};

// A node of a source file's pickle.
struct NodeRef {
  int file = -1;
  NodeId node = kNoNode;
  bool present() const { return node != kNoNode; }
};

// Elements [begin, begin + count) of a leaf lie at byte `offset_bytes` of file `file`.
struct FileFragment {
  int64_t begin = 0;
  int64_t count = 0;
  int file = -1;
  int64_t offset_bytes = 0;
};

// One tensor of the state. Fragments cover every element exactly once, in order.
struct Leaf {
  std::string name;   // of the parameter or buffer
  std::string state;  // "fp32", "exp_avg", …; "param" for a copy in the model's dtype
  DType dtype = DType::kFloat32;
  Shape shape;
  bool requires_grad = false;
  std::vector<FileFragment> fragments;
  int padding = -1;  // leaf of the rows behind the last one, of a padded vocabulary; −1: none

  int64_t size_elements() const { return numel(shape); }
  int64_t size_bytes() const { return numel(shape) * item_size_bytes(dtype); }
};

// A state that is one number for a parameter, such as step.
struct Scalar {
  std::string name;
  NodeRef value;
};

struct ParameterState {
  std::string name;
  Shape shape;
  int group = -1;       // −1: frozen, the optimizer does not own it
  int sub_group = -1;   // stage 3: number of the flat buffer that holds it
  int weight = -1;      // leaf: the fp32 master, or the only copy there is
  int model_copy = -1;  // leaf "param": the copy in the model's dtype; −1 if not stored apart
  DType model_dtype = DType::kFloat32;
  int split = -1;           // ShardedState::splits; −1: no rank of another axis shares it
  std::vector<int> states;  // leaves; empty if the optimizer never stepped
  std::vector<Scalar> scalars;
};

struct BufferState {
  std::string name;
  int leaf = -1;
};

// A second name of a tied parameter. `model_copy` is a leaf if the alias has bytes of its own.
struct Alias {
  std::string name;
  std::string target;
  int model_copy = -1;
  bool recorded = true;  // in shared_params
};

struct GroupState {
  NodeRef hyper;                // the entry of param_groups
  std::vector<int> parameters;  // in the optimizer's order
  std::vector<int> flat_order;  // in the order of the saved flat buffers
};

// A PipelineModule's checkpoint, whose layers have files of their own.
struct PipelineState {
  std::vector<int> layer_files;  // of all stages; those of tensor-parallel rank 0 come first
  // By layer: what its file holds, as named there and as a parameter or buffer, in order.
  std::map<int, std::vector<std::pair<std::string, std::string>>> tensors;
  std::vector<std::vector<int>> held;                // by stage: parameters, in the groups' order
  std::vector<std::vector<std::string>> buffers;     // by stage, as recorded
  std::map<std::string, std::set<int>> tied_layers;  // by key: layers whose file holds it
  bool present() const { return !held.empty(); }
};

// How experts are named: as AutoEP's stacks, or one by one by a number among all of a layer.
enum class ExpertLayout { kNone, kAutoEp, kNative };

enum class Flavour { kZero0, kZero12, kBf16Optimizer, kZero3, kUniversal12, kUniversal3, kWeights };

// Printed: "ZeRO-3", "universal (ZeRO-1/2 form)", …
const char* name(Flavour flavour);

struct ShardedState {
  std::string folder;  // the tag folder, universal folder, or the fp32 file's folder
  std::string tag;
  Flavour flavour = Flavour::kWeights;
  int stage = -1;
  Topology topology;
  std::string topology_evidence;  // why sp is what it is, when it was inferred
  std::string version;            // ds_version
  bool round_robin = false;
  ExpertLayout expert_layout = ExpertLayout::kNone;
  bool stepped = false;  // some optimizer state exists

  std::vector<SourceFile> files;
  std::vector<Leaf> leaves;
  std::vector<ParameterState> parameters;
  std::vector<BufferState> buffers;
  std::vector<Alias> aliases;
  std::vector<GroupState> groups;
  PipelineState pipeline;
  std::vector<std::string> module_order;  // names of the module's state_dict, in order

  // By mp rank, then by rank of the partition group (one entry an mp rank at stages 0 to 2).
  std::vector<int> model_files;
  std::vector<int> optim_files;  // likewise; of a universal folder: optimizer_state.pt
  std::vector<TensorSplit> splits;
  int split_file = -1;  // model file whose universal_checkpoint_info the splits are from
  // Pairs of leaves that must agree: the second is the first cast to its dtype.
  std::vector<std::pair<int, int>> copies;
  std::vector<std::pair<int, int>>
      replicas;                       // likewise, on two ranks of one axis; `state` says which
  std::vector<int> witnesses;         // leaves that are read only so that their bytes are checked
  std::vector<int> own_client_state;  // model files whose client state differs from rank 0's
  std::vector<std::string> skipped;   // what a conversion leaves behind, and why
  std::vector<std::string> notices;   // odd, but harmless
  std::vector<std::string> doubts;    // makes the source SUSPECT; known without reading payloads
  std::vector<std::string> not_verified;  // what cannot be known from the files
  std::vector<std::string> inferred;      // "what: evidence"
  bool has_places = true;                 // leaves have their fragments
  bool partial = false;                   // select_names() has left something out
  bool model_files_only = false;          // the optimizer's files were not opened, if there are any

  const TorchFile& document(int file) const { return *files[static_cast<size_t>(file)].torch; }
  Leaf& leaf(int number) { return leaves[static_cast<size_t>(number)]; }
  const Leaf& leaf(int number) const { return leaves[static_cast<size_t>(number)]; }
  // Of a parameter that is cut over mp ranks, or was: its `split` is not −1.
  const TensorSplit& split_of(const ParameterState& parameter) const {
    return splits[static_cast<size_t>(parameter.split)];
  }
  // The leaf of a parameter's state "exp_avg"; −1 if it has none. Files of two ranks may list the
  // states in another order.
  int state_leaf(const ParameterState& parameter, const std::string& state) const;
  int add_leaf(Leaf leaf);
  // Puts parameter `number` behind the others of its group; nothing if it is frozen.
  void enlist(int number);
  // Throws an Error about the folder as a whole.
  [[noreturn]] void refuse(ErrorCode code, const std::string& what, const std::string& entry,
                           const std::string& expected, const std::string& found,
                           const std::string& next) const;
  void set_parameters(std::vector<ParameterState> list);  // replaces all of them
  // Not thread-safe while parameters are being added; read_checkpoint() leaves the index complete.
  const ParameterState* find_parameter(const std::string& name) const;

 private:
  mutable std::unordered_map<std::string, size_t> index_;  // of the first indexed_ parameters
  mutable size_t indexed_ = 0;
};

// Fragments of a tensor that lies in one file, whatever its strides.
std::vector<FileFragment> file_fragments(const TorchFile& document, int file,
                                         const TensorView& view);

// A leaf that is that tensor, as its file holds it.
Leaf file_leaf(const TorchFile& document, int file, const TensorView& view, const std::string& name,
               const std::string& state);

// Appends the fragments of elements [begin, begin + count) of a leaf, as elements from `at` on.
void append_fragments(const Leaf& leaf, int64_t begin, int64_t count, int64_t at,
                      std::vector<FileFragment>* result);

// Checks that the fragments of every leaf cover it exactly once, in order; throws CheckFailure.
void check_cover(const ShardedState& state);

}  // namespace isoshard::checkpoint
