// isoshard golden: a checkpoint in DeepSpeed's layout and what must be in it, from a seed alone.
//
//   OUT/ckpt/global_stepN/…, OUT/ckpt/latest     as the ranks of a simulated run have saved it
//   OUT/golden.h5     whole/NAME/STATE             whole tensors
//                     ranks/R/NAME/STATE           the run of elements that rank R holds of its
//                                                  shard, from `begin` on; the shard begins at
//                                                  `split_begin` of axis `split_axis` (−1: whole)
//                     losses, norms, trace         of the run
//   OUT/golden.json   what was asked for, the digest of the trace, losses as hexadecimal floats
#include <algorithm>
#include <cstdio>
#include <iostream>

#include "checkpoint/cancel.h"
#include "checkpoint/format/crc.h"
#include "checkpoint/format/hdf5.h"
#include "checkpoint/publication.h"
#include "checkpoint/small_file.h"
#include "core/error.h"
#include "core/hex_float.h"
#include "properties/simulation.h"
#include "tools/sample_model.h"
#include "tools/session.h"

namespace isoshard::tools {
namespace {

using engine::Json;
using reference::TrainConfig;
using reference::Trainer;

struct GoldenOptions {
  std::string topology = "dp=2,stage=1";
  std::string model = "llama";
  int steps = 3;
  uint64_t seed = 1;
  std::string config;  // the DeepSpeed config's text
  std::string out;
  std::string check;
  bool overwrite = false;
};

// Texts by number, in the order in which they came.
class Legend {
 public:
  int64_t number(const std::string& text) {
    const auto found = std::ranges::find(texts_, text);
    if (found != texts_.end()) return found - texts_.begin();
    texts_.push_back(text);
    return static_cast<int64_t>(texts_.size()) - 1;
  }
  std::string text() const {
    std::string joined;
    for (const std::string& text : texts_) joined += (joined.empty() ? "" : ",") + text;
    return joined;
  }

 private:
  std::vector<std::string> texts_;
};

class Golden {
 public:
  Golden(const GoldenOptions& options, Storage& storage) : options_(options), storage_(storage) {
    SampleRun run = sample_run(options.model, options.seed, options.topology, options.config);
    config_ = run.config;
    without_effect_ = std::move(run.without_effect);
    leg_ = {run.topology, config_.stage, options.steps};
    if (leg_.topology.world() > 1024) {
      throw Error(ErrorInfo{.code = ErrorCode::kLimit,
                            .what = "A golden folder of so many ranks is not made.",
                            .entry = options.topology,
                            .expected = "up to 1024 ranks",
                            .found = std::to_string(leg_.topology.world()) + " ranks",
                            .next = "choose fewer ranks"});
    }
    check_topology(leg_.topology);
    reference::check_model(config_.model, leg_.topology);
    const std::string why = properties::FileBridge::unsupported(config_, leg_);
    if (why.empty()) return;
    throw Error(ErrorInfo{.code = ErrorCode::kUnsupported,
                          .what = "This run has no files of DeepSpeed's: " + why + ".",
                          .entry = to_string(leg_),
                          .safe = "nothing was written",
                          .next = "choose another topology, stage or model; isoshard simulate "
                                  "--topologies … runs others like it in memory"});
  }

  // Everything under `folder`, which exists.
  void write(const std::string& folder) {
    sim::Cluster cluster(leg_.topology, {.seed = options_.seed});
    std::vector<std::unique_ptr<Trainer>> trainers(static_cast<size_t>(leg_.topology.world()));
    std::vector<reference::StepReport> reports;
    cluster.run([&](sim::Rank& rank) {
      const ParallelState parallel = properties::parallel_state(rank);
      auto& trainer = trainers[static_cast<size_t>(rank.number())];
      trainer = std::make_unique<Trainer>(config_, parallel);
      trainer->initialise();
      for (int step = 0; step < leg_.steps; ++step) {
        checkpoint::throw_if_cancelled();
        const reference::StepReport report = trainer->step();
        if (rank.number() == 0) reports.push_back(report);
      }
    });
    const CollectiveTrace trace = cluster.trace();  // of the steps: a save says the folder's name
    cluster.run([&](sim::Rank& rank) {
      const ParallelState parallel = properties::parallel_state(rank);
      const auto& trainer = trainers[static_cast<size_t>(rank.number())];
      engine::CheckpointEngine(storage_, parallel, saved_config(), [](const std::string&) {
      }).save_checkpoint(trainer->state(), folder + "/ckpt", {});
    });
    std::vector<const TrainingState*> states;
    for (const auto& trainer : trainers) states.push_back(&trainer->state());
    checkpoint::write_new_file(storage_, folder + "/golden.h5", hdf5(states, reports, trace));
    checkpoint::write_new_file(storage_, folder + "/golden.json",
                               description(reports, trace).dump(1) + "\n");
  }

