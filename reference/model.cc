// See model.h. Names: transformers/models/llama, mixtral and qwen2_moe; stacks:
// deepspeed/module_inject/auto_ep.
#include "reference/model.h"

#include <algorithm>
#include <cmath>

#include "core/check.h"
#include "core/error.h"
#include "core/random.h"
#include "core/split_rules.h"

namespace isoshard::reference {
namespace {

void add_dense_mlp(const std::string& at, int64_t hidden, int64_t width, int layer,
                   std::vector<ParameterInfo>* list) {
  list->push_back({at + "gate_proj.weight", {width, hidden}, Split::kColumn, layer});
  list->push_back({at + "up_proj.weight", {width, hidden}, Split::kColumn, layer});
  list->push_back({at + "down_proj.weight", {hidden, width}, Split::kRow, layer});
}

uint64_t name_key(const std::string& name) {
  uint64_t word = name.size();
  for (const char c : name) word = mix(word ^ static_cast<unsigned char>(c));
  return word;
}

// "model.layers.0.mlp.up_proj.weight" without its last component.
std::string module_of(const std::string& name) { return name.substr(0, name.rfind('.')); }

}  // namespace

std::vector<ParameterInfo> parameters_of(const ModelConfig& c) {
  std::vector<ParameterInfo> list;
  list.push_back({"model.embed_tokens.weight", {c.vocabulary, c.hidden}, Split::kReplicated, -1});
  for (int layer = 0; layer < c.layers; ++layer) {
    const std::string at = "model.layers." + std::to_string(layer) + ".";
    const int64_t q = c.heads * c.head_size, kv = c.kv_heads * c.head_size;
    list.push_back({at + "self_attn.q_proj.weight", {q, c.hidden}, Split::kColumn, layer});
    list.push_back({at + "self_attn.k_proj.weight", {kv, c.hidden}, Split::kColumn, layer});
    list.push_back({at + "self_attn.v_proj.weight", {kv, c.hidden}, Split::kColumn, layer});
    list.push_back({at + "self_attn.o_proj.weight", {c.hidden, q}, Split::kRow, layer});
    if (c.experts == 0) {
      add_dense_mlp(at + "mlp.", c.hidden, c.intermediate, layer, &list);
    } else {
      const int64_t e = c.experts, f = c.expert_intermediate;
      list.push_back({.name = at + "mlp.router.gate.weight",
                      .shape = {e, c.hidden},
                      .layer = layer,
                      .appended = true});
      list.push_back({at + "mlp.experts.w1", {e, f, c.hidden}, Split::kExpert, layer});
      list.push_back({at + "mlp.experts.w2", {e, c.hidden, f}, Split::kExpert, layer});
      list.push_back({at + "mlp.experts.w3", {e, f, c.hidden}, Split::kExpert, layer});
      if (c.shared_expert)
        add_dense_mlp(at + "mlp.shared_experts.", c.hidden, c.intermediate, layer, &list);
    }
    for (const char* norm : {"input_layernorm.weight", "post_attention_layernorm.weight"}) {
      list.push_back({at + norm, {c.hidden}, Split::kReplicated, layer, false});
    }
  }
  int64_t matrices = 0;
  for (ParameterInfo& info : list) {
    if (c.frozen > 0 && info.layer >= 0 && info.decays) info.trains = ++matrices % c.frozen != 0;
  }
  const int last = static_cast<int>(c.layers);
  list.push_back({"model.norm.weight", {c.hidden}, Split::kReplicated, last, false});
  if (!c.tied) list.push_back({"lm_head.weight", {c.vocabulary, c.hidden}, Split::kColumn, last});
  return list;
}

Span even_share(int64_t total, int ranks, int rank) {
  const int64_t base = total / ranks, rest = total % ranks;
  const int64_t begin = rank * base + std::min<int64_t>(rank, rest);
  return {begin, begin + base + (rank < rest ? 1 : 0)};
}

Span layers_of_stage(const ModelConfig& config, int stages, int stage) {
  return even_share(config.layers, stages, stage);
}

bool held_by_stage(const ModelConfig& config, const ParameterInfo& info, int stages, int stage) {
  const bool first = stage == 0, last = stage == stages - 1;
  if (info.layer < 0) return first || (config.tied && last);
  if (info.layer == config.layers) return last;
  const Span layers = layers_of_stage(config, stages, stage);
  return info.layer >= layers.begin && info.layer < layers.end;
}

std::string pipeline_name(const ModelConfig& config, const ParameterInfo& info) {
  const std::string local = info.name.substr(info.name.rfind('.') + 1);
  if (info.layer < 0) return (config.tied ? "tied_modules.embed." : "0.") + local;
  if (info.layer < config.layers) {
    const std::string at = "model.layers." + std::to_string(info.layer) + ".";
    return std::to_string(info.layer + 1) + "." + info.name.substr(at.size());
  }
  const bool head = info.name.starts_with("lm_head.");
  return std::to_string(config.layers + (head ? 2 : 1)) + "." + local;
}

std::vector<int> pipeline_parts(const ModelConfig& config, int stages) {
  std::vector<int> parts = {0};
  for (int stage = 0; stage + 1 < stages; ++stage) {
    parts.push_back(1 + static_cast<int>(layers_of_stage(config, stages, stage).end));
  }
  parts.push_back(static_cast<int>(config.layers) + 3);
  return parts;
}

Span shard_of(const ModelConfig& config, const ParameterInfo& info, const Topology& topology,
              int tensor_rank, int expert_rank) {
  if (info.split == Split::kReplicated) return {0, info.shape[0]};
  if (info.split == Split::kExpert) {
    const int64_t each = info.shape[0] / topology.expert;
    return {expert_rank * each, (expert_rank + 1) * each};
  }
  const int64_t total = info.shape[info.split == Split::kColumn ? 0 : 1];
  if (topology.tensor == 1) return {0, total};
  const RemainderFirst rule{.kv_heads = config.kv_heads};
  const std::vector<int64_t> widths =
      split_widths(rule, total, topology.tensor, module_of(info.name));
  Span span;
  for (int rank = 0; rank <= tensor_rank; ++rank) {
    span.begin = span.end;
    span.end += widths[static_cast<size_t>(rank)];
  }
  return span;
}

Shape shard_shape(const ParameterInfo& info, Span shard) {
  Shape shape = info.shape;
  if (info.split != Split::kReplicated) shape[info.split == Split::kRow ? 1 : 0] = shard.size();
  return shape;
}

InitialValues::InitialValues(const ModelConfig& config, const ParameterInfo& info)
    : info_(info), key_(mix(mix(config.seed) ^ name_key(info.name))) {}

float InitialValues::at(int64_t element) const {
  const ParameterInfo& info = info_;
  const uint64_t word = mix(key_ ^ static_cast<uint64_t>(element));
  // 24 bits in [−1, 1).
  const float unit = static_cast<float>(static_cast<int64_t>(word >> 40) - (1 << 23)) * 0x1p-23f;
  if (info.shape.size() == 1) return 1.0f + 0.125f * unit;
  const float fan_in = static_cast<float>(info.shape.back());
  return unit * (1.5f / std::sqrt(fan_in));
}

void check_model(const ModelConfig& c, const Topology& topology) {
  const auto refuse = [](const std::string& what, const std::string& expected,
                         const std::string& found) {
    throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                          .what = what,
                          .expected = expected,
                          .found = found,
                          .next = "change the model or the topology"});
  };
  const auto text = [](int64_t value) { return std::to_string(value); };
  if (c.heads < 1 || c.kv_heads < 1 || c.heads % c.kv_heads != 0) {
    refuse("The key-value heads do not divide the heads (DeepSpeed: ValueError).",
           "kv_heads that divides heads",
           text(c.heads) + " heads, " + text(c.kv_heads) + " key-value heads" +
               (c.kv_heads < 1 ? ""
                               : ", " + text(c.heads) + " mod " + text(c.kv_heads) + " = " +
                                     text(c.heads % c.kv_heads)));
  }
  if (c.head_size % 2 != 0 || c.head_size < 2) {
    refuse(
        "The size of a head is odd, so that positions cannot rotate it (rotary embeddings take "
        "halves; torch: RuntimeError).",
        "an even head_size of 2 or more",
        text(c.head_size) + ", " + text(c.head_size) + " mod 2 = " + text(c.head_size % 2));
  }
  if (c.frozen < 0 || c.frozen == 1 || (c.frozen > 0 && c.experts > 0)) {
    refuse("Such parameters cannot be frozen here.",
           "every n-th matrix of a dense model's layers, n ≥ 2; 0: none",
           "every " + text(c.frozen) + ". of a model of " + text(c.experts) + " experts");
  }
  if (topology.pipeline > 1 && c.layers < topology.pipeline) {
    refuse("There are fewer layers than pipeline stages (DeepSpeed: AssertionError).",
           "pp ≤ " + text(c.layers) + " layers", "pp = " + text(topology.pipeline));
  }
  if (topology.expert > 1 && c.experts == 0) {
    refuse(
        "The model has no experts that expert-parallel ranks could share (DeepSpeed: "
        "ValueError, AutoEP finds no layer of experts).",
        "ep = 1, or a model with experts that ep divides",
        "ep = " + text(topology.expert) + ", 0 experts");
  }
  if (c.experts > 0 && c.experts % topology.expert != 0) {
    refuse(
        "The expert-parallel ranks do not divide the experts (DeepSpeed: ValueError, "
        "\"is not divisible by autoep_size\").",
        "ep that divides " + text(c.experts) + " experts",
        text(c.experts) + " mod " + text(topology.expert) + " = " +
            text(c.experts % topology.expert));
  }
  if (c.experts > 0 && (c.top_k < 1 || c.top_k > c.experts)) {
    refuse("A token cannot go to so many experts (torch.topk: RuntimeError).",
           "1 ≤ top_k ≤ " + text(c.experts) + " experts", "top_k = " + text(c.top_k));
  }
}

std::string sequence_unsupported(const ModelConfig& c, const Topology& topology) {
  const int64_t ranks = topology.sequence, heads = c.heads, pairs = c.kv_heads;
  const bool hugging_face = heads % ranks == 0 && (pairs % ranks == 0 || ranks % pairs == 0);
  if (hugging_face || pairs >= ranks) return "";
  const auto mod = [](int64_t a, int64_t b) {
    return std::to_string(a) + " mod " + std::to_string(b) + " = " + std::to_string(a % b);
  };
  return "DeepSpeed's Ulysses does not share these heads among sp = " + std::to_string(ranks) +
         ": UlyssesSPAttentionHF (ValueError: " +
         (heads % ranks != 0
              ? mod(heads, ranks) + " of the heads"
              : mod(pairs, ranks) + " and " + mod(ranks, pairs) + " of the key-value heads") +
         "), DistributedAttention (AssertionError: " + std::to_string(pairs) +
         " key-value heads are fewer)";
}

}  // namespace isoshard::reference
