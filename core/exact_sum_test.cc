#include "core/exact_sum.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "core/random.h"

namespace isoshard {
namespace {

TEST(ExactSum, ReadsBackEverySingleTerm) {
  Random random(3);
  for (int round = 0; round < 20000; ++round) {
    const double value = std::bit_cast<double>(random.next());
    ExactSum sum;
    sum.add(value);
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(sum.value()));
    } else {
      ASSERT_EQ(sum.value(), value) << std::hexfloat << value;
    }
  }
}

TEST(ExactSum, TwoTermsRoundAsTheProcessorDoes) {
  Random random(4);
  for (int round = 0; round < 20000; ++round) {
    const uint64_t a_bits = random.next();
    const uint64_t near = (random.next() & ~(uint64_t{0x7FF} << 52)) |
                          ((a_bits + (static_cast<uint64_t>(random.between(-60, 60)) << 52)) &
                           (uint64_t{0x7FF} << 52));
    const double a = std::bit_cast<double>(a_bits), b = std::bit_cast<double>(near);
    if (!std::isfinite(a) || !std::isfinite(b) || !std::isfinite(a + b)) continue;
    ExactSum sum;
    sum.add(a);
    sum.add(b);
    ASSERT_EQ(sum.value(), a + b) << std::hexfloat << a << " " << b;
  }
}

// What lies below all that is looked at decides a tie, as a third term would not do one by one.
TEST(ExactSum, ASmallTermBreaksATie) {
  ExactSum sum;
  for (const double term : {1.0, 0x1p-53, 0x1p-900}) sum.add(term);
  EXPECT_EQ(sum.value(), 1.0 + 0x1p-52);
  sum.add(-0x1p-900);
  EXPECT_EQ(sum.value(), 1.0);
}

TEST(ExactSum, CancelsWithoutARest) {
  ExactSum sum;
  for (const double term : {1e300, 1.0, -1e300, 1e-300, -1.0, -1e-300}) sum.add(term);
  EXPECT_EQ(sum.value(), 0.0);
}

TEST(ExactSum, OrderAndSplitAreNothing) {
  Random random(5);
  std::vector<double> terms;
  for (int i = 0; i < 5000; ++i) {
    const float x = std::bit_cast<float>(static_cast<uint32_t>(random.next()));
    if (std::isfinite(x)) terms.push_back(static_cast<double>(x) * x);
  }
  ExactSum whole;
  std::vector<ExactSum> ranks(7);
  for (size_t i = 0; i < terms.size(); ++i) whole.add(terms[terms.size() - 1 - i]);
  for (const double term : terms) ranks[static_cast<size_t>(random.below(7))].add(term);
  std::vector<int64_t> words(ExactSum::kWords, 0);
  for (const ExactSum& rank : ranks) {
    for (size_t i = 0; i < words.size(); ++i) words[i] += rank.words()[i];
  }
  EXPECT_EQ(ExactSum::from_words(words).value(), whole.value());
}

TEST(ExactSum, InfinitiesAndNaN) {
  const double infinity = std::numeric_limits<double>::infinity();
  ExactSum sum;
  sum.add(-infinity);
  sum.add(1.0);
  EXPECT_EQ(sum.value(), -infinity);
  sum.add(infinity);
  EXPECT_TRUE(std::isnan(sum.value()));
}

}  // namespace
}  // namespace isoshard
