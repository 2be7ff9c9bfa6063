// Selections follow numpy: checked against a plain walk over all elements.
#include "reshard/selection.h"

#include <gtest/gtest.h>

#include "core/error.h"
#include "core/random.h"

namespace isoshard::reshard {
namespace {

std::vector<int64_t> numbers_of(const Selection& selection) {
  std::vector<int64_t> numbers;
  for_each_run(selection, [&](ElementRun run) {
    for (int64_t i = 0; i < run.count; ++i) numbers.push_back(run.begin + i);
  });
  return numbers;
}

TEST(Selection, PythonsRulesHold) {
  const Shape shape = {3, 4};
  EXPECT_EQ(numbers_of(parse_selection("1:3,0", shape)), (std::vector<int64_t>{4, 8}));
  EXPECT_EQ(numbers_of(parse_selection("-1", shape)), (std::vector<int64_t>{8, 9, 10, 11}));
  EXPECT_EQ(numbers_of(parse_selection("0, -2:", shape)), (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(numbers_of(parse_selection("2:99,:1", shape)), (std::vector<int64_t>{8}));
  EXPECT_EQ(numbers_of(parse_selection("-99:1,3", shape)), (std::vector<int64_t>{3}));
  EXPECT_TRUE(numbers_of(parse_selection("2:1", shape)).empty());
  EXPECT_EQ(parse_selection("2:1", shape).result_shape(), (Shape{0, 4}));
  EXPECT_EQ(parse_selection("1:3,0", shape).result_shape(), Shape{2});
  EXPECT_EQ(parse_selection("1,0", shape).result_shape(), Shape{});
  EXPECT_EQ(numbers_of(select_all({})), std::vector<int64_t>{0});
}

TEST(Selection, WhatNumpyOrThisProgramDoesNotKnowIsRefused) {
  for (const char* text : {"3", "-4", "a", "", "::2", "0:2:1", "0,0,0", "...", "1.0", "0,"}) {
    EXPECT_THROW(parse_selection(text, {3, 4}), Error) << text;
  }
  EXPECT_THROW(parse_selection("0", {}), Error);
}

// A run never crosses an element that is not selected, and all selected ones come in order.
TEST(Selection, RunsAreTheSelectedElementsInOrder) {
  Random random(7);
  for (int round = 0; round < 2000; ++round) {
    Selection selection;
    for (int64_t rank = random.below(5); rank > 0; --rank) {
      const int64_t size = random.between(1, 4), begin = random.below(size + 1);
      selection.shape.push_back(size);
      selection.begin.push_back(begin);
      selection.end.push_back(random.between(begin, size));
      selection.single.push_back(false);
    }
    std::vector<int64_t> expected;
    for (int64_t element = 0; element < numel(selection.shape); ++element) {
      bool inside = true;
      int64_t rest = element;
      for (size_t i = selection.shape.size(); i-- > 0; rest /= selection.shape[i]) {
        const int64_t at = rest % selection.shape[i];
        inside = inside && at >= selection.begin[i] && at < selection.end[i];
      }
      if (inside) expected.push_back(element);
    }
    ASSERT_EQ(numbers_of(selection), expected) << round;
    ASSERT_EQ(selection.count(), static_cast<int64_t>(expected.size()));
  }
}

TEST(Selection, FragmentsAreCutToIt) {
  const checkpoint::Leaf leaf{.name = "w",
                              .state = "fp32",
                              .dtype = DType::kFloat32,
                              .shape = {3, 4},
                              .fragments = {{0, 5, 0, 100}, {5, 7, 1, 200}}};
  const SelectedFragments all = selected_fragments(leaf, select_all(leaf.shape), 20);
  EXPECT_EQ(all.total, 2);
  const SelectedFragments row = selected_fragments(leaf, parse_selection("1", leaf.shape), 1);
  EXPECT_EQ(row.total, 2);
  ASSERT_EQ(row.first.size(), 1u);
  EXPECT_EQ(row.first[0].begin, 4);
  EXPECT_EQ(row.first[0].count, 1);
  EXPECT_EQ(row.first[0].offset_bytes, 116);
}

}  // namespace
}  // namespace isoshard::reshard
