// See transformer.h. Each piece states its formula; x, y are activations, dx, dy their gradients.
#include "reference/transformer.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/check.h"
#include "core/exact_math.h"
#include "core/random.h"
#include "reference/activation.h"

namespace isoshard::reference {

struct Transformer::Mlp {
  Values gate, up, active;
};

struct Transformer::Layer {
  Values input, scales1, normal1;  // of the first norm
  UlyssesState attention;
  Values context;
  Values middle, scales2, normal2;  // of the second norm
  Mlp dense;
  Routing routing;
  std::unique_ptr<Experts> experts;
  Values slots;  // outputs of the chosen experts, [tokens, k, hidden]
};

struct Transformer::Activations {
  int64_t step = 0;
  MicroBatch micro;
  int64_t samples = 0, tokens = 0;
  std::vector<LeafIndex> leaves;                // by token
  std::vector<int64_t> ids, labels, positions;  // by token
  std::vector<int64_t> all_positions;           // [samples, length]
  std::vector<Layer> layers;                    // of this stage
  Values last, last_scales, last_normal, probabilities;
};

namespace {

void add(Values* x, const Values& y) {
  CHECK(x->size() == y.size(), "sums of one shape");
  for (size_t i = 0; i < y.size(); ++i) (*x)[i] += y[i];
}

std::vector<Span> slices(const DataConfig& data, const Topology& t) {
  std::vector<Span> spans;
  for (int rank = 0; rank < t.sequence; ++rank) {
    spans.push_back(positions_of(data, t.sequence, rank));
  }
  return spans;
}

}  // namespace

Transformer::Transformer(const ModelConfig& model, const DataConfig& data,
                         const ParallelState& parallel, Parameters* parameters,
                         const UlyssesMode& mode)
    : model_(model),
      data_(data),
      parallel_(parallel),
      parameters_(parameters),
      mode_(mode),
      layers_(layers_of_stage(model, parallel.topology.pipeline, parallel.at.pipeline)),
      rotation_(model.head_size, data.sequence_length, model.rope_theta) {
  UlyssesShape shape{.head_size = model.head_size, .causal = model.causal};
  shape.positions = slices(data, parallel.topology);
  const bool alone = shape.positions.size() == 1;
  positions_ = shape.positions[static_cast<size_t>(parallel.at.sequence)];
  if (mode.bypass()) positions_ = {0, data.sequence_length};
  if (layers_.size() == 0) return;
  const LocalParameter& query =
      parameters->local(number(at(static_cast<int>(layers_.begin)) + "self_attn.q_proj.weight"));
  const LocalParameter& key =
      parameters->local(number(at(static_cast<int>(layers_.begin)) + "self_attn.k_proj.weight"));
  shape.heads = query.shard.size() / model.head_size;
  shape.kv_heads = key.shard.size() / model.head_size;
  ulysses_ = std::make_unique<Ulysses>(alone ? nullptr : parallel.sequence, shape);
}

Transformer::~Transformer() = default;

void Transformer::clear() {
  loss_ = {};
  activations_.clear();
}

// y = x wᵀ, of this rank's rows of w; summed over the ranks that share its columns.
Values Transformer::project(int parameter, const Values& x, int64_t tokens) {
  const LocalParameter& p = parameters_->local(parameter);
  const Values& w = parameters_->use(parameter);
  const int64_t out = p.shape[0], in = p.shape[1];
  const Values xt = transposed({x.data(), tokens, in}), wt = transposed({w.data(), out, in});
  const Matrix a{xt.data(), in, tokens}, b{wt.data(), in, out};
  if (p.info.split == Split::kRow) return contract_over(*parallel_.tensor, p.spans, a, b);
  return contract(a, b);
}

// dw = Σ_tokens dyᵀ x,  dx = dy w, summed over the ranks that share the rows of w.
Values Transformer::project_backward(int parameter, const Values& x, const Values& dy,
                                     const Activations& a, GradientSet* gradients) {
  const LocalParameter& p = parameters_->local(parameter);
  const Values& w = parameters_->use(parameter);
  const int64_t out = p.shape[0], in = p.shape[1];
  for (int64_t t = 0; t < a.tokens && out * in > 0; ++t) {
    float* leaf =
        gradients->own[static_cast<size_t>(parameter)]->push(0, a.leaves[static_cast<size_t>(t)]);
    outer_product(dy.data() + t * out, out, x.data() + t * in, in, leaf);
  }
  const Values dyt = transposed({dy.data(), a.tokens, out});
  const Matrix left{dyt.data(), out, a.tokens}, right{w.data(), out, in};
  if (p.info.split == Split::kColumn) {
    return contract_over(*parallel_.tensor, p.spans, left, right);
  }
  return contract(left, right);
}

// y_i = w_i x_i s,  s = 1 / √(Σ_i x_i² / n + ε)
Values Transformer::normalise(int parameter, const Values& x, int64_t tokens, Values* scales) {
  const Values& w = parameters_->use(parameter);
  const size_t n = w.size();
  Values y(x.size());
  scales->assign(static_cast<size_t>(tokens), 0.0f);
  for (size_t t = 0; t < static_cast<size_t>(tokens); ++t) {
    const std::span<const float> row(x.data() + t * n, n);
    const float mean = tree_dot(row, row) / static_cast<float>(n);
    const float s = 1.0f / std::sqrt(mean + static_cast<float>(model_.norm_epsilon));
    (*scales)[t] = s;
    for (size_t i = 0; i < n; ++i) y[t * n + i] = w[i] * (row[i] * s);
  }
  return y;
}

// dw_i = Σ_tokens dy_i x_i s,  dx_i = s (w_i dy_i − x_i s² Σ_j w_j dy_j x_j / n)
Values Transformer::normalise_backward(int parameter, const Values& x, const Values& scales,
                                       const Values& dy, const Activations& a,
                                       GradientSet* gradients, bool skip_ignored) {
  const Values& w = parameters_->use(parameter);
  const size_t n = w.size();
  Values dx(x.size()), scaled(n);
  for (size_t t = 0; t < static_cast<size_t>(a.tokens); ++t) {
    const float s = scales[t];
    const std::span<const float> row(x.data() + t * n, n);
    const float* upstream = dy.data() + t * n;
    if (!skip_ignored || a.labels[t] != kIgnored) {
      float* leaf = gradients->own[static_cast<size_t>(parameter)]->push(0, a.leaves[t]);
      for (size_t i = 0; i < n; ++i) leaf[i] = upstream[i] * (row[i] * s);
    }
    for (size_t i = 0; i < n; ++i) scaled[i] = w[i] * upstream[i];
    const float share = tree_dot(scaled, row) / static_cast<float>(n);
    for (size_t i = 0; i < n; ++i) {
      dx[t * n + i] = s * (scaled[i] - row[i] * (s * s * share));
    }
  }
  return dx;
}

// Keeps a value with probability 1 − p, scaled by 1 / (1 − p); keyed by what it is, not by who
// computes it. Its own gradient.
void Transformer::drop(Values* values, const Activations& a, int layer, uint64_t site) const {
  if (model_.dropout <= 0 || a.step < 0) return;
  const uint64_t limit = static_cast<uint64_t>(model_.dropout * 0x1p53);
  const float scale = static_cast<float>(1.0 / (1.0 - model_.dropout));
  const size_t n = static_cast<size_t>(model_.hidden);
  for (size_t i = 0; i < values->size(); ++i) {
    const LeafIndex token = a.leaves[i / n];
    const uint64_t word = keyed_random(
        model_.seed ^ 0xD20,
        {static_cast<uint64_t>(a.step), static_cast<uint64_t>(layer), site, token, i % n});
    (*values)[i] = (word >> 11) < limit ? 0.0f : (*values)[i] * scale;
  }
}

Values Transformer::attend(int layer, const Values& x, Activations* a) {
  Layer& l = a->layers[static_cast<size_t>(layer - layers_.begin)];
  const std::string name = at(layer) + "self_attn.";
  Values q = project(number(name + "q_proj.weight"), x, a->tokens);
  Values k = project(number(name + "k_proj.weight"), x, a->tokens);
  const Values v = project(number(name + "v_proj.weight"), x, a->tokens);
  for (Values* heads : {&q, &k}) {
    if (a->tokens == 0) break;
    const int64_t row = static_cast<int64_t>(heads->size()) / a->tokens;
    for (int64_t at = 0; at < static_cast<int64_t>(heads->size()); at += model_.head_size) {
      rotation_.apply(heads->data() + at, a->positions[static_cast<size_t>(at / row)], false);
    }
  }
  l.attention.samples = a->samples;
  l.attention.mode = mode_;
  l.attention.document_positions = a->all_positions;
  l.context = ulysses_->forward(q, k, v, &l.attention);
  return project(number(name + "o_proj.weight"), l.context, a->tokens);
}

Values Transformer::attend_backward(int layer, const Values& dy, Activations* a,
                                    GradientSet* gradients) {
  Layer& l = a->layers[static_cast<size_t>(layer - layers_.begin)];
  const std::string name = at(layer) + "self_attn.";
  const Values dc = project_backward(number(name + "o_proj.weight"), l.context, dy, *a, gradients);
  UlyssesGradients g = ulysses_->backward(dc, l.attention);
  for (Values* heads : {&g.query, &g.key}) {
    if (a->tokens == 0) break;
    const int64_t row = static_cast<int64_t>(heads->size()) / a->tokens;
    for (int64_t at = 0; at < static_cast<int64_t>(heads->size()); at += model_.head_size) {
      rotation_.apply(heads->data() + at, a->positions[static_cast<size_t>(at / row)], true);
    }
  }
  Values dx = project_backward(number(name + "q_proj.weight"), l.normal1, g.query, *a, gradients);
  add(&dx, project_backward(number(name + "k_proj.weight"), l.normal1, g.key, *a, gradients));
  add(&dx, project_backward(number(name + "v_proj.weight"), l.normal1, g.value, *a, gradients));
  return dx;
}

// y = down (silu(gate x) ∘ up x)
Values Transformer::mlp(const std::string& at, const Values& x, int64_t tokens, Mlp* saved) {
  saved->gate = project(number(at + "gate_proj.weight"), x, tokens);
  saved->up = project(number(at + "up_proj.weight"), x, tokens);
  saved->active.resize(saved->gate.size());
  for (size_t i = 0; i < saved->gate.size(); ++i) {
    saved->active[i] = silu(saved->gate[i]) * saved->up[i];
  }
  return project(number(at + "down_proj.weight"), saved->active, tokens);
}

Values Transformer::mlp_backward(const std::string& at, const Values& x, const Values& dy,
                                 const Mlp& saved, const Activations& a, GradientSet* gradients) {
  const Values da =
      project_backward(number(at + "down_proj.weight"), saved.active, dy, a, gradients);
  Values dgate(da.size()), dup(da.size());
  for (size_t i = 0; i < da.size(); ++i) {
    dgate[i] = da[i] * saved.up[i] * silu_gradient(saved.gate[i]);
    dup[i] = da[i] * silu(saved.gate[i]);
  }
  Values dx = project_backward(number(at + "gate_proj.weight"), x, dgate, a, gradients);
  add(&dx, project_backward(number(at + "up_proj.weight"), x, dup, a, gradients));
  return dx;
}

// y_t = Σ_chosen r_k · expert_k(x_t), a tree over the chosen; then the shared expert's.
Values Transformer::experts(int layer, const Values& x, Activations* a) {
  Layer& l = a->layers[static_cast<size_t>(layer - layers_.begin)];
  const std::string name = at(layer) + "mlp.";
  const int64_t h = model_.hidden, k = model_.top_k;
  const Values logits = project(number(name + "router.gate.weight"), x, a->tokens);
  l.routing = route(logits, a->tokens, model_.experts, k);
  l.experts =
      std::make_unique<Experts>(*parallel_.expert, *parallel_.tensor,
                                ExpertShape{h, model_.expert_intermediate, model_.experts, k});
  const ExpertWeights weights{parameters_->use(number(name + "experts.w1")).data(),
                              parameters_->use(number(name + "experts.w2")).data(),
                              parameters_->use(number(name + "experts.w3")).data()};
  l.slots = l.experts->forward(x, a->leaves, l.routing, weights);
  Values y(x.size());
  for (int64_t t = 0; t < a->tokens; ++t) {
    TreeSum sum(static_cast<size_t>(h));
    for (int64_t slot = t * k; slot < (t + 1) * k; ++slot) {
      float* leaf = sum.push_leaf(static_cast<LeafIndex>(slot - t * k));
      for (int64_t c = 0; c < h; ++c) {
        leaf[c] = l.routing.weight[static_cast<size_t>(slot)] *
                  l.slots[static_cast<size_t>(slot * h + c)];
      }
    }
    sum.finish(std::span(y).subspan(static_cast<size_t>(t * h), static_cast<size_t>(h)));
  }
  if (model_.shared_expert) add(&y, mlp(name + "shared_experts.", x, a->tokens, &l.dense));
  return y;
}

Values Transformer::experts_backward(int layer, const Values& dy, Activations* a,
                                     GradientSet* gradients) {
  Layer& l = a->layers[static_cast<size_t>(layer - layers_.begin)];
  const std::string name = at(layer) + "mlp.";
  const int64_t h = model_.hidden, k = model_.top_k;
  Values dweight(l.routing.weight.size()), dslots(l.slots.size());
  for (size_t slot = 0; slot < dweight.size(); ++slot) {
    const float* upstream = dy.data() + static_cast<int64_t>(slot) / k * h;
    const float* y = l.slots.data() + static_cast<int64_t>(slot) * h;
    dweight[slot] = tree_dot({upstream, static_cast<size_t>(h)}, {y, static_cast<size_t>(h)});
    for (int64_t c = 0; c < h; ++c) {
      dslots[slot * static_cast<size_t>(h) + static_cast<size_t>(c)] =
          l.routing.weight[slot] * upstream[c];
    }
  }
  const int w[] = {number(name + "experts.w1"), number(name + "experts.w2"),
                   number(name + "experts.w3")};
  const ExpertWeights weights{parameters_->use(w[0]).data(), parameters_->use(w[1]).data(),
                              parameters_->use(w[2]).data()};
  const Values dx_slots =
      l.experts->backward(dslots, weights, [&](int stack, int64_t expert, LeafIndex leaf) {
        return gradients->own[static_cast<size_t>(w[stack - 1])]->push(expert, leaf);
      });
  Values dx(dy.size());
  for (int64_t t = 0; t < a->tokens; ++t) {
    TreeSum sum(static_cast<size_t>(h));
    for (int64_t slot = t * k; slot < (t + 1) * k; ++slot) {
      std::copy_n(dx_slots.begin() + slot * h, h,
                  sum.push_leaf(static_cast<LeafIndex>(slot - t * k)));
    }
    sum.finish(std::span(dx).subspan(static_cast<size_t>(t * h), static_cast<size_t>(h)));
  }
  const Values dlogits = route_backward(l.routing, dweight, a->tokens, model_.experts, k);
  const int router = number(name + "router.gate.weight");
  add(&dx, project_backward(router, l.normal2, dlogits, *a, gradients));
  if (model_.shared_expert) {
    add(&dx, mlp_backward(name + "shared_experts.", l.normal2, dy, l.dense, *a, gradients));
  }
  return dx;
}

Values Transformer::feed_forward(int layer, const Values& x, Activations* a) {
  if (model_.experts > 0) return experts(layer, x, a);
  return mlp(at(layer) + "mlp.", x, a->tokens,
             &a->layers[static_cast<size_t>(layer - layers_.begin)].dense);
}

Values Transformer::feed_forward_backward(int layer, const Values& dy, Activations* a,
                                          GradientSet* gradients) {
  if (model_.experts > 0) return experts_backward(layer, dy, a, gradients);
  const Layer& l = a->layers[static_cast<size_t>(layer - layers_.begin)];
  return mlp_backward(at(layer) + "mlp.", l.normal2, dy, l.dense, *a, gradients);
}

Values Transformer::embed(const Activations& a) {
  const Values& table = parameters_->use(number("model.embed_tokens.weight"));
  Values x;
  for (const int64_t id : a.ids) {
    const auto row = table.begin() + id * model_.hidden;
    x.insert(x.end(), row, row + model_.hidden);
  }
  return x;
}

void Transformer::embed_backward(const Values& dx, const Activations& a, GradientSet* gradients) {
  const int parameter = number("model.embed_tokens.weight");
  for (size_t t = 0; t < a.ids.size(); ++t) {
    float* leaf = gradients->own[static_cast<size_t>(parameter)]->push(a.ids[t], a.leaves[t]);
    std::copy_n(dx.begin() + static_cast<int64_t>(t) * model_.hidden, model_.hidden, leaf);
  }
}

// Columns of all tensor-parallel ranks, whole rows.
void Transformer::head(const Values& x, Activations* a) {
  const int norm = number("model.norm.weight");
  const int parameter = number(model_.tied ? "model.embed_tokens.weight" : "lm_head.weight");
  a->last = x;
  a->last_normal = normalise(norm, x, a->tokens, &a->last_scales);
  const LocalParameter& p = parameters_->local(parameter);
  Values logits = project(parameter, a->last_normal, a->tokens);
  const int64_t v = model_.vocabulary;
  if (p.info.split == Split::kColumn && parallel_.topology.tensor > 1) {
    std::vector<Values> parts;
    std::vector<Buffer> targets;
    for (const Span& span : p.spans) {
      parts.emplace_back(static_cast<size_t>(a->tokens * span.size()));
    }
    for (Values& part : parts) targets.push_back(buffer(std::span(part)));
    parallel_.tensor->all_gather(const_buffer(std::span<const float>(logits)), targets);
    logits.resize(static_cast<size_t>(a->tokens * v));
    for (size_t rank = 0; rank < parts.size(); ++rank) {
      const Span& span = p.spans[rank];
      for (int64_t t = 0; t < a->tokens; ++t) {
        std::copy_n(parts[rank].begin() + t * span.size(), span.size(),
                    logits.begin() + t * v + span.begin);
      }
    }
  }
  // ce_t = log Σ_j exp(z_j − m) + m − z_label
  a->probabilities.assign(logits.size(), 0.0f);
  for (int64_t t = 0; t < a->tokens; ++t) {
    const int64_t label = a->labels[static_cast<size_t>(t)];
    if (label == kIgnored) continue;
    const std::span<const float> row(logits.data() + t * v, static_cast<size_t>(v));
    const std::span<float> p_row(a->probabilities.data() + t * v, static_cast<size_t>(v));
    const float most = *std::max_element(row.begin(), row.end());
    for (size_t j = 0; j < row.size(); ++j) {
      p_row[j] = static_cast<float>(exact::exp(static_cast<double>(row[j] - most)));
    }
    const float total = tree_total(p_row);
    for (float& value : p_row) value /= total;
    const double loss = exact::log(static_cast<double>(total)) +
                        static_cast<double>(most - row[static_cast<size_t>(label)]);
    if (parallel_.at.tensor == 0) {
      loss_.sum.add(static_cast<double>(static_cast<float>(loss)));
      ++loss_.tokens;
    }
  }
}

// dz_j = p_j − [j = label]; ignored tokens have no leaf.
Values Transformer::head_backward(Activations* a, GradientSet* gradients) {
  const int parameter = number(model_.tied ? "model.embed_tokens.weight" : "lm_head.weight");
  const LocalParameter& p = parameters_->local(parameter);
  const Values& w = parameters_->use(parameter);
  const int64_t v = model_.vocabulary, h = model_.hidden;
  const bool split = p.info.split == Split::kColumn;
  const Span rows = split ? p.shard : Span{0, v};
  Values dz(static_cast<size_t>(a->tokens * rows.size()), 0.0f);
  Gradient* sum =
      model_.tied ? &*gradients->head : &*gradients->own[static_cast<size_t>(parameter)];
  for (int64_t t = 0; t < a->tokens; ++t) {
    const int64_t label = a->labels[static_cast<size_t>(t)];
    if (label == kIgnored || rows.size() == 0) continue;
    float* leaf = sum->push(0, a->leaves[static_cast<size_t>(t)]);
    for (int64_t j = rows.begin; j < rows.end; ++j) {
      const float gradient =
          a->probabilities[static_cast<size_t>(t * v + j)] - (j == label ? 1.0f : 0.0f);
      dz[static_cast<size_t>(t * rows.size() + j - rows.begin)] = gradient;
      for (int64_t c = 0; c < h; ++c) {
        leaf[(j - rows.begin) * h + c] = gradient * a->last_normal[static_cast<size_t>(t * h + c)];
      }
    }
  }
  const Values dzt = transposed({dz.data(), a->tokens, rows.size()});
  const Matrix left{dzt.data(), rows.size(), a->tokens}, right{w.data(), rows.size(), h};
  const Values dn =
      split ? contract_over(*parallel_.tensor, p.spans, left, right) : contract(left, right);
  return normalise_backward(number("model.norm.weight"), a->last, a->last_scales, dn, *a, gradients,
                            true);
}

void Transformer::forward(const MicroBatch& micro, int64_t step) {
  auto a = std::make_unique<Activations>();
  a->step = step;
  a->micro = micro;
  a->samples = static_cast<int64_t>(micro.samples.size());
  for (size_t b = 0; b < micro.samples.size(); ++b) {
    for (int64_t g = positions_.begin; g < positions_.end; ++g) {
      a->leaves.push_back(token_leaf(micro.places[b], g));
      a->ids.push_back(token_of(data_, model_.vocabulary, micro.samples[b], g));
      a->labels.push_back(label_of(data_, model_.vocabulary, micro.samples[b], g));
      a->positions.push_back(position_of(data_, micro.samples[b], g));
    }
  }
  a->tokens = static_cast<int64_t>(a->leaves.size());
  if (ulysses_) a->all_positions = ulysses_->gather_positions(a->positions, a->samples, mode_);
  Values x;
  if (parallel_.first_stage()) {
    x = embed(*a);
  } else {
    x.resize(static_cast<size_t>(a->tokens * model_.hidden));
    parallel_.pipeline->receive(buffer(std::span(x)), parallel_.at.pipeline - 1);
  }
  a->layers.resize(static_cast<size_t>(layers_.size()));
  for (int layer = static_cast<int>(layers_.begin); layer < layers_.end; ++layer) {
    Layer& l = a->layers[static_cast<size_t>(layer - layers_.begin)];
    l.input = x;
    l.normal1 = normalise(number(at(layer) + "input_layernorm.weight"), x, a->tokens, &l.scales1);
    Values y = attend(layer, l.normal1, a.get());
    drop(&y, *a, layer, 0);
    add(&x, y);
    l.middle = x;
    l.normal2 =
        normalise(number(at(layer) + "post_attention_layernorm.weight"), x, a->tokens, &l.scales2);
    y = feed_forward(layer, l.normal2, a.get());
    drop(&y, *a, layer, 1);
    add(&x, y);
  }
  if (parallel_.last_stage()) {
    head(x, a.get());
  } else {
    parallel_.pipeline->send(const_buffer(std::span<const float>(x)), parallel_.at.pipeline + 1);
  }
  for (int i = 0; i < parameters_->count(); ++i) parameters_->release(i);
  activations_.push_back(std::move(a));
}

void Transformer::backward(size_t micro, GradientSet* gradients) {
  Activations* a = activations_[micro].get();
  Values dx;
  if (parallel_.last_stage()) {
    dx = head_backward(a, gradients);
  } else {
    dx.resize(static_cast<size_t>(a->tokens * model_.hidden));
    parallel_.pipeline->receive(buffer(std::span(dx)), parallel_.at.pipeline + 1);
  }
  for (int layer = static_cast<int>(layers_.end) - 1; layer >= layers_.begin; --layer) {
    Layer& l = a->layers[static_cast<size_t>(layer - layers_.begin)];
    Values dy = dx;
    drop(&dy, *a, layer, 1);
    const Values dn2 = feed_forward_backward(layer, dy, a, gradients);
    add(&dx, normalise_backward(number(at(layer) + "post_attention_layernorm.weight"), l.middle,
                                l.scales2, dn2, *a, gradients, false));
    dy = dx;
    drop(&dy, *a, layer, 0);
    const Values dn1 = attend_backward(layer, dy, a, gradients);
    add(&dx, normalise_backward(number(at(layer) + "input_layernorm.weight"), l.input, l.scales1,
                                dn1, *a, gradients, false));
  }
  if (parallel_.first_stage()) {
    embed_backward(dx, *a, gradients);
  } else {
    parallel_.pipeline->send(const_buffer(std::span<const float>(dx)), parallel_.at.pipeline - 1);
  }
  for (int i = 0; i < parameters_->count(); ++i) parameters_->release(i);
}

}  // namespace isoshard::reference
