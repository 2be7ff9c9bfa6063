// See lifecycle.h. A session is what happens between two loads: one run of a cluster.
#include "properties/lifecycle.h"

#include <algorithm>
#include <bit>
#include <map>
#include <new>

#include "checkpoint/cancel.h"
#include "checkpoint/small_file.h"
#include "core/error.h"
#include "core/hex_float.h"
#include "core/random.h"

namespace isoshard::properties {
namespace {

using engine::CheckpointEngine;
using reference::TrainConfig;
using reference::Trainer;
using Kind = LifeCommand::Kind;

constexpr int kDiskOperations = 24;  // a disk that fails does so for a while

class Life {
 public:
  Life(const LifeCase& value, LifeMutant mutant, const OnTrace& on_trace, LifeResult* result)
      : value_(value),
        mutant_(mutant),
        on_trace_(on_trace),
        result_(*result),
        bridge_(storage_, value.config, value.seed),
        leg_(value.first),
        total_(value.steps()),
        one_(single_rank(value.config, total_, &behind_)) {}

  void run() {
    for (const LifeCommand& command : value_.commands) {
      if (command.kind == Kind::kLoad || command.kind == Kind::kReshard) {
        session();
        if (command.kind == Kind::kReshard) move_to(command.leg);
        continue;
      }
      pending_.push_back(command);
    }
    pending_.push_back({.kind = Kind::kStep, .count = total_});
    session();
    if (live_ != total_) {  // a fault took the last session
      pending_.push_back({.kind = Kind::kStep, .count = total_});
      session();
    }
    if (!reason_.empty()) return;
    reason_ = reference::difference(one_.state, reference::whole_state_of(last_));
    if (reason_.empty()) reason_ = difference_alone(value_.config, evaluations_);
  }
  const std::string& reason() const { return reason_; }

 private:
  using States = std::vector<TrainingState>;

  // What a session can begin from.
  struct Durable {
    int step = 0;  // 0: nothing
    bool files = false;
    std::string folder;
    Leg leg;
    States states;  // by rank
  };

  void move_to(const Leg& leg) {
    if (!(leg_ == leg)) ++result_.changes;
    leg_ = leg;
    save_dir_ = "/saved" + std::to_string(++folders_);
  }

  void session() {
    std::vector<LifeCommand> commands = std::move(pending_);
    pending_.clear();
    if (!reason_.empty()) return;
    checkpoint::throw_if_cancelled();
    sim::Faults faults = faults_of(commands);
    by_files_ = durable_.step > 0 && durable_.files && bridge_.unsupported(leg_).empty() &&
                bridge_.leads(durable_.leg, leg_);
    from_ = durable_.folder;
    if (by_files_ && !(durable_.leg == leg_)) {
      from_ = "/leg" + std::to_string(++folders_);
      bridge_.bring(durable_.folder, from_, leg_);
      ++result_.files_changes;
    }
    const int before = durable_.step;
    const std::string pointer = pointer_text();
    resumed_ = 0;
    attempted_.clear();
    captured_.clear();
    returned_ = 0;
    live_ = 0;
    uneven_ = false;
    States states(static_cast<size_t>(leg_.topology.world()));
    const uint64_t seed = keyed_random(value_.seed, {static_cast<uint64_t>(++sessions_)});
    sim::Cluster cluster(leg_.topology, {.seed = seed, .faults = faults});
    const TraceTeller teller{cluster, leg_, on_trace_};
    const Counted counted{*this, cluster};
    layouts_.clear();
    bool ended = true, told = false;
    try {
      cluster.run([&](sim::Rank& rank) {
        run_rank(rank, commands, &states[static_cast<size_t>(rank.number())]);
      });
      ended = cluster.dead().empty();
    } catch (const Error& failure) {
      checkpoint::throw_if_cancelled();
      if (!explained(failure, cluster)) throw;
      ended = false;
      told = is_told(failure);
    }
    if (!ended && mutant_ == LifeMutant::kLostPointer) put_back(pointer);
    find_durable(before);
    crashed_ = !ended;
    if (!ended) {
      result_.crashes += !told;
      result_.redone += std::max(0, live_ - durable_.step);
      live_ = 0;
    }
    last_ = std::move(states);
  }

