// Laws of the digest iso1, over generated jobs (laws.h).
#include <gtest/gtest.h>

#include "properties/check_property.h"

namespace isoshard::properties {
namespace {

TEST(Digest, IsConstant) { check_law({.law = digest_is_constant, .share = 3}); }
TEST(Digest, OneBitChangesOneSection) { check_law({.law = one_bit_changes_one_section}); }
TEST(Digest, ASwapChangesIt) { check_law({.law = a_swap_changes_the_digest}); }
TEST(Digest, ADamagedFileIsRefused) { check_law({.law = a_damaged_file_is_refused}); }

}  // namespace
}  // namespace isoshard::properties
