// isoshard simulate, replay, topologies: made-up runs on simulated ranks, judged against one rank.
#include <atomic>
#include <chrono>
#include <exception>
#include <iostream>
#include <map>
#include <mutex>
#include <thread>

#include "checkpoint/format/crc.h"
#include "checkpoint/small_file.h"
#include "core/error.h"
#include "core/hex_float.h"
#include "core/random.h"
#include "core/threads.h"
#include "properties/lifecycle.h"
#include "sim/topologies/catalog.h"
#include "tools/report.h"
#include "tools/session.h"
#include "tools/trace_picture.h"
#include "tools/version.h"

namespace isoshard::tools {
namespace {

using properties::CaseLimits;
using properties::CaseResult;
using properties::LifeMutant;

struct SimulateOptions {
  std::string topologies = "world<=8";
  uint64_t seed = 1;
  int64_t cases = 100;
  int steps = 20;
  int every = 3;
  std::string faults;
  std::string mutant;
  std::string report;
  std::string demo;
};

// By its name; "": none.
LifeMutant life_mutant(const std::string& text) {
  if (text.empty()) return LifeMutant::kNone;
  for (const LifeMutant mutant :
       {LifeMutant::kStaleSurvivor, LifeMutant::kColdMoments, LifeMutant::kLostPointer,
        LifeMutant::kEqualLots, LifeMutant::kForeignLot}) {
    if (text == properties::name(mutant)) return mutant;
  }
  throw Error(
      ErrorInfo{.code = ErrorCode::kUsage,
                .what = "There is no such mutant.",
                .entry = quote(text),
                .expected = "StaleSurvivor, ColdMoments, LostPointer, EqualLots or ForeignLot",
                .next = "correct --mutant"});
}

// A case by its number, in words and run: legs, or with --faults a life.
std::string case_text(const SimulateOptions& options, const CaseLimits& limits, int64_t number) {
  const uint64_t which = static_cast<uint64_t>(number);
  if (options.faults.empty()) return text_of(seeded_case(options.seed, which, limits));
  return text_of(properties::seeded_life(options.seed, which, limits,
                                         properties::parse_faults(options.faults)));
}

properties::LifeResult case_result(const SimulateOptions& options, const CaseLimits& limits,
                                   int64_t number, const properties::OnTrace& on_trace = {}) {
  const uint64_t which = static_cast<uint64_t>(number);
  if (options.faults.empty()) return {run_case(seeded_case(options.seed, which, limits), on_trace)};
  return run_life(properties::seeded_life(options.seed, which, limits,
                                          properties::parse_faults(options.faults)),
                  life_mutant(options.mutant), on_trace);
}

CaseLimits limits_of(const SimulateOptions& options) {
  if (options.cases < 1 || options.steps < 1 || options.every < 1) {
    throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                          .what = "There is nothing to simulate.",
                          .expected = "--cases, --steps and --reshard-every of 1 or more",
                          .next = "give a larger number"});
  }
  if (!options.faults.empty()) properties::parse_faults(options.faults);
  if (life_mutant(options.mutant) != LifeMutant::kNone && options.faults.empty()) {
    throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                          .what = "Only lives have mutants, and --faults makes lives.",
                          .entry = "--mutant " + options.mutant,
                          .next = "add --faults death"});
  }
  return {sim::select_topologies(options.topologies), options.steps, options.every};
}

std::string case_flags(const SimulateOptions& options) {
  std::string text;
  const SimulateOptions plain;
  if (options.topologies != plain.topologies) {
    text += " --topologies '" + options.topologies + "'";
  }
  if (options.steps != plain.steps) text += " --steps " + std::to_string(options.steps);
  if (options.every != plain.every) text += " --reshard-every " + std::to_string(options.every);
  if (!options.faults.empty()) text += " --faults " + options.faults;
  if (!options.mutant.empty()) text += " --mutant " + options.mutant;
  return text;
}

std::string replay_command(const SimulateOptions& options, int64_t number) {
  return "isoshard replay --seed " + std::to_string(options.seed) + " --case " +
         std::to_string(number) + case_flags(options);
}

std::string simulate_command(const SimulateOptions& options) {
  return "isoshard simulate --seed " + std::to_string(options.seed) + " --cases " +
         std::to_string(options.cases) + case_flags(options);
}

// What all cases together have shown.
class Tally {
 public:
  Tally(Session* session, const SimulateOptions& options, const CaseLimits& limits)
      : session_(*session), options_(options), limits_(limits) {}

