// Laws of where elements live, and of the reference itself.
#include <gtest/gtest.h>

#include "properties/check_property.h"

namespace isoshard::properties {
namespace {

TEST(Layout, FragmentsAgreeWithLocateAndTheReference) {
  EXPECT_EQ(layouts_are_the_reference(64, Mutant::kNone), "");
}

TEST(Split, MapsAndWidthsAreTheReference) {
  EXPECT_EQ(splits_are_the_reference(14, Mutant::kNone), "");
}

TEST(Reference, GatherUndoesPartition) { check_law({.law = reference_is_its_own_inverse}); }

}  // namespace
}  // namespace isoshard::properties
