// Ranks that carry out one plan together, on a file system that all of them see: what they have to
// tell each other. Every rank calls the same functions in the same order.
#pragma once

#include <cstdint>
#include <exception>
#include <string>
#include <vector>

#include "core/communicator.h"

namespace isoshard::reshard {

// Word by word the XOR over all ranks, on every rank: how CRCs of disjoint pieces add up.
void xor_over(Communicator& team, std::vector<uint64_t>* words);

// Number by number the sum over all ranks.
void sum_over(Communicator& team, std::vector<int64_t>* numbers);

// Rank 0's text on every rank.
void broadcast_text(Communicator& team, std::string* text);

// Ends a piece of work on all ranks: returns where none has failed. Otherwise each throws: its own
// failure, or Error(kInterrupted) that names the first rank that has one.
void agree(Communicator& team, const std::exception_ptr& failure);

// Does `work` on this rank, then agrees.
template <typename Work>
void together(Communicator& team, const Work& work) {
  std::exception_ptr failure;
  try {
    work();
  } catch (...) {
    failure = std::current_exception();
  }
  agree(team, failure);
}

// `work` on each rank of the team, or where there is none, alone; all go on behind it, or none.
template <typename Work>
void on_each_rank(Communicator* team, const Work& work) {
  team == nullptr ? work() : together(*team, work);
}

// `work` on rank 0 of the team, or where there is none, alone; all go on behind it, or none.
template <typename Work>
void on_first_rank(Communicator* team, const Work& work) {
  if (team == nullptr) return work();
  together(*team, [&] {
    if (team->rank() == 0) work();
  });
}

}  // namespace isoshard::reshard
