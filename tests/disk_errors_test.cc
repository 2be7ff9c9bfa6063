// Errors of the disk at every call of publications, saves and conversions, alone and with power
// loss behind them; a crash behind a crash; and the mistakes that these laws must notice.
#include <gtest/gtest.h>

#include <cstdlib>
#include <iostream>

#include "properties/error_case.h"

namespace isoshard {
namespace {

using properties::CrashJob;
using properties::ErrorRange;
using properties::ErrorTally;
using properties::StorageMutant;
using Kind = StorageMutant::Kind;

int64_t asked_cases() {
  const char* text = std::getenv("ISOSHARD_CASES");
  return std::max<int64_t>(1, text == nullptr ? 100 : std::atoll(text));
}

// From ISOSHARD_CASES=10000 on, every errno at every call, once and for ever, of which so many are
// drawn; below that one of these each, of which `few` are, and thrice as many from 3,000 on. A save
// by two ranks has fewer than 1,000.
ErrorRange range(int64_t few) {
  const int64_t asked = asked_cases();
  const bool all = asked >= 10'000;
  const int64_t drawn = asked >= 3000 ? 3 * few : few;
  return {.number = 1, .all = all, .seeds = all ? 4u : 1u, .most_runs = all ? asked : drawn};
}

std::vector<std::string> names_of_jobs() {
  std::vector<std::string> names;
  for (const CrashJob& job : properties::crash_jobs()) names.push_back(job.name);
  return names;
}

void print(const std::string& job, const ErrorTally& tally, const char* runs) {
  std::cout << job << ": " << tally.cases << " cases, " << tally.runs << runs << tally.calls << ", "
            << tally.told << " told, "
            << static_cast<int64_t>(static_cast<double>(tally.cases) / tally.seconds)
            << " cases/s\n";
}

class DiskErrors : public testing::TestWithParam<std::string> {};

TEST_P(DiskErrors, AreToldAndLeaveTheOldOrTheNew) {
  const ErrorTally tally =
      properties::check_errors(properties::crash_job(GetParam()), {}, range(40));
  print(GetParam(), tally, " errors at calls ");
  EXPECT_EQ(tally.failure, "");
  EXPECT_GT(tally.runs, 0);
}

INSTANTIATE_TEST_SUITE_P(, DiskErrors, testing::ValuesIn(names_of_jobs()),
                         [](const auto& each) { return each.param; });

class NestedCrash : public testing::TestWithParam<std::string> {};

TEST_P(NestedCrash, OfTheSecondRunLeavesWhatTheFirstHasOrTheNew) {
  const ErrorTally tally =
      properties::check_nested_crashes(properties::crash_job(GetParam()), range(8));
  print(GetParam(), tally, " first crashes behind operations ");
  EXPECT_EQ(tally.failure, "");
  EXPECT_GT(tally.runs, 0);
}

INSTANTIATE_TEST_SUITE_P(, NestedCrash, testing::ValuesIn(names_of_jobs()),
                         [](const auto& each) { return each.param; });

struct Mistake {
  Kind kind;
  const char* name;
  const char* job;
};

void PrintTo(const Mistake& mistake, std::ostream* out) { *out << mistake.name; }

class DiskErrorMutants : public testing::TestWithParam<Mistake> {};

TEST_P(DiskErrorMutants, AreNoticed) {
  const ErrorTally tally = properties::check_errors(properties::crash_job(GetParam().job),
                                                    {.kind = GetParam().kind}, {.number = 1});
  EXPECT_NE(tally.failure, "") << tally.runs << " runs";
  EXPECT_GT(tally.strikes, 0);
  std::cout << tally.failure.substr(0, 300) << "\n";
}

constexpr Mistake kMistakes[] = {
    {Kind::kRetriedSync, "RetriedSyncOfSave", "save"},
    {Kind::kRetriedSync, "RetriedSyncOfPointer", "replace"},
    {Kind::kSwallowedWrite, "SwallowedWriteOfPublication", "publish"},
    {Kind::kSwallowedWrite, "SwallowedWriteOfPointer", "replace"},
    {Kind::kSwallowedWrite, "SwallowedWriteOfSave", "save"},
    {Kind::kSwallowedClose, "SwallowedClose", "publish"},
    {Kind::kKeptStaging, "KeptStagingOfPublication", "publish"},
    {Kind::kKeptStaging, "KeptStagingOfSave", "save"},
    {Kind::kKeptStaging, "KeptStagingOfConversion", "convert"},
    {Kind::kMuteError, "MuteError", "publish"},
    {Kind::kEarlyPublication, "PublicationBeforeTheBarrier", "save"},
    {Kind::kEarlyPointer, "PointerBeforeTheFolder", "next_save"},
};

INSTANTIATE_TEST_SUITE_P(, DiskErrorMutants, testing::ValuesIn(kMistakes),
                         [](const auto& each) { return std::string(each.param.name); });

}  // namespace
}  // namespace isoshard
