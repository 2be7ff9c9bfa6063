// See check_property.h.
#include "properties/check_property.h"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <iostream>
#include <sstream>

namespace isoshard::properties {
namespace {

std::string test_name() {
  const testing::TestInfo* info = testing::UnitTest::GetInstance()->current_test_info();
  return std::string(info->test_suite_name()) + "." + info->name();
}

std::string replay_command(const std::string& name, const rc::detail::FailureResult& failure) {
  rc::detail::Configuration configuration;
  configuration.testParams = rc::detail::TestParams();
  configuration.reproduce.emplace(name, failure.reproduce);
  return "RC_PARAMS='" + rc::detail::configToMinimalString(configuration) +
         "' build/release/isoshard_properties --gtest_filter=" + name;
}

}  // namespace

int cases_for(int share) {
  const char* text = std::getenv("ISOSHARD_CASES");
  const int cases = text == nullptr ? 100 : std::max(1, std::atoi(text));
  return std::max(std::min(cases, 5), cases / share);
}

void check_law(const LawRun& run) {
  const rc::Gen<Case> cases = run.experts      ? any_expert_case()
                              : run.many_ranks ? case_of_many_ranks()
                                               : any_case();
  check_body(
      [&] {
        const Case value = *cases;
        return run.law(value, Mutant::kNone);
      },
      run.share);
}

void check_body(const std::function<std::string()>& body, int share) {
  int ran = 0;
  const auto property = [&] {
    ++ran;
    const std::string reason = body();
    if (!reason.empty()) RC_FAIL(reason);
  };
  const std::string name = test_name();
  rc::detail::TestParams params = rc::detail::configuration().testParams;
  params.maxSuccess = cases_for(share);
  const auto start = std::chrono::steady_clock::now();
  const rc::detail::TestResult result =
      rc::detail::checkTestable(property, rc::detail::TestMetadata{name, name}, params);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::cout << name << ": " << ran << " cases, seed " << params.seed << ", "
            << static_cast<int>(ran / std::max(seconds.count(), 1e-9)) << " cases/s\n";
  if (result.is<rc::detail::SuccessResult>()) {
    ASSERT_GT(ran, 0) << "no case ran";
    return;
  }
  std::ostringstream text;
  rc::detail::printResultMessage(result, text);
  if (result.is<rc::detail::FailureResult>()) {
    text << "\nreplay: " << replay_command(name, result.get<rc::detail::FailureResult>()) << "\n";
  }
  FAIL() << text.str();
}

void expect_killed(uint64_t first, uint64_t count,
                   const std::function<std::string(uint64_t number, bool mutated)>& outcome) {
  for (uint64_t number = first; number < first + count; ++number) {
    const std::string reason = outcome(number, true);
    if (reason.empty()) continue;
    EXPECT_EQ(outcome(number, false), "") << "the law fails without the mutant too";
    std::cout << "killed by case " << number << ": " << reason << "\n";
    return;
  }
  FAIL() << "the mutant survives " << count << " cases";
}

}  // namespace isoshard::properties