  void run() {
    if (!options_.report.empty()) {  // where it cannot be written, that is told now
      const std::string probe = options_.report + ".isoshard-probe";
      session_.storage.create(probe)->close();
      session_.storage.remove_file(probe);
    }
    const auto work = [this] {
      try {
        for (int64_t number = next_++; number < options_.cases; number = next_++) {
          std::vector<properties::Leg> legs;  // that ran, for the page
          const auto on_trace = [&](const CollectiveTrace&, const properties::Leg& leg) {
            legs.push_back(leg);
          };
          const properties::LifeResult result = case_result(options_, limits_, number, on_trace);
          take(number, result, legs);
        }
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!failure_) failure_ = std::current_exception();
        next_ = options_.cases;
      }
    };
    const int workers = session_.workers > 0
                            ? session_.workers
                            : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
    std::vector<std::thread> threads;
    for (int i = 1; i < workers; ++i) try_start(&threads, work);
    work();
    for (std::thread& thread : threads) thread.join();
    if (failure_) std::rethrow_exception(failure_);
    const double seconds = elapsed();
    report(seconds);
    if (!options_.report.empty()) write_report(seconds);
  }

 private:
  void take(int64_t number, const properties::LifeResult& result,
            const std::vector<properties::Leg>& legs) {
    const std::lock_guard<std::mutex> lock(mutex_);
    ++done_;
    hashes_ += keyed_random(static_cast<uint64_t>(number), {result.trace_hash});  // any order
    events_ += result.events;
    changes_ += result.changes;
    files_ += result.files_changes;
    saves_ += result.saves;
    failed_saves_ += result.failed_saves;
    crashes_ += result.crashes;
    redone_ += result.redone;
    for (size_t i = 0; i < legs.size(); ++i) {
      auto& [cases, failed] =
          matrix_[isoshard::to_string(legs[i].topology)][static_cast<size_t>(legs[i].stage)];
      ++cases;
      failed += !result.reason.empty() && i + 1 == legs.size();  // where it ended
    }
    deaths_ += result.deaths;
    disk_faults_ += result.disk_faults;
    drops_ += result.drops;
    slow_ranks_ += result.slow_ranks;
    late_ += result.late_calls;
    duplicates_ += result.duplicates;
    corruptions_ += result.corruptions;
    struck_ += result.struck();
    if (!result.reason.empty()) {
      ++failed_;
      if (first_ < 0 || number < first_) {
        first_ = number;
        reason_ = result.reason;
      }
    }
    const double seconds = elapsed();
    if (!session_.no_progress && !session_.quiet && !session_.json && seconds >= told_ + 1.0) {
      told_ = seconds;
      std::cerr << "\r" << done_ << " of " << options_.cases << " cases, " << failed_ << " failed, "
                << static_cast<int64_t>(60.0 * static_cast<double>(done_) / seconds) << " a minute "
                << std::flush;
      line_ = true;
    }
  }

  void report(double seconds) {
    if (line_) std::cerr << "\n";
    if (failed_ > 0) {
      session_.status = kAnswerIsNo;
      std::cerr << "case " << first_ << " failed: " << reason_ << "\n"
                << case_text(options_, limits_, first_) << "\n"
                << replay_command(options_, first_) << "\n";
    }
    const std::string hash = checkpoint::hex16(mix(hashes_));
    if (!options_.faults.empty() && struck_ == 0) {
      session_.notice(
          "no fault has struck: take more cases or steps, or other topologies "
          "(messages get lost between pipeline stages alone)");
    }
    if (session_.json) {
      nlohmann::ordered_json line = {{"kind", "simulation"},
                                     {"cases", done_},
                                     {"failed", failed_},
                                     {"seed", options_.seed},
                                     {"trace_hash", hash},
                                     {"seconds", seconds},
                                     {"topologies", limits_.topologies.size()},
                                     {"changes", changes_},
                                     {"files_resharded", files_},
                                     {"events", events_}};
      if (!options_.faults.empty()) {
        line["saves"] = saves_;
        line["failed_saves"] = failed_saves_;
        line["crashes"] = crashes_;
        line["steps_done_again"] = redone_;
        line["struck"] = {{"death", deaths_},       {"disk", disk_faults_},
                          {"drop", drops_},         {"slow", slow_ranks_},
                          {"late", late_},          {"duplicate", duplicates_},
                          {"corrupt", corruptions_}};
      }
      if (failed_ > 0) {
        line["first_failed"] = first_;
        line["reason"] = reason_;
        line["replay"] = replay_command(options_, first_);
      }
      session_.print_json(line);
      return;
    }
    std::cout << done_ << " cases, " << failed_ << " failed, seed " << options_.seed
              << ", trace hash " << hash << "\n"
              << "drawn from " << limits_.topologies.size() << " topologies, " << changes_
              << " changes of topology and stage, DeepSpeed's files resharded " << files_
              << " times (the others in memory: docs/KNOWN_GAPS.md), " << events_
              << " events between ranks\n";
    if (!options_.faults.empty()) {
      std::cout << fault_counters() << "\n";
    }
    std::cout << static_cast<int64_t>(60.0 * static_cast<double>(done_) / seconds)
              << " cases a minute\n";
  }

  std::string fault_counters() const {
    return "faults that struck: " + std::to_string(deaths_) + " deaths, " +
           std::to_string(disk_faults_) + " of disks, " + std::to_string(drops_) +
           " lost messages, " + std::to_string(slow_ranks_) + " slow ranks, " +
           std::to_string(late_) + " late calls, " + std::to_string(duplicates_) +
           " messages twice, " + std::to_string(corruptions_) + " corrupt ones\n" +
           std::to_string(crashes_) + " sessions ended by a fault, " + std::to_string(redone_) +
           " steps done again, " + std::to_string(saves_) + " saves, " +
           std::to_string(failed_saves_) + " failed by a disk";
  }

  void write_report(double seconds) {
    SimulationReport page{.command = simulate_command(options_),
                          .cases = done_,
                          .failed = failed_,
                          .seconds = seconds,
                          .matrix = matrix_};
    page.program = program_version() + ", seed " + std::to_string(options_.seed) + ", trace hash " +
                   checkpoint::hex16(mix(hashes_));
    page.shown = std::max<int64_t>(first_, 0);
    page.text = case_text(options_, limits_, page.shown);
    page.replay = replay_command(options_, page.shown);
    page.reason = failed_ > 0 ? reason_ : "";
    page.counters = std::to_string(changes_) + " changes of topology and stage, " +
                    "DeepSpeed's files resharded " + std::to_string(files_) + " times, " +
                    std::to_string(events_) + " events between ranks";
    if (!options_.faults.empty()) page.counters += "\n" + fault_counters();
    case_result(options_, limits_, page.shown,
                [&](const CollectiveTrace& trace, const properties::Leg& leg) {
                  page.leg = to_string(leg);
                  page.picture = svg_picture(trace, 400);
                });
    checkpoint::replace_small_file(session_.storage, options_.report, report_html(page));
  }

  double elapsed() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

  Session& session_;
  const SimulateOptions& options_;
  const CaseLimits& limits_;
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  std::atomic<int64_t> next_{0};
  std::mutex mutex_;
  std::exception_ptr failure_;
  int64_t done_ = 0, failed_ = 0, first_ = -1, events_ = 0, changes_ = 0, files_ = 0;
  int64_t saves_ = 0, failed_saves_ = 0, crashes_ = 0, redone_ = 0;
  int64_t deaths_ = 0, disk_faults_ = 0, drops_ = 0, slow_ranks_ = 0;
  int64_t late_ = 0, duplicates_ = 0, corruptions_ = 0, struck_ = 0;
  std::map<std::string, std::array<std::pair<int64_t, int64_t>, 4>> matrix_;
  uint64_t hashes_ = 0;
  double told_ = 0;
  bool line_ = false;
  std::string reason_;
};

