// Runs a law over generated cases: as many as ISOSHARD_CASES asks for, counted and printed. A
// counterexample is shrunk, and the command that replays it is printed.
#pragma once

#include <functional>
#include <string>

#include "properties/generators.h"

namespace isoshard::properties {

// ISOSHARD_CASES (100 if unset) divided by `share`, at least 5: laws that cost more run fewer.
int cases_for(int share);

struct LawRun {
  Law law = nullptr;
  int share = 1;
  bool many_ranks = false;  // cases of case_of_many_ranks()
  bool experts = false;     // cases of any_expert_case()
};

// Inside a googletest TEST: fails it on a counterexample. RC_PARAMS is RapidCheck's own: seed,
// max_success, reproduce.
void check_law(const LawRun& run);

// The same for any body, which draws its case and returns "" if its law holds.
void check_body(const std::function<std::string()>& body, int share);

// A mutant against its law: `outcome` is what the law says of case `number`, with the mutant or
// without. The first of `count` cases from `first` on that notices the mutant is printed and must
// hold without it; a mutant that survives them fails the test.
void expect_killed(uint64_t first, uint64_t count,
                   const std::function<std::string(uint64_t number, bool mutated)>& outcome);

}  // namespace isoshard::properties
