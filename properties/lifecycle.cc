// See lifecycle.h. A session is what happens between two loads: one run of a cluster.
#include "properties/lifecycle.h"

#include <algorithm>
#include <map>
#include <new>
#include <sstream>

#include "checkpoint/cancel.h"
#include "checkpoint/publication.h"
#include "core/error.h"
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
        one_(single_rank(value.config, total_)) {}

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
    States states(static_cast<size_t>(leg_.topology.world()));
    const uint64_t seed = keyed_random(value_.seed, {static_cast<uint64_t>(++sessions_)});
    sim::Cluster cluster(leg_.topology, {.seed = seed, .faults = faults});
    const TraceTeller teller{cluster, leg_, on_trace_};
    layouts_.clear();
    bool ended = true;
    try {
      cluster.run([&](sim::Rank& rank) {
        run_rank(rank, commands, &states[static_cast<size_t>(rank.number())]);
      });
      ended = cluster.dead().empty();
    } catch (const Error& failure) {
      checkpoint::throw_if_cancelled();
      if (!explained(failure, cluster)) throw;
      ended = false;
    }
    if (!ended && mutant_ == LifeMutant::kLostPointer) put_back(pointer);
    count(cluster.struck());
    result_.trace_hash = mix(result_.trace_hash ^ cluster.trace().hash());
    result_.events += static_cast<int64_t>(cluster.trace().events().size());
    find_durable(before);
    crashed_ = !ended;
    if (!ended) {
      ++result_.crashes;
      result_.redone += std::max(0, live_ - durable_.step);
      live_ = 0;
    }
    last_ = std::move(states);
  }

  // Whether a session may end like that, given the faults that were placed in it.
  bool explained(const Error& failure, const sim::Cluster& cluster) const {
    const ErrorCode code = failure.info().code;
    const auto struck = [&](auto kind) { return std::ranges::any_of(cluster.struck(), kind); };
    if (code == ErrorCode::kInterrupted) return !cluster.dead().empty();
    if (code == ErrorCode::kMismatch) {
      return struck([](sim::FaultKind kind) { return kind == sim::FaultKind::kDrop; });
    }
    return struck(sim::is_of_disk) && resumed_ < leg_.topology.world();  // a load met the disk
  }

  void count(const std::vector<sim::FaultKind>& struck) {
    for (const sim::FaultKind kind : struck) {
      result_.disk_faults += sim::is_of_disk(kind);
      result_.deaths += kind == sim::FaultKind::kDieBefore;
      result_.drops += kind == sim::FaultKind::kDrop;
      result_.slow_ranks += kind == sim::FaultKind::kSlow;
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
          evaluate(&trainer, rank, command.count);
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

  // In the bypass each rank has other samples where no exchange of the model binds it to others.
  void evaluate(Trainer* trainer, const sim::Rank& rank, int count) {
    const Topology& t = leg_.topology;
    const bool alone = t.tensor == 1 && t.pipeline == 1 && t.expert == 1 && leg_.stage < 3;
    if (value_.config.disable_in_eval && !alone) return;
    trainer->evaluate(1000, count + (value_.config.disable_in_eval ? rank.number() % 3 : 0));
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
  }

  const LifeCase& value_;
  LifeMutant mutant_;
  const OnTrace& on_trace_;
  LifeResult& result_;
  checkpoint::MemoryStorage storage_;
  FileBridge bridge_;
  Leg leg_;
  int total_;
  Record one_;
  std::string reason_;
  std::vector<LifeCommand> pending_;
  Durable durable_;
  std::string save_dir_ = "/saved0";
  std::string from_;
  bool by_files_ = false;
  bool disk_ = false;               // faults of disks are placed in this session
  int resumed_ = 0;                 // ranks that have loaded in it
  bool crashed_ = false;            // the session before was ended by a fault
  int live_ = 0;                    // steps of rank 0 in this session
  int returned_ = 0;                // step of the last save of this session that returned
  std::vector<int> attempted_;      // steps of its saves
  std::map<int, States> captured_;  // what ranks had at each of them
  States last_;                     // behind the last session
  reference::LayoutCache layouts_;
  int sessions_ = 0, folders_ = 0;
};

sim::Fault draw_fault(const Draw& draw, const FaultMenu& menu) {
  using sim::FaultKind;
  std::vector<FaultKind> kinds;
  if (menu.death) kinds = {FaultKind::kDieBefore, FaultKind::kDieInside, FaultKind::kDieAfter};
  if (menu.disk) {
    kinds.insert(kinds.end(), {FaultKind::kDiskFull, FaultKind::kQuota, FaultKind::kReadOnly,
                               FaultKind::kNoPermission, FaultKind::kStaleHandle});
  }
  if (menu.drop) kinds.push_back(FaultKind::kDrop);
  if (menu.slow) kinds.push_back(FaultKind::kSlow);
  // Any operation is as likely, or the early ones are: a load, a first step, a save of a few.
  const int64_t most = draw(0, 1) == 0 ? int64_t{4} << draw(0, 8) : 800;
  return {.kind = kinds[static_cast<size_t>(draw(0, static_cast<int64_t>(kinds.size()) - 1))],
          .rank = static_cast<int>(draw(0, 7)),
          .operation = draw(0, most)};
}

std::string text(const LifeCommand& command) {
  switch (command.kind) {
    case Kind::kStep:
      return "step " + std::to_string(command.count);
    case Kind::kEvaluate:
      return "evaluate " + std::to_string(command.count);
    case Kind::kSave:
      return "save";
    case Kind::kLoad:
      return "load";
    case Kind::kReshard:
      return "reshard to " + to_string(command.leg);
    case Kind::kFault:
      break;
  }
  return std::string(sim::name(command.fault.kind)) + " at operation " +
         std::to_string(command.fault.operation) + " of rank " +
         std::to_string(command.fault.rank) + ", modulo the ranks";
}

}  // namespace

const char* name(LifeMutant mutant) {
  constexpr const char* kNames[] = {"None", "StaleSurvivor", "ColdMoments", "LostPointer"};
  return kNames[static_cast<size_t>(mutant)];
}

int LifeCase::steps() const {
  int total = 0;
  for (const LifeCommand& command : commands) {
    if (command.kind == Kind::kStep) total += command.count;
  }
  return std::max(total, 1);
}

FaultMenu parse_faults(const std::string& text) {
  FaultMenu menu;
  std::istringstream words(text);
  for (std::string word; std::getline(words, word, ',');) {
    const bool all = word == "all";
    menu.death |= all || word == "death";
    menu.disk |= all || word == "disk";
    menu.drop |= all || word == "drop";
    menu.slow |= all || word == "slow";
    if (all || word == "death" || word == "disk" || word == "drop" || word == "slow") continue;
    throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                          .what = "There is no such fault.",
                          .entry = quote(word),
                          .expected = "all, or some of death,disk,drop,slow",
                          .next = "correct --faults"});
  }
  return menu;
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
  for (const LifeCommand& command : value.commands) out += "; " + text(command);
  return out;
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
