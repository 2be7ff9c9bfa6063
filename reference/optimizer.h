// One step of an optimizer on one element's state: fp32, element by element, so that its bits do
// not depend on who owns the element (tier A). The order of operations is torch's, whose results it
// gives bit for bit where roots are rounded to the nearest float (torch/optim/adamw.py, sgd.py;
// Lion: Chen et al. 2023, arXiv 2302.06675).
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace isoshard::reference {

// kCustom: one of a training script's own, whose state is whatever it likes.
enum class OptimizerKind { kAdamW, kSgd, kLion, kCustom };

// A tensor that a custom optimizer keeps: the running mean of the gradient or of its square.
struct CustomState {
  std::string name;
  float decay = 0.5f;
  bool squared = false;
};

struct OptimizerConfig {
  OptimizerKind kind = OptimizerKind::kAdamW;
  double lr = 1e-2;
  double beta1 = 0.9;     // Lion and AdamW
  double beta2 = 0.999;   // Lion's usual one is 0.99
  double epsilon = 1e-8;  // AdamW
  double momentum = 0.9;  // SGD
  double weight_decay = 0.01;
  std::vector<CustomState> states = {};  // of a custom one; at least one
  bool counts = false;                   // whether a custom one counts its steps
};

const char* name(OptimizerKind kind);  // "AdamW", "SGD", "Lion", "custom"

// Names of the tensors that the optimizer keeps for an element.
std::vector<std::string> state_names(const OptimizerConfig& config);
// Whether it counts steps (AdamW's "step").
bool counts_steps(const OptimizerConfig& config);

// `count` elements; states[k] as state_names says. `step` is the number of this step, from 1 on;
// `lr` what the schedule gives for it.
struct StepArguments {
  std::span<float> master;
  std::span<const float> gradient;
  std::vector<std::span<float>> states;
  int64_t step = 1;
  double lr = 0.0;
  double weight_decay = 0.0;
};
void take_step(const OptimizerConfig& config, const StepArguments& arguments);

}  // namespace isoshard::reference
