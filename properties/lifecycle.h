// The life of a run: it trains, evaluates, saves, loses ranks, disks and messages, resumes from its
// last checkpoint, and moves to another topology and stage. A model-based test: the model is the
// run on one rank, which nothing happens to.
//
//   step n       n steps more
//   evaluate     samples that are no part of the training data: in the bypass (not with experts
//                shared out, nor at stage 3) on each dp·sp rank another number of them, of another
//                length; otherwise one lot of all ranks, or, uneven,
//                rank 0 has another one, which ends the session with a mismatch report
//   save         a checkpoint; where a disk fails, training goes on and the old one stays
//   load         what was not saved is lost; the same topology again
//   reshard T    the same, on another topology and stage
//   a fault      at a drawn operation of a drawn rank (sim/faults.h)
//
// What must hold: each loss and norm, also of steps that are done again, is the one rank's of that
// step, and so is each loss of an evaluation; the last state is its state, bit for bit; an uneven
// evaluation neither waits nor goes on where sequence-parallel ranks share it; behind a death
// `latest` names the checkpoint that was the last or the one that was being saved, and never less
// than a save that has returned.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "properties/life_faults.h"
#include "properties/simulation_case.h"

namespace isoshard::properties {

struct LifeCommand {
  enum class Kind { kStep, kEvaluate, kSave, kLoad, kReshard, kFault };
  Kind kind = Kind::kStep;
  int count = 1;  // kStep: steps; kEvaluate: samples
  Leg leg;        // kReshard
  sim::Fault fault;
  int64_t length = 2;   // kEvaluate: tokens of a sample
  bool uneven = false;  // kEvaluate without the bypass: rank 0 has another lot
};

struct LifeCase {
  reference::TrainConfig config;
  Leg first;
  std::vector<LifeCommand> commands;
  uint64_t seed = 1;
  int steps() const;
};

// Samples from this number on are evaluated: no run trains on them.
constexpr int64_t kEvaluated = 1000;

// What a rank has evaluated behind so many steps, and the loss it got.
struct Evaluation {
  int64_t step = 0;
  int64_t count = 1;   // of samples
  int64_t length = 2;  // tokens of each
  float loss = 0.0f;
};
// "" if each loss is, bit for bit, what one rank gets of the same samples.
std::string difference_alone(reference::TrainConfig config,
                             const std::vector<Evaluation>& evaluations);

// About limits.steps steps, at most limits.every at a time.
LifeCase draw_life(const Draw& draw, const CaseLimits& limits, const FaultMenu& menu);
LifeCase seeded_life(uint64_t seed, uint64_t number, const CaseLimits& limits,
                     const FaultMenu& menu);

// The model, the data and the commands.
std::string text_of(const LifeCase& value);

// Mistakes of a framework that resumes.
enum class LifeMutant {
  kNone,
  kStaleSurvivor,  // behind a death rank 0 keeps its counters: the data goes on from there
  kColdMoments,    // behind a death the last rank's moments begin again
  kLostPointer,    // the disk forgets the last change of `latest` when a rank dies
  kEqualLots,      // every rank evaluates the same lot, though told otherwise
  kForeignLot,     // an evaluation in the bypass begins one sample late
};

const char* name(LifeMutant mutant);

struct LifeResult : CaseResult {
  int64_t saves = 0;         // that returned
  int64_t failed_saves = 0;  // by a disk
  int64_t crashes = 0;       // sessions that a fault ended, not an uneven evaluation
  int64_t redone = 0;        // steps that were lost and done again
  // Faults that have done something.
  int64_t deaths = 0, disk_faults = 0, drops = 0, slow_ranks = 0, late_calls = 0, duplicates = 0;
  int64_t corruptions = 0, read_errors = 0;  // EIO, which is one of disk_faults too
  int64_t struck() const {
    return deaths + disk_faults + drops + slow_ranks + late_calls + duplicates + corruptions;
  }
};
// Throws Error(kInterrupted) after a signal, and std::bad_alloc.
LifeResult run_life(const LifeCase& value, LifeMutant mutant = LifeMutant::kNone,
                    const OnTrace& on_trace = {});

}  // namespace isoshard::properties