  // Whether it is the report of an uneven evaluation, at a rank's call and not where none could go
  // on.
  bool is_told(const Error& failure) const {
    return uneven_ && failure.info().code == ErrorCode::kMismatch &&
           failure.info().what.starts_with("On rank ");
  }

  // Whether a session may end like that, given the faults that were placed in it.
  bool explained(const Error& failure, const sim::Cluster& cluster) const {
    const ErrorCode code = failure.info().code;
    const auto struck = [&](auto kind) { return std::ranges::any_of(cluster.struck(), kind); };
    if (code == ErrorCode::kInterrupted) return !cluster.dead().empty();
    if (code == ErrorCode::kMismatch) {
      return is_told(failure) ||
             struck([](sim::FaultKind kind) { return kind == sim::FaultKind::kDrop; });
    }
    return struck(sim::is_of_disk) && resumed_ < leg_.topology.world();  // a load met the disk
  }

  // Counts a session's events and faults when it ends, also where it fails.
  struct Counted {
    Life& life;
    const sim::Cluster& cluster;
    ~Counted() { life.count(cluster); }
  };

  void count(const sim::Cluster& cluster) {
    result_.trace_hash = mix(result_.trace_hash ^ cluster.trace().hash());
    result_.events += static_cast<int64_t>(cluster.trace().events().size());
    for (const sim::FaultKind kind : cluster.struck()) {
      result_.disk_faults += sim::is_of_disk(kind);
      result_.deaths += kind == sim::FaultKind::kDieBefore;
      result_.drops += kind == sim::FaultKind::kDrop;
      result_.slow_ranks += kind == sim::FaultKind::kSlow;
      result_.late_calls += kind == sim::FaultKind::kDelay || kind == sim::FaultKind::kReorder;
      result_.duplicates += kind == sim::FaultKind::kDuplicate;
      result_.read_errors += kind == sim::FaultKind::kIoError;
      result_.corruptions += kind == sim::FaultKind::kCorrupt;
    }
  }

  std::string pointer_text() {
    const std::string path = save_dir_ + "/latest";
    return storage_.is_file(path) ? read_small_file(storage_, path, 100) : "";
  }

  // kLostPointer: the disk forgets the last change of `latest`.
  void put_back(const std::string& text) {
    if (pointer_text() == text) return;
    const std::string path = save_dir_ + "/latest";
    if (text.empty()) return storage_.remove_file(path);
    checkpoint::replace_small_file(storage_, path, text);
  }

  sim::Faults faults_of(std::vector<LifeCommand>& commands) {
    sim::Faults faults;
    disk_ = false;
    for (const LifeCommand& command : commands) {
      if (command.kind != Kind::kFault) continue;
      sim::Fault fault = command.fault;
      fault.rank %= leg_.topology.world();
      const bool disk = sim::is_of_disk(fault.kind);
      disk_ = disk_ || disk;
      for (int i = 0; i < (disk ? kDiskOperations : 1); ++i, ++fault.operation) {
        faults.push_back(fault);
      }
    }
    std::erase_if(commands, [](const LifeCommand& c) { return c.kind == Kind::kFault; });
    return faults;
  }

