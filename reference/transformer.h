// One rank's forward and backward pass through the model of model.h, for one micro batch at a time.
// What is shared with other ranks follows from the layouts alone: tokens (dp, sp), rows and columns
// of matrices (tp), experts (ep), layers (pp). Activations are float32; a sum that ranks share runs
// in the canonical order, so every value is the one that a single rank would compute.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "core/exact_sum.h"
#include "core/parallel_state.h"
#include "reference/data.h"
#include "reference/experts.h"
#include "reference/gradient.h"
#include "reference/parameters.h"
#include "reference/ulysses.h"

namespace isoshard::reference {

// The samples that a rank works on at once.
struct MicroBatch {
  std::vector<int64_t> samples;  // counted over the run
  std::vector<int64_t> places;   // the same ones within the step's batch
};

// Sum of the losses of tokens that have one, and how many they are. On the last stage's first
// tensor-parallel rank; nothing elsewhere, so that a sum over the world counts each token once.
struct LossSum {
  ExactSum sum;
  int64_t tokens = 0;
};

// Where leaves of gradients go; by number of the parameter. `head` is the second use of a tied
// embedding, whose sum is added to the first one's root.
struct GradientSet {
  std::vector<std::optional<Gradient>> own;
  std::optional<Gradient> head;
};

class Transformer {
 public:
  // In the bypass of `mode` every rank is given whole sequences, as an evaluation's loader does,
  // and its attention (ulysses.h) sends nothing.
  Transformer(const ModelConfig& model, const DataConfig& data, const ParallelState& parallel,
              Parameters* parameters, const UlyssesMode& mode = {});
  ~Transformer();

  // `step` keys dropout; evaluation passes −1, which drops nothing.
  void forward(const MicroBatch& micro, int64_t step);
  // Of micro batch `number`, counted from the first forward() after clear().
  void backward(size_t number, GradientSet* gradients);
  const LossSum& loss() const { return loss_; }
  void clear();

 private:
  struct Layer;
  struct Activations;
  struct Mlp;

  Values project(int parameter, const Values& x, int64_t tokens);
  Values project_backward(int parameter, const Values& x, const Values& dy, const Activations& a,
                          GradientSet* gradients);
  Values normalise(int parameter, const Values& x, int64_t tokens, Values* scales);
  Values normalise_backward(int parameter, const Values& x, const Values& scales, const Values& dy,
                            const Activations& a, GradientSet* gradients, bool skip_ignored);
  void drop(Values* values, const Activations& a, int layer, uint64_t site) const;

  Values attend(int layer, const Values& x, Activations* a);
  Values attend_backward(int layer, const Values& dy, Activations* a, GradientSet* gradients);
  Values mlp(const std::string& at, const Values& x, int64_t tokens, Mlp* saved);
  Values mlp_backward(const std::string& at, const Values& x, const Values& dy, const Mlp& saved,
                      const Activations& a, GradientSet* gradients);
  Values feed_forward(int layer, const Values& x, Activations* a);
  Values feed_forward_backward(int layer, const Values& dy, Activations* a, GradientSet* gradients);
  Values experts(int layer, const Values& x, Activations* a);
  Values experts_backward(int layer, const Values& dy, Activations* a, GradientSet* gradients);

  Values embed(const Activations& a);
  void embed_backward(const Values& dx, const Activations& a, GradientSet* gradients);
  void head(const Values& x, Activations* a);
  Values head_backward(Activations* a, GradientSet* gradients);
  int number(const std::string& name) const { return parameters_->find(name); }
  std::string at(int layer) const { return "model.layers." + std::to_string(layer) + "."; }

  const ModelConfig& model_;
  const DataConfig& data_;
  const ParallelState& parallel_;
  Parameters* parameters_;
  UlyssesMode mode_;
  Span layers_, positions_;
  Rotation rotation_;
  std::unique_ptr<Ulysses> ulysses_;
  LossSum loss_;
  std::vector<std::unique_ptr<Activations>> activations_;
};

}  // namespace isoshard::reference
