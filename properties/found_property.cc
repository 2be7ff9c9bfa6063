// Counterexamples that the laws have found, kept as tests of their own.
#include <gtest/gtest.h>

#include "core/error.h"
#include "properties/laws.h"

namespace isoshard::properties {
namespace {

Case smallest() {
  Case value;
  value.model.parameters = {{.name = "a", .shape = {2}}, {.name = "b", .shape = {2}}};
  return value;
}

// zero/b/step.pt is a bare 0-d tensor, and so is every state of a 0-d parameter under {param: …}.
TEST(Found, TheStepOfAZeroDimParameterIsANumber) {
  Case value = smallest();
  value.model.parameters[1].shape = {};
  value.model.states = {{.name = "exp_avg"}};
  value.model.scalars = {{.name = "step"}};
  EXPECT_EQ(universal_keeps_everything(value, Mutant::kNone), "");
}

// BF16_Optimizer does not look at round_robin_gradients.
TEST(Found, ABf16OptimizerIsNeverPermuted) {
  Case value = smallest();
  value.model.parameters.push_back({.name = "c", .shape = {2}});
  value.model.bf16_optimizer = true;
  value.model.round_robin = true;
  value.a = {.data = 2, .stage = 1};
  value.b = {.data = 1, .stage = 3};
  EXPECT_EQ(every_element_is_loaded(value, Mutant::kNone), "");
  EXPECT_EQ(universal_keeps_everything(value, Mutant::kNone), "");
}

// A tensor of the client state is hashed into `hyper`; its record's CRC must be compared too.
TEST(Found, ADamagedClientTensorIsRefused) {
  Case value = smallest();
  value.model.client_state = true;
  for (value.choice = 0; value.choice < 40; ++value.choice) {
    EXPECT_EQ(a_damaged_file_is_refused(value, Mutant::kNone), "") << value.choice;
  }
}

}  // namespace
}  // namespace isoshard::properties