  const std::vector<std::string>& without_effect() const { return without_effect_; }

 private:
  // What the checkpoint says it was trained by: the config that was given, and the degrees that it
  // leaves to --topology.
  Json saved_config() const {
    const Json made = properties::deepspeed_config(config_, leg_.topology, leg_.stage);
    if (options_.config.empty()) return made;
    Json config = Json::parse(options_.config);
    for (const char* key :
         {"zero_optimization", "tensor_parallel", "sequence_parallel_size", "expert_parallel"}) {
      if (made.contains(key) && !config.contains(key)) config[key] = made[key];
    }
    return config;
  }

  std::string hdf5(const std::vector<const TrainingState*>& states,
                   const std::vector<reference::StepReport>& reports,
                   const CollectiveTrace& trace) const {
    checkpoint::Hdf5File file;
    std::map<std::string, Shape> shapes;
    for (const TrainingState* state : states) {
      for (const TrainedParameter& p : state->parameters) shapes[p.name] = p.whole;
    }
    for (const auto& [key, values] : reference::whole_state(states)) {
      file.floats("whole/" + key.first + "/" + key.second, shapes.at(key.first), values);
    }
    for (size_t rank = 0; rank < states.size(); ++rank) {
      for (const TrainedGroup& group : states[rank]->groups) {
        for (const BufferPiece& piece : group.pieces) {
          if (piece.count == 0) continue;
          const TrainedParameter& p =
              states[rank]->parameters[static_cast<size_t>(piece.parameter)];
          const auto add = [&](const std::string& name, const std::vector<float>& values) {
            const std::string path = "ranks/" + std::to_string(rank) + "/" + p.name + "/" + name;
            file.floats(path, {piece.count},
                        std::span(values).subspan(static_cast<size_t>(piece.at),
                                                  static_cast<size_t>(piece.count)));
            file.attribute(path, "begin", piece.begin);
            file.attribute(path, "split_axis", static_cast<int64_t>(p.split_axis));
            file.attribute(path, "split_begin", p.split_begin);
          };
          add("fp32", group.master);
          for (const auto& [name, values] : group.states) add(name, values);
        }
      }
    }
    std::vector<float> losses;
    std::vector<double> norms;
    for (const reference::StepReport& report : reports) {
      losses.push_back(report.loss);
      norms.push_back(report.norm);
    }
    file.floats("losses", {static_cast<int64_t>(losses.size())}, losses);
    file.doubles("norms", {static_cast<int64_t>(norms.size())}, norms);
    add_trace(trace, &file);
    return file.finish();
  }

  // Numbers, and as attributes what they stand for; the groups' names are in golden.json.
  static void add_trace(const CollectiveTrace& trace, checkpoint::Hdf5File* file) {
    Legend verbs, dtypes, sites;
    std::vector<int64_t> events;
    for (const TraceEvent& e : trace.events()) {
      for (const int64_t value :
           {int64_t{e.rank}, verbs.number(isoshard::name(e.verb)), int64_t{e.group}, e.sequence,
            dtypes.number(isoshard::name(e.dtype)), e.count, int64_t{e.peer}, e.begin, e.end,
            sites.number(CollectiveTrace::site_text(e.site))}) {
        events.push_back(value);
      }
    }
    file->integers("trace", {static_cast<int64_t>(trace.events().size()), 10}, events);
    file->attribute("trace", "columns", "rank,verb,group,sequence,dtype,count,peer,begin,end,site");
    file->attribute("trace", "verbs", verbs.text());
    file->attribute("trace", "dtypes", dtypes.text());
    file->attribute("trace", "sites", sites.text());
  }

  Json description(const std::vector<reference::StepReport>& reports,
                   const CollectiveTrace& trace) const {
    Json losses = Json::array();
    for (const reference::StepReport& report : reports) losses.push_back(hex_float(report.loss));
    const std::string hash = checkpoint::hex16(trace.hash());
    Json told = {{"schema", 1},
                 {"kind", "golden"},
                 {"topology", options_.topology},
                 {"model", options_.model},
                 {"steps", options_.steps},
                 {"seed", options_.seed},
                 {"losses", losses},
                 {"trace_hash", hash},
                 {"groups", trace.groups()}};
    if (!options_.config.empty()) told["config"] = Json::parse(options_.config);
    return told;
  }

