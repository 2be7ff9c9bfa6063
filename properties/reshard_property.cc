// Laws of values and files, over generated jobs (laws.h).
#include <gtest/gtest.h>

#include "properties/check_property.h"

namespace isoshard::properties {
namespace {

TEST(Reshard, EveryElementIsLoaded) { check_law({.law = every_element_is_loaded}); }
TEST(Reshard, FilesAreTheReference) { check_law({.law = files_are_the_reference}); }
TEST(Reshard, NoPaddingLeavesItsFile) {
  check_law({.law = no_padding_leaves_its_file, .share = 2});
}
TEST(Reshard, EveryPlanCovers) { check_law({.law = every_plan_covers}); }
TEST(Reshard, ThereAndBackIsIdentity) {
  check_law({.law = there_and_back_is_identity, .share = 3});
}
TEST(Reshard, ViaIsDirect) { check_law({.law = via_is_direct, .share = 3}); }
TEST(Reshard, NamesAreInferredOrRefused) {
  check_law({.law = names_are_inferred_or_refused, .share = 2});
}
TEST(Reshard, ListingOrderIsNothing) { check_law({.law = listing_order_is_nothing}); }
TEST(Reshard, ManyRanksAreNumbers) {
  check_law({.law = files_are_the_reference, .share = 30, .many_ranks = true});
}
TEST(Reshard, ManyRanksAreLoaded) {
  check_law({.law = every_element_is_loaded, .share = 30, .many_ranks = true});
}
TEST(Reshard, ExpertsKeepWhatIsTheirs) {
  check_law({.law = experts_keep_what_is_theirs, .share = 2, .experts = true});
}
TEST(Convert, UniversalKeepsEverything) {
  check_law({.law = universal_keeps_everything, .share = 2});
}
TEST(Convert, WeightsAreTheMasters) { check_law({.law = weights_are_the_masters, .share = 2}); }

}  // namespace
}  // namespace isoshard::properties
