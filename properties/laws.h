// The laws of the journey from one job's files to another's. A law takes a case and a mutant
// (kNone: production as it is) and returns "" if it holds, otherwise what contradicts it.
// docs/PROPERTIES.md lists them with tier and mutant.
#pragma once

#include <iosfwd>
#include <string>

#include "properties/model.h"
#include "properties/mutants.h"

namespace isoshard::properties {

struct Case {
  Model model;
  Job a;  // hand-made source: stage 1, 2 or 3
  Job b;
  Job c;
  uint64_t choice = 1;  // which bit, which parameter, which shuffle
};

std::ostream& operator<<(std::ostream& out, const Case& value);

using Law = std::string (*)(const Case&, Mutant);

std::string every_element_is_loaded(const Case& value, Mutant mutant);
std::string files_are_the_reference(const Case& value, Mutant mutant);
std::string no_padding_leaves_its_file(const Case& value, Mutant mutant);
std::string every_plan_covers(const Case& value, Mutant mutant);
std::string there_and_back_is_identity(const Case& value, Mutant mutant);
std::string via_is_direct(const Case& value, Mutant mutant);
std::string universal_keeps_everything(const Case& value, Mutant mutant);
std::string weights_are_the_masters(const Case& value, Mutant mutant);
std::string names_are_inferred_or_refused(const Case& value, Mutant mutant);
std::string listing_order_is_nothing(const Case& value, Mutant mutant);
std::string digest_is_constant(const Case& value, Mutant mutant);
std::string one_bit_changes_one_section(const Case& value, Mutant mutant);
std::string a_swap_changes_the_digest(const Case& value, Mutant mutant);
std::string a_damaged_file_is_refused(const Case& value, Mutant mutant);

// Cases of any_expert_case(): from a hand-made stage 0 to B, by way of the universal form and of C,
// every expert keeps weights and moments of its own, and B's and C's files are the reference.
std::string experts_keep_what_is_theirs(const Case& value, Mutant mutant);

// Over all optimizer files of a target (stage 0: its model file) each element of each master and
// state of the source is written once.
std::string cover_difference(const checkpoint::ShardedState& state,
                             const std::vector<checkpoint::FileBlueprint>& files, int stage);

// The universal form of a pipeline has no place for buffers and what the optimizer does not own.
bool has_universal_form(const Model& model);

// The reference's own inverse, so that a mistake in it cannot hide: gather undoes partition.
std::string reference_is_its_own_inverse(const Case& value, Mutant mutant);

// core/layout.h for every tensor of up to `largest` elements on up to 16 ranks.
std::string layouts_are_the_reference(int64_t largest, Mutant mutant);

// Maps and widths of every cut of tensors of up to `rows` rows on up to `ranks` ranks; square ones
// of up to `square`.
struct SplitSizes {
  int64_t rows = 14;
  int64_t square = 14;
  int ranks = 5;
};
std::string splits_are_the_reference(const SplitSizes& sizes, Mutant mutant);

// Grouped-query attention: told the number of key-value heads, every rank has whole ones, and as
// many query heads for each as the model has. Up to 16 of them, 8 query heads each, 16 ranks.
std::string heads_keep_their_ratio(Mutant mutant);

}  // namespace isoshard::properties
