// RapidCheck generators of jobs and models. They shrink towards one small parameter, one rank,
// stage 1, the name "a".
#pragma once

#include <rapidcheck.h>

#include "properties/laws.h"

namespace isoshard::properties {

// What the awkward corners hold: numel < dp, k·dp ± 1, 0-d, zero-size, holes, names from all of
// Unicode, many sub-groups, ties, frozen parameters.
rc::Gen<Case> any_case();

// Native mixture of experts: A at stage 0; one or two layers, whose experts the expert-parallel
// ranks divide.
rc::Gen<Case> any_expert_case();

// Jobs of 9, 10, 11, 99, 100 and 101 ranks, where names of ranks have different lengths.
rc::Gen<Case> case_of_many_ranks();

}  // namespace isoshard::properties
