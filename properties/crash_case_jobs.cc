// The jobs of crash_case.h: publications by themselves, saves by two ranks, conversions.
#include <algorithm>
#include <utility>

#include "checkpoint/deepspeed/reader.h"
#include "checkpoint/deepspeed/reshard_target.h"
#include "checkpoint/deepspeed/universal_blueprint.h"
#include "checkpoint/deepspeed/weights_blueprint.h"
#include "checkpoint/manifest.h"
#include "checkpoint/publication.h"
#include "checkpoint/small_file.h"
#include "core/error.h"
#include "core/random.h"
#include "properties/crash_case.h"
#include "properties/file_bridge.h"
#include "reshard/convert.h"
#include "reshard/verify.h"

namespace isoshard::properties {
namespace {

using checkpoint::StagedFolder;

// Bytes that two seeds do not share, of a length around blocks and sectors.
std::string some_bytes(uint64_t seed) {
  constexpr size_t kSizes[] = {9001, 512, 1, 4096, 0, 513, 4095};
  std::string bytes(kSizes[seed % std::size(kSizes)], '\0');
  Random random(mix(seed));
  for (char& byte : bytes) byte = static_cast<char>(random.next());
  return bytes;
}

void write(Storage& storage, const std::string& path, const std::string& bytes, bool sync) {
  const std::unique_ptr<WritableFile> file = storage.create(path);
  const size_t half = bytes.size() / 2;
  file->write_at(0, std::as_bytes(std::span(bytes).first(half)));
  file->write_at(static_cast<int64_t>(half), std::as_bytes(std::span(bytes).subspan(half)));
  if (sync) file->sync();
  file->close();
}

void write_files(Storage& storage, const std::string& folder, uint64_t seed, bool sync) {
  storage.make_directory(folder + "/zero");
  const uint64_t count = 2 + seed % 3;
  for (uint64_t i = 0; i < count; ++i) {
    const std::string path = folder + (i % 2 == 0 ? "/zero/" : "/") + std::to_string(i);
    write(storage, path, some_bytes(seed + i), sync);
  }
}

void publish_files(Storage& storage, const std::string& path, uint64_t seed) {
  StagedFolder staged(storage, path, true);
  write_files(storage, staged.path(), seed, false);
  staged.settle();
  write(storage, staged.path() + "/" + checkpoint::kManifestName, some_bytes(seed + 70), true);
  staged.publish();
}

// A publication that does not come to its end.
void drop_files(Storage& storage, uint64_t number) {
  StagedFolder staged(storage, "/top/new/out", true);
  write_files(storage, staged.path(), number, number % 2 == 1);
  if (number % 4 > 1) staged.settle();
}

void make_top(Storage& storage, uint64_t) { storage.make_directory("/top"); }

// Numbers of old states and of new ones have nothing in common.
constexpr uint64_t kOld = 1'000'003;

std::vector<CrashJob> publications() {
  const auto publishes = [](const std::string& path) {
    return [path](Storage& storage, uint64_t number) { publish_files(storage, path, number); };
  };
  const auto has_old = [](Storage& storage, uint64_t number) {
    storage.make_directory("/top");
    publish_files(storage, "/top/out", number + kOld);
  };
  return {{.name = "publish",
           .places = {"/top/new/out"},
           .pointer = "",
           .before = make_top,
           .work = publishes("/top/new/out")},
          {.name = "publish_over",
           .places = {"/top/out"},
           .pointer = "",
           .before = has_old,
           .work = publishes("/top/out")},
          {.name = "publish_in_place",
           .renames_folders = false,
           .places = {"/top/new/out"},
           .pointer = "",
           .before = make_top,
           .work = publishes("/top/new/out")},
          {.name = "drop",
           .places = {"/top/new/out"},
           .pointer = "",
           .before = make_top,
           .work = drop_files},
          {.name = "drop_in_place",
           .renames_folders = false,
           .places = {"/top/new/out"},
           .pointer = "",
           .before = make_top,
           .work = drop_files}};
}

// `latest` and larger files beside it.
CrashJob replacement() {
  return {.name = "replace",
          .one_command = false,
          .places = {"/top/config.json", "/top/tokenizer", "/top/latest"},
          .pointer = "/top/latest",
          .before =
              [](Storage& storage, uint64_t number) {
                storage.make_directory("/top");
                for (const char* tag : {"/top/global_step1", "/top/global_step2"}) {
                  storage.make_directory(tag);
                  write(storage, tag + std::string("/file"), "whole", true);
                }
                write(storage, "/top/config.json", some_bytes(number + kOld), true);
                write(storage, "/top/source", some_bytes(number + 1), true);
                write(storage, "/top/latest", "global_step1", true);
              },
          .work =
              [](Storage& storage, uint64_t number) {
                checkpoint::replace_small_file(storage, "/top/config.json", some_bytes(number));
                checkpoint::copy_file(storage, "/top/source", "/top/tokenizer");
                checkpoint::replace_small_file(storage, "/top/latest", "global_step2");
              }};
}

struct Save {
  std::string folder = "/run";
  std::string tag;
  uint64_t number = 0;  // of stages and kinds of ranks
  int epoch = 0;
};

Topology ranks_of(uint64_t number) {
  return number / 4 % 2 == 0 ? Topology{.data = 2} : Topology{.tensor = 2};
}

void save(Storage& storage, const Save& save) {
  reference::TrainConfig config;
  config.model.layers = 1;
  config.model.hidden = 4;
  config.model.intermediate = 4;
  config.data.batch = 2;
  config.data.sequence_length = 4;
  config.stage = static_cast<int>(save.number % 4);
  const Topology topology = ranks_of(save.number);
  sim::Cluster cluster(topology, {.seed = save.number});
  cluster.run([&](sim::Rank& rank) {
    const ParallelState parallel = parallel_state(rank);
    reference::Trainer trainer(config, parallel);
    trainer.initialise();
    for (int step = 0; step < save.epoch; ++step) trainer.step();
    engine::CheckpointEngine files(rank.storage(storage), parallel,
                                   deepspeed_config(config, topology, config.stage),
                                   [](const std::string&) {});
    files.save_checkpoint(trainer.state(), save.folder,
                          {.tag = save.tag, .client_state = {{"epoch", save.epoch}}});
  });
}

// A digest of every section where the folder is whole by all that is known.
std::string read_whole(Storage& storage, const std::string& folder) {
  try {
    reshard::VerifyOptions options;
    options.read.workers = options.stream.workers = 1;
    const reshard::Verification found = reshard::verify(storage, folder, options);
    if (found.verdict > reshard::Verdict::kComplete) return "";
    std::string text = reshard::name(found.verdict) + std::string(" ") + found.folder;
    for (const reshard::SectionDigest& section : found.digest->sections) {
      text += " " + section.section + "=" + section.hex.substr(0, 8);
    }
    return text;
  } catch (const Error&) {
    return "";
  }
}

std::vector<CrashJob> saves() {
  const auto saves_as = [](const std::string& tag, int epoch) {
    return [=](Storage& storage, uint64_t number) {
      save(storage, {.tag = tag, .number = number, .epoch = epoch});
    };
  };
  const CrashJob first{.name = "save",
                       .places = {"/run/first", "/run/latest"},
                       .pointer = "/run/latest",
                       .before = [](Storage&, uint64_t) {},
                       .work = saves_as("first", 1),
                       .read = read_whole,
                       .read_at = "/run"};
  CrashJob next = first, again = first, in_place = first, next_in_place = first;
  next.name = "next_save";
  next.places[0] = "/run/second";
  next.before = first.work;
  next.work = saves_as("second", 2);
  again.name = "save_again";
  again.before = first.work;
  again.work = saves_as("first", 2);
  in_place.name = "save_in_place";
  in_place.renames_folders = false;
  next_in_place = next;
  next_in_place.name = "next_save_in_place";
  next_in_place.renames_folders = false;
  return {first, next, again, in_place, next_in_place};
}

checkpoint::ShardedState source_of(Storage& storage) {
  return checkpoint::read_checkpoint(storage, "/run", {.workers = 1});
}

void convert_to(Storage& storage, const checkpoint::ShardedState& source,
                const checkpoint::TargetFiles& files, reshard::ConvertOptions options) {
  options.certificate = nlohmann::json::object();
  options.overwrite = true;
  options.stream.workers = 1;
  reshard::convert(storage, source, reshard::make_plan(source, files.files), options);
}

void reshard_run(Storage& storage, const std::string& target, uint64_t number) {
  const checkpoint::ShardedState source = source_of(storage);
  const checkpoint::TargetFiles files = checkpoint::reshard_blueprints(
      source, {.data = 1 + static_cast<int>(number % 3)}, static_cast<int>(1 + number % 3),
      {.allow_dropped = {}, .splits = {}, .stages = {}});
  reshard::ConvertOptions options;
  options.target = target;
  options.side_files = {{"/run/tokenizer", "/out/tokenizer"}};
  options.latest_path = "/out/latest";
  options.latest_text = target.substr(target.rfind('/') + 1);
  convert_to(storage, source, files, options);
}

void universal_run(Storage& storage, uint64_t) {
  const checkpoint::ShardedState source = source_of(storage);
  reshard::ConvertOptions options;
  options.target = "/out/universal";
  options.latest_path = "/out/latest_universal";
  options.latest_text = "universal";
  convert_to(storage, source, checkpoint::universal_blueprints(source, {}), options);
}

void weights_run(Storage& storage, uint64_t number) {
  const checkpoint::ShardedState source = source_of(storage);
  reshard::ConvertOptions options;
  options.target = "/out/weights";
  options.weights_only = true;
  convert_to(storage, source,
             checkpoint::weights_blueprints(source, {.safetensors = number % 2 == 1}), options);
}

std::vector<CrashJob> conversions() {
  const auto has_source = [](Storage& storage, uint64_t number) {
    save(storage, {.tag = "first", .number = number % 4, .epoch = 1});
    write(storage, "/run/tokenizer", some_bytes(number), true);
  };
  const CrashJob convert{
      .name = "convert",
      .places = {"/out/second", "/out/tokenizer", "/out/latest"},
      .pointer = "/out/latest",
      .before = has_source,
      .work = [](Storage& storage,
                 uint64_t number) { reshard_run(storage, "/out/second", number); },
      .read = read_whole,
      .read_at = "/out"};
  CrashJob over = convert, in_place = convert;
  over.name = "convert_over";
  over.before = [=](Storage& storage, uint64_t number) {
    has_source(storage, number);
    save(storage, {.folder = "/out", .tag = "second", .number = number, .epoch = 3});
  };
  in_place.name = "convert_in_place";
  in_place.renames_folders = false;
  CrashJob universal = convert, weights = convert;
  universal.name = "universal";
  universal.places = {"/out/universal", "/out/latest_universal"};
  universal.pointer = "/out/latest_universal";
  universal.work = universal_run;
  weights.name = "weights";
  weights.places = {"/out/weights"};
  weights.pointer = "";
  weights.work = weights_run;
  weights.read_at = "/out/weights";
  return {convert, over, in_place, universal, weights};
}

}  // namespace

std::vector<CrashJob> crash_jobs() {
  std::vector<CrashJob> jobs = publications();
  jobs.push_back(replacement());
  for (std::vector<CrashJob> more : {saves(), conversions()}) {
    std::move(more.begin(), more.end(), std::back_inserter(jobs));
  }
  return jobs;
}

}  // namespace isoshard::properties
