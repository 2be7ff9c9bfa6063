// isoshard trace: what every rank says to every other in a few steps of a small model.
#include <cstdio>
#include <iostream>
#include <map>

#include "checkpoint/cancel.h"
#include "checkpoint/format/crc.h"
#include "checkpoint/small_file.h"
#include "core/error.h"
#include "properties/file_bridge.h"
#include "tools/sample_model.h"
#include "tools/session.h"
#include "tools/trace_picture.h"

namespace isoshard::tools {
namespace {

struct TraceOptions {
  std::string topology = "dp=2,stage=1";
  std::string model = "tiny";
  int steps = 1;
  uint64_t seed = 1;
  int ranks_per_node = 8;
  std::string config;  // a file
  std::string out;
};

// The DeepSpeed config that --config names, and a word on what of it has no effect.
SampleRun run_of(Session* session, const TraceOptions& options) {
  const std::string text =
      options.config.empty() ? "" : read_small_file(session->storage, options.config, 1 << 20);
  SampleRun run = sample_run(options.model, options.seed, options.topology, text);
  for (const std::string& key : run.without_effect) {
    session->notice("without effect here: " + key);
  }
  return run;
}

CollectiveTrace traced(Session* session, const TraceOptions& options) {
  const SampleRun run = run_of(session, options);
  const Topology& topology = run.topology;
  const reference::TrainConfig& config = run.config;
  if (topology.world() > 4096) {
    throw Error(ErrorInfo{.code = ErrorCode::kLimit,
                          .what = "A run of that size is not traced.",
                          .expected = "up to 4096 ranks",
                          .found = std::to_string(topology.world()),
                          .next = "name a smaller topology"});
  }
  sim::Cluster cluster(topology, {.seed = options.seed});
  reference::LayoutCache layouts;
  cluster.run([&](sim::Rank& rank) {
    reference::Trainer trainer(config, properties::parallel_state(rank), &layouts);
    trainer.initialise();
    for (int step = 0; step < options.steps; ++step) {
      checkpoint::throw_if_cancelled();
      trainer.step();
    }
  });
  return cluster.trace();
}

void print(const CollectiveTrace& trace) {
  std::cout << "   ticks       rank  call                 elements  group\n";
  for (const TraceEvent& e : trace.events()) {
    std::string verb = name(e.verb);
    if (e.peer >= 0)
      verb += (e.verb == Verb::kReceive ? " from " : " to ") + std::to_string(e.peer);
    if (e.verb == Verb::kBroadcast)
      verb = std::string(name(e.verb)) + " of " + std::to_string(e.peer);
    std::printf("%6lld–%-6lld  %4d  %-14s %6lld %-9s  %s, call %lld, %s\n",
                static_cast<long long>(e.begin), static_cast<long long>(e.end), e.rank,
                verb.c_str(), static_cast<long long>(e.count), name(e.dtype),
                trace.groups()[static_cast<size_t>(e.group)].c_str(),
                static_cast<long long>(e.sequence), CollectiveTrace::site_text(e.site).c_str());
  }
  std::fflush(stdout);
}

void print_lines(const Session& session, const CollectiveTrace& trace) {
  for (const TraceEvent& e : trace.events()) {
    session.print_json({{"kind", "call"},
                        {"rank", e.rank},
                        {"verb", name(e.verb)},
                        {"group", trace.groups()[static_cast<size_t>(e.group)]},
                        {"call", e.sequence},
                        {"dtype", name(e.dtype)},
                        {"elements", e.count},
                        {"peer", e.peer},
                        {"begin", e.begin},
                        {"end", e.end},
                        {"site", CollectiveTrace::site_text(e.site)}});
  }
}

void print_summary_line(const Session& session, const CollectiveTrace& trace) {
  session.print_json({{"kind", "trace_summary"},
                      {"calls", trace.events().size()},
                      {"trace_hash", checkpoint::hex16(trace.hash())}});
}

void summarise(const CollectiveTrace& trace) {
  std::map<std::string, std::pair<int64_t, int64_t>> verbs;  // calls, elements
  int64_t ticks = 0;
  for (const TraceEvent& e : trace.events()) {
    auto& [calls, elements] = verbs[name(e.verb)];
    ++calls;
    elements += e.count;
    ticks = std::max(ticks, e.end);
  }
  std::cout << trace.events().size() << " calls in " << ticks << " ticks, trace hash "
            << checkpoint::hex16(trace.hash()) << "\n";
  for (const auto& [verb, count] : verbs) {
    std::printf("  %-15s %7lld calls %10lld elements handed over\n", verb.c_str(),
                static_cast<long long>(count.first), static_cast<long long>(count.second));
  }
  std::fflush(stdout);
}

}  // namespace

void add_trace(CLI::App* app, Session* session) {
  CLI::App* verb = app->add_subcommand(
      "trace", "Every call between simulated ranks, printed or as Chrome's and Perfetto's JSON");
  auto options = std::make_shared<TraceOptions>();
  verb->set_help_flag("-h,--help", "This page");
  verb->add_option("--topology", options->topology, "dp=,sp=,tp=,ep=,pp=,stage= (dp=2,stage=1)");
  verb->add_option("--model", options->model, std::string(kSampleModels) + " (tiny)");
  verb->add_option("--config", options->config,
                   "A DeepSpeed config (JSON) that says stage, tp, sp, ep, dtype, optimizer, "
                   "schedule, clipping and batches");
  verb->add_option("--steps", options->steps, "Steps that are trained (1)")
      ->check(CLI::Range(1, 1000));
  verb->add_option("--seed", options->seed, "Of weights, tokens and the order of events (1)")
      ->check(CLI::Range(0, 999999999));
  verb->add_option("--out", options->out,
                   "Write the JSON here and print the summary alone; a file that is there is "
                   "replaced");
  verb->add_option("--ranks-per-node", options->ranks_per_node,
                   "How ranks are put into processes there (8)")
      ->check(CLI::Range(1, 4096));
  verb->add_flag("--json", session->json, "One JSON object a line");
  verb->callback([session, options] {
    const CollectiveTrace trace = traced(session, *options);
    if (!options->out.empty()) {
      checkpoint::replace_small_file(session->storage, options->out,
                                     perfetto_json(trace, options->ranks_per_node));
    }
    if (session->json) {
      if (options->out.empty()) print_lines(*session, trace);
      return print_summary_line(*session, trace);
    }
    if (options->out.empty()) print(trace);
    summarise(trace);
  });
}

}  // namespace isoshard::tools