// Two columns of losses: one rank, and a run that changes its topology every few steps.
void elastic(Session* session) {
  reference::TrainConfig config;
  config.model.experts = 4;
  config.model.layers = 2;
  config.schedule.max_lr = 0.02;
  const std::vector<properties::Leg> legs = {{{.data = 2, .tensor = 2}, 1},
                                             {{.sequence = 4}, 3},
                                             {{.data = 6, .expert = 2}, 2},
                                             {{.data = 5}, 3},
                                             {{.data = 2, .expert = 2, .pipeline = 2}, 0},
                                             {{.data = 1}, 0}};
  properties::Simulation simulation(config, 1);
  int steps = 0;
  for (const properties::Leg& leg : legs) {
    simulation.run(leg);
    steps += leg.steps;
  }
  const properties::Record one = properties::single_rank(config, steps);
  size_t at = 0;
  std::cout << "step  one rank         elastic\n";
  for (const properties::Leg& leg : legs) {
    for (int i = 0; i < leg.steps; ++i, ++at) {
      std::printf("%4zu  %-15s  %-15s  %s\n", at + 1, hex_float(one.steps[at].loss).c_str(),
                  hex_float(simulation.record().steps[at].loss).c_str(), to_string(leg).c_str());
    }
  }
  std::fflush(stdout);
  const std::string reason = difference(one, simulation.record());
  std::cout << (reason.empty() ? "equal, bit for bit: losses, norms, parameters, moments"
                               : "different: " + reason)
            << "\n";
  if (!reason.empty()) session->status = kAnswerIsNo;
}

// Digits alone, so that nothing wraps or stands for 0.
std::string not_whole(const std::string& text) {
  const bool digits = !text.empty() && text.find_first_not_of("0123456789") == std::string::npos;
  return digits && text.size() <= 9 ? "" : quote(text) + " is no whole number below 10^9";
}

