// What a pass sums up on the way says the same as reading master and copy side by side.
#include "reshard/agreement.h"

#include <gtest/gtest.h>

#include <limits>

#include "core/cast.h"
#include "reshard/copies_case.h"

namespace isoshard::reshard {
namespace {

using checkpoint::ShardedState;

struct Judged {
  std::vector<std::string> findings;
  int64_t bytes_read = 0;
};

Judged judge(const ShardedState& state, int workers = 3) {
  checkpoint::MemoryStorage storage;
  Agreement agreement(state);
  StreamOptions options{.workers = workers, .digest = {}, .casts = {}, .progress = {}};
  agreement.ask(&options);
  const StreamResult result = digest_leaves(storage, state, options);
  return {agreement.judge(options, result), result.bytes_read};
}

struct Values {
  std::vector<float> masters;
  std::vector<uint16_t> copies;
};

Values many_values() {
  Values values;
  for (int i = 0; i < 600'001; ++i) {
    values.masters.push_back(i % 1000 == 0 ? 0.0f : 1.0f / static_cast<float>(i + 1));
    values.copies.push_back(bfloat16_from_float(values.masters.back()));
  }
  return values;
}

TEST(Agreement, RoundedMastersAgreeAndAreReadOnce) {
  const Values values = many_values();
  for (const int64_t lead : {0, 4, 2, 1}) {
    const Judged judged = judge(state_of(values.masters, values.copies, lead));
    EXPECT_TRUE(judged.findings.empty()) << lead;
    EXPECT_EQ(judged.bytes_read, 6 * 600'001) << lead;
  }
}

TEST(Agreement, OneBitOfACopyIsToldWithItsPlace) {
  Values values = many_values();
  values.copies[345'678] ^= 1;
  const std::vector<std::string> findings = judge(state_of(values.masters, values.copies)).findings;
  ASSERT_EQ(findings.size(), 1u);
  EXPECT_NE(findings[0].find("in 1 of 1 parameter."), std::string::npos) << findings[0];
  EXPECT_NE(findings[0].find("\"w\"[345678]: master "), std::string::npos) << findings[0];
  EXPECT_NE(findings[0].find("1 of 600001 elements differ"), std::string::npos) << findings[0];
}

// The pieces' sums meet by exclusive or: elements that change places must not cancel out.
TEST(Agreement, TwoMastersThatChangedPlacesAreFound) {
  Values values = many_values();
  std::swap(values.masters[10], values.masters[400'001]);
  EXPECT_EQ(judge(state_of(values.masters, values.copies)).findings.size(), 1u);
}

TEST(Agreement, NanAgreesWithEveryNanAndSignedZerosDoNot) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_TRUE(judge(state_of({nan, 0.0f}, {0xFFFF, 0})).findings.empty());
  EXPECT_EQ(judge(state_of({1.0f, 0.0f}, {0x3F80, 0x8000})).findings.size(), 1u);
}

TEST(Agreement, ATiedNameIsHeldToItsTarget) {
  const ShardedState state = state_with_ties();
  const std::vector<std::string> findings = judge(state).findings;
  ASSERT_EQ(findings.size(), 2u);
  EXPECT_EQ(findings[0], "Tied names whose target is not there.\n\"lost\" = \"nowhere\"");
  EXPECT_TRUE(findings[1].starts_with("Tied names hold different values."));
}

}  // namespace
}  // namespace isoshard::reshard