  void run_rank(sim::Rank& rank, const std::vector<LifeCommand>& commands, TrainingState* final) {
    const ParallelState parallel = parallel_state(rank);
    TrainConfig config = value_.config;
    config.stage = leg_.stage;
    Trainer trainer(config, parallel, &layouts_);
    CheckpointEngine files(rank.storage(storage_), parallel,
                           deepspeed_config(config, leg_.topology, leg_.stage),
                           [](const std::string&) {});
    resume(&trainer, &files, rank.number());
    ++resumed_;
    for (const LifeCommand& command : commands) {
      switch (command.kind) {
        case Kind::kStep:
          for (int i = 0; i < command.count && trainer.state().counters.steps < total_; ++i) {
            step(&trainer, rank.number());
          }
          break;
        case Kind::kEvaluate:
          evaluate(&trainer, rank.number(), command);
          break;
        default:
          save(&trainer, &files, rank);
      }
    }
    *final = trainer.state();
  }

  void resume(Trainer* trainer, CheckpointEngine* files, int rank) {
    if (durable_.step == 0) {
      trainer->initialise();
    } else if (by_files_) {
      take_client_state(
          files->load_checkpoint(&trainer->state(), from_, {.clean_client_state = true})
              .client_state,
          &trainer->state());
      trainer->refresh_parameters();
    } else {
      const States& saved = durable_.states;
      trainer->adopt(reference::whole_state_of(saved), saved[0]);
    }
    TrainingState& state = trainer->state();
    if (!crashed_) return;
    if (mutant_ == LifeMutant::kStaleSurvivor && rank == 0) state.counters.samples += 1;
    if (mutant_ == LifeMutant::kColdMoments && rank == leg_.topology.world() - 1) {
      for (TrainedGroup& group : state.groups) {
        std::ranges::fill(group.states.front().second, 0.0f);
      }
    }
  }

  void step(Trainer* trainer, int rank) {
    checkpoint::throw_if_cancelled();
    const reference::StepReport report = trainer->step();
    const int number = static_cast<int>(trainer->state().counters.steps);
    if (rank != 0) return;
    live_ = number;
    if (!reason_.empty()) return;
    const std::string other = step_difference(one_.steps[static_cast<size_t>(number) - 1], report);
    if (!other.empty()) {
      reason_ = "step " + std::to_string(number) + ", on " + to_string(leg_) + ": " + other;
    }
  }

  void evaluate(Trainer* trainer, int rank, const LifeCommand& command) {
    const Coordinate at = coordinate_of(leg_.topology, rank);
    const Topology& t = leg_.topology;
    const bool bypass = value_.config.disable_in_eval;
    // The exchanges of experts and of stage 3's parameters are the model's own, also in the bypass:
    // ranks that share them cannot have lots of their own. Those of one tp or pp group have one
    // lot.
    if (bypass && (t.expert > 1 || leg_.stage == 3)) return;
    const bool uneven = !bypass && command.uneven && t.sequence > 1;
    uneven_ |= uneven;
    int own = bypass ? at.data * t.sequence + at.sequence : 0;
    if (uneven && rank == 0 && mutant_ != LifeMutant::kEqualLots) own = 1;
    Evaluation e{trainer->state().counters.steps, command.count + own % 3,
                 command.length + own % 4};
    const int late = bypass && mutant_ == LifeMutant::kForeignLot;
    e.loss = trainer->evaluate(kEvaluated + late, e.count, e.length).loss;
    if (uneven) reason_ = "an evaluation of different lots has ended as if nothing were wrong";
    if (bypass || rank == 0) evaluations_.push_back(e);
  }

  void save(Trainer* trainer, CheckpointEngine* files, sim::Rank& rank) {
    const TrainingState& state = trainer->state();
    const int step = static_cast<int>(state.counters.steps);
    if (step == 0) return;  // all ranks alike
    States& states = captured_[step];
    states.resize(static_cast<size_t>(leg_.topology.world()));
    states[static_cast<size_t>(rank.number())] = state;
    attempted_.push_back(step);
    if (!bridge_.unsupported(leg_).empty()) {
      rank.group(GroupKind::kWorld).barrier();  // behind it all ranks have handed theirs over
      returned_ = step;
      return;
    }
    try {
      files->save_checkpoint(state, save_dir_, {.client_state = client_state(state)});
    } catch (const Error& failure) {
      const ErrorCode code = failure.info().code;
      const bool of_disk = code == ErrorCode::kNoSpace || code == ErrorCode::kPermission ||
                           code == ErrorCode::kUnreadable || code == ErrorCode::kIncomplete;
      if (!disk_ || !of_disk) throw;
      if (rank.number() == 0) ++result_.failed_saves;
      return;
    }
    returned_ = step;
    if (rank.number() == 0) ++result_.saves;
  }