void add_case_flags(CLI::App* verb, SimulateOptions* options) {
  verb->set_help_flag("-h,--help", "This page");
  verb->add_option("--topologies", options->topologies,
                   "What is drawn from: 'world<=8' (the default), a family or a name of `isoshard "
                   "topologies`, or dp=2,sp=4; several "
                   "with spaces between");
  verb->add_option("--seed", options->seed, "Of everything that is drawn (1)")->check(not_whole);
  verb->add_option("--steps", options->steps, "Steps of a run (20)")->check(not_whole);
  verb->add_option("--reshard-every", options->every,
                   "Steps between two changes of topology and stage (3)")
      ->check(not_whole);
  verb->add_option(
          "--faults", options->faults,
          std::string("Lives instead: steps, evaluations, saves, loads and reshards in any "
                      "order, and faults at any operation: all, or some of ") +
              properties::kFaultWords +
              "; or corrupt, a flipped bit that no rank notices, so that most such lives fail")
      ->check([](const std::string& text) {
        return text.empty() ? std::string("no fault is named") : std::string();
      });
  verb->add_option("--mutant", options->mutant,
                   "A mistake that every life makes, to see what a failure looks like: "
                   "StaleSurvivor, ColdMoments, LostPointer, EqualLots or ForeignLot");
}

void add_replay(CLI::App* app, Session* session) {
  CLI::App* verb = app->add_subcommand("replay", "One case of simulate again, in words");
  auto options = std::make_shared<SimulateOptions>();
  auto number = std::make_shared<int64_t>(0);
  add_case_flags(verb, options.get());
  verb->add_option("--case", *number, "Its number, from 0 on")->required()->check(not_whole);
  verb->add_flag("--json", session->json, "One JSON object a line");
  verb->callback([session, options, number] {
    const CaseLimits limits = limits_of(*options);
    const std::string text = case_text(*options, limits, *number);
    session->say(text);
    const CaseResult result = case_result(*options, limits, *number);
    if (session->json) {
      session->print_json({{"kind", "replay"},
                           {"case", *number},
                           {"seed", options->seed},
                           {"text", text},
                           {"equal", result.reason.empty()},
                           {"reason", result.reason},
                           {"trace_hash", checkpoint::hex16(result.trace_hash)}});
    }
    session->say(result.reason.empty() ? "equal to the run on one rank" : result.reason);
    if (!result.reason.empty()) session->status = kAnswerIsNo;
  });
}

}  // namespace

void add_simulate(CLI::App* app, Session* session) {
  CLI::App* verb = app->add_subcommand(
      "simulate",
      "Train, save, reshard and resume made-up runs on simulated ranks; each must be "
      "the run on one rank, bit for bit");
  auto options = std::make_shared<SimulateOptions>();
  add_case_flags(verb, options.get());
  verb->add_option("--cases", options->cases, "How many runs (100)")->check(not_whole);
  verb->add_option("--report", options->report,
                   "Write a page (HTML) of what ran and of the first failing case; replaced if "
                   "there")
      ->check([](const std::string& text) {
        return text.empty() ? std::string("no file is named") : std::string();
      });
  CLI::Option* demo = verb->add_option(
      "--demo", options->demo, "elastic, alone: one run, its losses beside those of one rank");
  demo->check(CLI::IsMember({"elastic"}));
  verb->add_flag("--json", session->json, "One JSON object a line");
  verb->add_flag("--quiet", session->quiet, "Errors and the summary only");
  verb->add_flag("--no-progress", session->no_progress, "No progress line");
  verb->add_option("--workers", session->workers, "Runs at a time (all processors)")
      ->check(CLI::Range(1, 256));
  for (CLI::Option* other : verb->get_options()) {
    if (other != demo && other != verb->get_help_ptr()) demo->excludes(other);
  }
  verb->callback([session, options] {
    if (!options->demo.empty()) return elastic(session);
    const CaseLimits limits = limits_of(*options);
    Tally(session, *options, limits).run();
  });
  add_replay(app, session);
  CLI::App* list = app->add_subcommand("topologies", "The topologies that simulate knows by name");
  list->set_help_flag("-h,--help", "This page");
  list->add_flag("--json", session->json, "One JSON object a line");
  list->callback([session] {
    for (const sim::NamedTopology& entry : sim::catalog()) {
      const Topology& t = entry.topology;
      if (session->json) {
        session->print_json({{"kind", "topology"},
                             {"name", entry.name},
                             {"ranks", t.world()},
                             {"dp", t.data},
                             {"sp", t.sequence},
                             {"tp", t.tensor},
                             {"ep", t.expert},
                             {"pp", t.pipeline}});
        continue;
      }
      std::printf("%-32s %3d ranks\n", entry.name.c_str(), entry.topology.world());
    }
  });
}

}  // namespace isoshard::tools