  const GoldenOptions& options_;
  Storage& storage_;
  TrainConfig config_;
  std::vector<std::string> without_effect_;
  properties::Leg leg_;
};

void list_files(Storage& storage, const std::string& folder, const std::string& prefix,
                std::vector<std::string>* files) {
  for (const DirectoryEntry& entry : storage.list(folder + prefix)) {
    const std::string path = prefix + "/" + entry.name;
    if (entry.kind == DirectoryEntry::Kind::kDirectory)
      list_files(storage, folder, path, files);
    else
      files->push_back(path);
  }
}

// What a golden folder says was asked for.
class Description {
 public:
  Description(Storage& disk, const std::string& folder) : path_(folder + "/golden.json") {
    try {
      told_ = Json::parse(read_small_file(disk, path_, 1 << 20));
    } catch (const nlohmann::json::exception& error) {
      fail("This is no description of a golden folder.", "", "JSON", error.what());
    }
    if (!told_.is_object() || told_.value("schema", Json()) != 1 ||
        told_.value("kind", Json()) != "golden") {
      fail("This is no description of a golden folder, or of another version.", "schema, kind",
           "1, \"golden\"", "other values");
    }
  }

  GoldenOptions options() const {
    GoldenOptions options;
    options.topology = text("topology");
    options.model = text("model");
    options.steps = static_cast<int>(number("steps", 10'000));
    options.seed = static_cast<uint64_t>(number("seed", 999'999'999));
    if (told_.contains("config")) options.config = told_["config"].dump();
    return options;
  }

  // For an error that its words lead to.
  [[noreturn]] void blame(const Error& error) const {
    fail(error.info().what, error.info().entry, error.info().expected, error.info().found);
  }

 private:
  [[noreturn]] void fail(const std::string& what, const std::string& entry,
                         const std::string& expected, const std::string& found) const {
    throw Error(ErrorInfo{.code = ErrorCode::kCorrupt,
                          .what = what,
                          .file = path_,
                          .entry = entry,
                          .expected = expected,
                          .found = found.substr(0, 200),
                          .next = "make it again: isoshard golden --out DIR"});
  }
  std::string text(const char* key) const {
    const Json value = told_.value(key, Json());
    if (value.is_string() && value.get<std::string>().size() <= 200) return value;
    fail("What was asked for is not told.", key, "a text of up to 200 characters",
         value.type_name());
  }
  int64_t number(const char* key, int64_t most) const {
    const Json value = told_.value(key, Json());
    if (value.is_number_unsigned() && value.get<uint64_t>() <= static_cast<uint64_t>(most)) {
      return value;
    }
    fail("What was asked for is not told.", key, "a whole number up to " + std::to_string(most),
         value.dump());
  }

  std::string path_;
  Json told_;
};

// Whether a file on disk holds these bytes. Its size is looked at first, so that no more is read
// than was made, whatever the file claims to be.
bool holds(Storage& disk, const std::string& path, const std::string& expected) {
  const std::unique_ptr<ReadableFile> file = disk.open_read(path);
  if (file->size_bytes() != static_cast<int64_t>(expected.size())) return false;
  std::string found(expected.size(), '\0');
  file->read_at(0, std::as_writable_bytes(std::span(found)));
  return found == expected;
}

// Makes it again in memory and compares every file, byte for byte.
void check(Session* session, const std::string& folder) {
  Storage& disk = session->storage;
  const Description description(disk, folder);
  const GoldenOptions options = description.options();
  checkpoint::MemoryStorage memory;
  memory.make_directories("/golden");
  try {
    Golden(options, memory).write("/golden");
  } catch (const Error& error) {
    checkpoint::throw_if_cancelled();
    description.blame(error);
  }
  std::vector<std::string> expected, found;
  list_files(memory, "/golden", "", &expected);
  list_files(disk, folder, "", &found);
  constexpr int64_t kMost = int64_t{1} << 32;  // of one file
  int64_t differing = 0, unexpected = 0;
  bool of_states = false;  // a file of the checkpoint differs
  nlohmann::json files = nlohmann::json::array();
  const auto tell = [&](const char* word, const std::string& path) {
    files.push_back({{"file", path}, {"is", word}});
    std::string line = word;
    line.resize(11, ' ');
    session->say(line + quote(path));
  };
  for (const std::string& path : expected) {
    if (std::find(found.begin(), found.end(), path) == found.end()) {
      tell("missing", path.substr(1));
    } else if (!holds(disk, folder + path, read_small_file(memory, "/golden" + path, kMost))) {
      tell("different", path.substr(1));
      of_states = of_states || path.ends_with("_states.pt");
    } else {
      continue;
    }
    ++differing;
  }
  for (const std::string& path : found) {
    if (std::find(expected.begin(), expected.end(), path) != expected.end()) continue;
    tell("unexpected", path.substr(1));
    ++unexpected;
  }
  session->say(std::to_string(expected.size()) + " files, " + std::to_string(differing) +
               " differ, " + std::to_string(unexpected) + " more");
  if (of_states) {
    session->say("what is damaged: isoshard verify " + shell_word(folder + "/ckpt"));
    session->say("which tensors differ, where none is: isoshard golden --topology " +
                 shell_word(options.topology) + " --model " + shell_word(options.model) +
                 " --steps " + std::to_string(options.steps) + " --seed " +
                 std::to_string(options.seed) +
                 (options.config.empty() ? "" : " --config CONFIG.json") +
                 " --out NEW && isoshard diff NEW/ckpt " + shell_word(folder + "/ckpt"));
  }
  if (session->json) {
    session->print_json({{"kind", "golden_check"},
                         {"equal", differing + unexpected == 0},
                         {"files", expected.size()},
                         {"differing", differing},
                         {"unexpected", unexpected},
                         {"list", files}});
  }
  if (differing + unexpected > 0) session->status = kAnswerIsNo;
}

}  // namespace

void add_golden(CLI::App* app, Session* session) {
  CLI::App* verb = app->add_subcommand(
      "golden", "A checkpoint in DeepSpeed's layout and, as HDF5, what must be in it");
  auto options = std::make_shared<GoldenOptions>();
  verb->set_help_flag("-h,--help", "This page");
  std::vector<CLI::Option*> asked = {
      verb->add_option("--topology", options->topology,
                       "dp=,sp=,tp=,ep=,pp=,stage= (dp=2,stage=1); tp with neither sp nor ep, pp "
                       "with dp alone at stage 1"),
      verb->add_option("--model", options->model, std::string(kSampleModels) + " (llama)"),
      verb->add_option("--steps", options->steps, "Steps that are trained (3)")
          ->check(CLI::Range(0, 10000)),
      verb->add_option("--seed", options->seed, "Of weights, tokens and the order of events (1)")
          ->check(CLI::Range(0, 999999999))};
  auto config = std::make_shared<std::string>();
  asked.push_back(verb->add_option("--config", *config,
                                   "A DeepSpeed config (JSON) that says stage, tp, sp, ep, dtype, "
                                   "optimizer, schedule, clipping and batches"));
  CLI::Option* out = verb->add_option("--out", options->out, "The folder that appears");
  CLI::Option* again = verb->add_option("--check", options->check,
                                        "Make what a golden folder says again, and compare");
  out->excludes(again);
  for (CLI::Option* option : asked) again->excludes(option);
  verb->add_flag("--overwrite", options->overwrite, "Replace the folder if it is there")
      ->excludes(again);
  verb->add_flag("--quiet", session->quiet, "Errors only");
  verb->add_flag("--json", session->json, "One JSON object a line");
  verb->callback([session, options, config] {
    if (!config->empty()) options->config = read_small_file(session->storage, *config, 1 << 20);
    if (!options->check.empty()) return check(session, options->check);
    if (options->out.empty()) {
      throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                            .what = "Neither a folder to make nor one to check is named.",
                            .expected = "--out DIR or --check DIR"});
    }
    checkpoint::StagedFolder staged(session->storage, options->out, options->overwrite);
    Golden golden(*options, session->storage);
    golden.write(staged.path());
    staged.publish();
    for (const std::string& key : golden.without_effect()) {
      session->notice("without effect here: " + key);
    }
    session->say("made " + options->out);
    if (session->json) {
      session->print_json({{"kind", "golden"},
                           {"made", options->out},
                           {"without_effect", golden.without_effect()}});
    }
  });
}

}  // namespace isoshard::tools