  // What `latest` says now, and whether it may say so.
  void find_durable(int before) {
    int found = before;
    const bool files = bridge_.unsupported(leg_).empty();
    if (files && storage_.is_file(save_dir_ + "/latest")) {
      const std::string tag = pointer_text();
      found = std::stoi(tag.substr(std::string("global_step").size()));
    } else if (!files && returned_ > 0) {
      found = returned_;
    }
    const bool old_or_new =
        found == before || std::ranges::find(attempted_, found) != attempted_.end();
    if (!old_or_new || found < returned_) {
      reason_ = "latest says step " + std::to_string(found) + " behind a session from step " +
                std::to_string(before) + " in which the save of step " + std::to_string(returned_) +
                " returned";
    }
    if (found == before || !reason_.empty()) return;
    durable_ = {found, files, save_dir_, leg_, std::move(captured_.at(found))};
    const std::string other = reference::difference(behind_.at(static_cast<size_t>(found)),
                                                    reference::whole_state_of(durable_.states));
    if (!other.empty()) reason_ = "saved behind step " + std::to_string(found) + ": " + other;
  }

  const LifeCase& value_;
  LifeMutant mutant_;
  const OnTrace& on_trace_;
  LifeResult& result_;
  checkpoint::MemoryStorage storage_;
  FileBridge bridge_;
  Leg leg_;
  int total_;
  std::vector<reference::WholeState> behind_;  // each step, on one rank
  Record one_;
  std::string reason_;
  std::vector<LifeCommand> pending_;
  Durable durable_;
  std::string save_dir_ = "/saved0";
  std::string from_;
  bool by_files_ = false;
  bool disk_ = false;               // faults of disks are placed in this session
  bool uneven_ = false;             // ranks of one of its evaluations were given different lots
  int resumed_ = 0;                 // ranks that have loaded in it
  bool crashed_ = false;            // the session before was ended by a fault
  int live_ = 0;                    // steps of rank 0 in this session
  int returned_ = 0;                // step of the last save of this session that returned
  std::vector<int> attempted_;      // steps of its saves
  std::map<int, States> captured_;  // what ranks had at each of them
  States last_;                     // behind the last session
  std::vector<Evaluation> evaluations_;
  reference::LayoutCache layouts_;
  int sessions_ = 0, folders_ = 0;
};

std::string text(const LifeCommand& command) {
  switch (command.kind) {
    case Kind::kStep:
      return "step " + std::to_string(command.count);
    case Kind::kEvaluate:
      return "evaluate " + std::to_string(command.count) + " of " + std::to_string(command.length) +
             " tokens" + (command.uneven ? ", unevenly" : "");
    case Kind::kSave:
      return "save";
    case Kind::kLoad:
      return "load";
    case Kind::kReshard:
      return "reshard to " + to_string(command.leg);
    case Kind::kFault:
      break;
  }
  return text_of(command.fault);
}

}  // namespace

const char* name(LifeMutant mutant) {
  constexpr const char* kNames[] = {"None",        "StaleSurvivor", "ColdMoments",
                                    "LostPointer", "EqualLots",     "ForeignLot"};
  return kNames[static_cast<size_t>(mutant)];
}

std::string difference_alone(TrainConfig config, const std::vector<Evaluation>& evaluations) {
  if (evaluations.empty()) return "";
  config.stage = 0;
  const int64_t last = std::ranges::max_element(evaluations, {}, &Evaluation::step)->step;
  std::string reason;
  sim::Cluster({}).run([&](sim::Rank& rank) {
    Trainer trainer(config, parallel_state(rank));
    trainer.initialise();
    for (int64_t step = 0; step <= last; ++step) {
      if (step > 0) trainer.step();
      for (const Evaluation& e : evaluations) {
        if (e.step != step) continue;
        const float loss = trainer.evaluate(kEvaluated, e.count, e.length).loss;
        if (std::bit_cast<uint32_t>(loss) == std::bit_cast<uint32_t>(e.loss)) continue;
        reason = "evaluation of " + std::to_string(e.count) + " of " + std::to_string(e.length) +
                 " tokens behind step " + std::to_string(step) + ": loss " + hex_float(e.loss) +
                 ", on one rank " + hex_float(loss);
      }
    }
  });
  return reason;
}

int LifeCase::steps() const {
  int total = 0;
  for (const LifeCommand& command : commands) {
    if (command.kind == Kind::kStep) total += command.count;
  }
  return std::max(total, 1);
}

LifeCase draw_life(const Draw& draw, const CaseLimits& limits, const FaultMenu& menu) {
  LifeCase value{.config = draw_config(draw)};
  value.config.disable_in_eval = draw(0, 1) == 1;
  value.seed = static_cast<uint64_t>(draw(1, 1'000'000));
  const std::vector<Topology> possible = fitting(limits.topologies, &value.config);
  const auto leg = [&] {
    const int64_t pick = draw(0, static_cast<int64_t>(possible.size()) - 1);
    return Leg{possible[static_cast<size_t>(pick)], static_cast<int>(draw(0, 3)), 0};
  };
  value.first = leg();
  for (int done = 0; done < limits.steps;) {
    LifeCommand command;
    const int64_t kind = draw(0, menu.any() ? 9 : 7);
    if (kind <= 2) {
      command.count = static_cast<int>(draw(1, std::min(limits.every, limits.steps - done)));
      done += command.count;
    } else if (kind <= 4) {
      command.kind = Kind::kSave;
    } else if (kind == 5) {
      command.kind = Kind::kReshard;
      command.leg = leg();
    } else if (kind == 6) {
      command.kind = Kind::kLoad;
    } else if (kind == 7) {
      command.kind = Kind::kEvaluate;
      command.count = static_cast<int>(draw(1, 3));
      command.length = draw(2, 9);
      command.uneven = draw(0, 2) == 1;
    } else {
      command.kind = Kind::kFault;
      command.fault = draw_fault(draw, menu);
    }
    value.commands.push_back(command);
  }
  return value;
}

LifeCase seeded_life(uint64_t seed, uint64_t number, const CaseLimits& limits,
                     const FaultMenu& menu) {
  Random random(keyed_random(seed, {number}));
  return draw_life([&](int64_t low, int64_t high) { return random.between(low, high); }, limits,
                   menu);
}

std::string text_of(const LifeCase& value) {
  std::string out = text_of(value.config) + "\nlife    on " + to_string(value.first);
  std::vector<Leg> legs = {value.first};
  for (const LifeCommand& command : value.commands) {
    out += "; " + text(command);
    if (command.kind == Kind::kReshard) legs.push_back(command.leg);
  }
  return out + text_of_memory(value.config, legs);
}

LifeResult run_life(const LifeCase& value, LifeMutant mutant, const OnTrace& on_trace) {
  LifeResult result;
  try {
    Life life(value, mutant, on_trace, &result);
    life.run();
    result.reason = life.reason();
  } catch (const std::bad_alloc&) {
    throw;
  } catch (const std::exception& failure) {
    checkpoint::throw_if_cancelled();  // then it was no failure
    result.reason = failure.what();
  }
  return result;
}

}  // namespace isoshard::properties
