// The model that is trained: a small transformer in the form and with the names of Hugging Face's
// Llama, Mixtral and Qwen2-MoE, and how each parameter is cut over tensor-parallel ranks,
// expert-parallel ranks and pipeline stages. No rank and no value yet, only layouts.
//
//   embedding → layers × (RMSNorm, attention, +, RMSNorm, MLP or experts, +) → RMSNorm → head
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/dtype.h"
#include "core/topology.h"

namespace isoshard::reference {

struct ModelConfig {
  uint64_t seed = 1;
  DType dtype = DType::kFloat32;  // of the parameters; float32, bfloat16 or float16
  int64_t vocabulary = 13;
  int64_t hidden = 8;
  int64_t heads = 4;
  int64_t kv_heads = 2;   // divides heads
  int64_t head_size = 2;  // even, for the rotation of positions
  int64_t intermediate = 12;
  int64_t layers = 2;
  bool tied = false;  // the head is the embedding
  bool causal = true;
  int64_t experts = 0;  // 0: a dense MLP in every layer
  int64_t top_k = 2;
  int64_t expert_intermediate = 6;
  bool shared_expert = false;
  // Every so many of the layers' matrices, one does not train (requires_grad is False); 0: all do.
  // 2 or more; not with experts.
  int64_t frozen = 0;
  double dropout = 0.0;  // on the outputs of attention and MLP
  double rope_theta = 10000.0;
  double norm_epsilon = 1e-6;
};

// Elements [begin, end) of an axis.
struct Span {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t size() const { return end - begin; }
  bool operator==(const Span&) const = default;
};

// Rank `rank`'s run of an axis that ranks share evenly; the remainder goes to the first.
Span even_share(int64_t total, int ranks, int rank);

enum class Split {
  kReplicated,
  kColumn,  // tensor-parallel ranks share axis 0
  kRow,     // tensor-parallel ranks share axis 1
  kExpert,  // expert-parallel ranks share axis 0
};

struct ParameterInfo {
  std::string name;
  Shape shape;  // of the whole
  Split split = Split::kReplicated;
  int layer = 0;       // number of the layer; −1: the embedding; layers: norm and head
  bool decays = true;  // weight decay; not for norms
  // A parameter that AutoEP makes in place of the model's own: it comes behind the others of its
  // optimizer group.
  bool appended = false;
  bool trains = true;  // false: frozen, no optimizer group has it
};

// In the module's order. A layer of experts is as AutoEP makes it: router, the stacks w1, w2, w3,
// and shared_experts.
std::vector<ParameterInfo> parameters_of(const ModelConfig& config);

// Layers [first, second) of a pipeline stage; the first has the embedding too, the last the head.
Span layers_of_stage(const ModelConfig& config, int stages, int stage);

// Whether a stage holds a parameter; a tied embedding is held by the first and the last.
bool held_by_stage(const ModelConfig& config, const ParameterInfo& info, int stages, int stage);

// The layers of the model as a PipelineModule: embedding, decoder layers, norm, head. A tied head
// is a TiedLayerSpec "embed" with a forward_fn, and has no file.
//
//   model.layers.2.mlp.up_proj.weight → 3.mlp.up_proj.weight
//   model.embed_tokens.weight         → 0.weight, or tied_modules.embed.weight
std::string pipeline_name(const ModelConfig& config, const ParameterInfo& info);
// The first of these layers on each stage, and their number.
std::vector<int> pipeline_parts(const ModelConfig& config, int stages);

// What a tensor- or expert-parallel rank has of the split axis (kReplicated: of axis 0, all).
// AutoTP's widths: heads stay whole, the remainder goes to the first ranks.
Span shard_of(const ModelConfig& config, const ParameterInfo& info, const Topology& topology,
              int tensor_rank, int expert_rank);

// The shape of that shard.
Shape shard_shape(const ParameterInfo& info, Span shard);

// The initial values of a parameter.
class InitialValues {
 public:
  // `info` outlives the object.
  InitialValues(const ModelConfig& config, const ParameterInfo& info);
  // Of an element of the whole, by its row-major number; not rounded to dtype.
  float at(int64_t element) const;

 private:
  const ParameterInfo& info_;
  uint64_t key_;
};

// Throws Error(kUsage) where the model cannot be trained so: what divides what, in numbers.
void check_model(const ModelConfig& config, const Topology& topology);

// Why neither form of DeepSpeed's Ulysses shares the heads among the sequence-parallel ranks; "":
// one does. UlyssesSPAttentionHF wants sp that divides the heads, and key-value heads of which one
// number divides the other; DistributedAttention at least sp key-value heads
// (deepspeed/sequence/layer.py, deepspeed/runtime/sequence_parallel/ulysses_sp.py, 0.19.8).
std::string sequence_unsupported(const ModelConfig& config, const Topology& topology);

}  // namespace isoshard::reference
