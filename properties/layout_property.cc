// Laws of where elements live, and of the reference itself.
#include <gtest/gtest.h>

#include "properties/check_property.h"

namespace isoshard::properties {
namespace {

TEST(Layout, FragmentsAgreeWithLocateAndTheReference) {
  EXPECT_EQ(layouts_are_the_reference(64, Mutant::kNone), "");
}

TEST(Split, MapsAndWidthsAreTheReference) {
  EXPECT_EQ(splits_are_the_reference({}, Mutant::kNone), "");
  if (cases_for(1) < 3000) return;  // the sanitizers take the small form
  EXPECT_EQ(splits_are_the_reference({.rows = 64, .square = 20, .ranks = 16}, Mutant::kNone), "");
}

TEST(Split, HeadsKeepTheirRatio) { EXPECT_EQ(heads_keep_their_ratio(Mutant::kNone), ""); }

TEST(Reference, GatherUndoesPartition) { check_law({.law = reference_is_its_own_inverse}); }

}  // namespace
}  // namespace isoshard::properties
