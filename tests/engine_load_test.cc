// Loads besides the usual one: the universal form, whole fp32 weights, modules that are not strict.
#include <gtest/gtest.h>

#include <map>
#include <set>

#include "checkpoint/deepspeed/reader.h"
#include "checkpoint/deepspeed/universal_blueprint.h"
#include "checkpoint/posix_storage.h"
#include "checkpoint/small_file.h"
#include "engine/fp32_state_dict.h"
#include "reshard/executor.h"
#include "reshard/tensor_values.h"
#include "tests/engine_world.h"

namespace isoshard {
namespace {

using engine::Fp32Tensor;

// Counts the bytes that are read of files.
class CountingStorage : public MemoryStorage {
 public:
  class Counted : public ReadableFile {
   public:
    Counted(std::unique_ptr<ReadableFile> file, int64_t* bytes)
        : file_(std::move(file)), bytes_(*bytes) {}
    const std::string& path() const override { return file_->path(); }
    int64_t size_bytes() const override { return file_->size_bytes(); }
    void read_at(int64_t offset, std::span<std::byte> target) const override {
      bytes_ += static_cast<int64_t>(target.size());
      file_->read_at(offset, target);
    }
    int64_t next_data(int64_t offset) const override { return file_->next_data(offset); }
    int64_t next_hole(int64_t offset) const override { return file_->next_hole(offset); }

   private:
    std::unique_ptr<ReadableFile> file_;
    int64_t& bytes_;
  };
  std::unique_ptr<ReadableFile> open_read(const std::string& path) override {
    return std::make_unique<Counted>(MemoryStorage::open_read(path), &bytes);
  }
  int64_t bytes = 0;
};

reference::WholeState trained(const TrainConfig& config, const Topology& topology, Storage& disk) {
  std::vector<TrainingState> states(static_cast<size_t>(topology.world()));
  sim::Cluster cluster(topology, {.seed = 3});
  cluster.run([&](sim::Rank& rank) {
    const ParallelState parallel = properties::parallel_state(rank);
    Trainer trainer(config, parallel);
    trainer.initialise();
    for (int i = 0; i < 2; ++i) trainer.step();
    CheckpointEngine(disk, parallel, properties::deepspeed_config(config, topology, config.stage),
                     [](const std::string&) {})
        .save_checkpoint(trainer.state(), "/run", {});
    states[static_cast<size_t>(rank.number())] = trainer.state();
  });
  return reference::whole_state_of(states);
}

// /run/latest to /run/u, which `latest_universal` names.
void to_universal(Storage& disk) {
  const checkpoint::ShardedState source = checkpoint::read_checkpoint(disk, "/run", {.workers = 1});
  disk.make_directories("/run/u");
  reshard::execute(disk, source,
                   reshard::make_plan(source, checkpoint::universal_blueprints(source, {}).files),
                   "/run/u", {.workers = 1});
  checkpoint::replace_small_file(disk, "/run/latest_universal", "u");
}

TEST(Fp32StateDict, ReadsNothingBeforeItIsAskedTo) {
  for (int stage = 1; stage <= 3; ++stage) {
    CountingStorage disk;
    TrainConfig config = small(stage);
    config.model.dtype = DType::kBFloat16;
    config.model.tied = true;
    config.model.vocabulary = 50000;  // so that values outweigh the archive's own words
    const reference::WholeState whole = trained(config, {.data = 2}, disk);
    disk.bytes = 0;
    for (const char* folder : {"/run", "/run/global_step2"}) {
      const auto tensors =
          engine::get_fp32_state_dict_from_zero_checkpoint(disk, folder, {.lazy_mode = true});
      int64_t elements = 0;
      for (const Fp32Tensor& tensor : tensors) elements += numel(tensor.shape());
      EXPECT_EQ(tensors.back().name(), "lm_head.weight");  // the second name
      const int64_t opened = disk.bytes;
      EXPECT_LT(opened, elements * 4 / 2) << "values were read";
      for (const Fp32Tensor& tensor : tensors) {
        const std::string name =
            tensor.name() == "lm_head.weight" ? "model.embed_tokens.weight" : tensor.name();
        const int64_t before = disk.bytes;
        EXPECT_EQ(tensor.contiguous(), whole.at({name, "fp32"})) << name;
        EXPECT_EQ(disk.bytes - before, numel(tensor.shape()) * 4) << name;
      }
      disk.bytes = 0;
    }
    const auto eager = engine::get_fp32_state_dict_from_zero_checkpoint(disk, "/run", {});
    disk.bytes = 0;
    EXPECT_EQ(eager[0].contiguous(), whole.at({eager[0].name(), "fp32"}));
    EXPECT_EQ(disk.bytes, 0);
  }
}

TrainConfig frozen_config(int stage) {
  TrainConfig config = small(stage);
  config.model.dtype = DType::kBFloat16;
  config.model.frozen = 3;
  return config;
}

struct FrozenRun {
  TrainConfig config;
  bool exclude = false;
  LoadOptions load;
};

// By rank: what its state holds behind a load of what other values were saved as.
std::vector<TrainingState> loaded_frozen(const FrozenRun& run, Storage& disk) {
  std::vector<TrainingState> states(2);
  TrainConfig other = run.config;
  ++other.model.seed;
  sim::Cluster cluster({.data = 2}, {.seed = 3});
  cluster.run([&](sim::Rank& rank) {
    const ParallelState parallel = properties::parallel_state(rank);
    Trainer saver(run.config, parallel), loader(other, parallel);
    saver.initialise();
    loader.initialise();
    saver.step();
    CheckpointEngine files(disk, parallel,
                           properties::deepspeed_config(run.config, {.data = 2}, run.config.stage),
                           [](const std::string&) {});
    files.save_checkpoint(saver.state(), "/run", {.exclude_frozen_parameters = run.exclude});
    files.load_checkpoint(&loader.state(), "/run", run.load);
    loader.refresh_parameters();
    states[static_cast<size_t>(rank.number())] = loader.state();
  });
  return states;
}

// Values of the frozen parameters that a run begins with, and so ends with.
reference::WholeState frozen_of(const TrainConfig& config, int64_t seed_offset) {
  TrainConfig alone = config;
  alone.stage = 0;
  alone.model.seed += static_cast<uint64_t>(seed_offset);
  reference::WholeState values;
  sim::Cluster cluster({});
  cluster.run([&](sim::Rank& rank) {
    Trainer trainer(alone, properties::parallel_state(rank));
    trainer.initialise();
    for (const auto& [key, tensor] : reference::whole_state({&trainer.state()})) {
      const auto& all = trainer.state().parameters;
      const auto p = std::ranges::find(all, key.first, &TrainedParameter::name);
      if (p->frozen()) values[key] = tensor;
    }
  });
  return values;
}

bool holds_frozen(const std::vector<TrainingState>& states, const reference::WholeState& frozen) {
  const reference::WholeState whole = reference::whole_state_of(states);
  return !frozen.empty() && std::ranges::all_of(frozen, [&](const auto& entry) {
    const auto found = whole.find(entry.first);
    return found != whole.end() && found->second == entry.second;
  });
}

TEST(FrozenParameters, AreSavedAndLoaded) {
  for (int stage = 0; stage <= 3; ++stage) {
    for (const bool module_only : {false, true}) {
      MemoryStorage disk;
      const FrozenRun run{frozen_config(stage), false, {.load_module_only = module_only}};
      const auto states = loaded_frozen(run, disk);
      EXPECT_TRUE(holds_frozen(states, frozen_of(run.config, 0))) << "stage " << stage;
      EXPECT_FALSE(holds_frozen(states, frozen_of(run.config, 1))) << "stage " << stage;
    }
  }
}

// Excluded, they are missed by a strict load (DeepSpeed: RuntimeError), and left alone by another.
TEST(FrozenParameters, AreExcluded) {
  for (int stage = 0; stage <= 3; ++stage) {
    MemoryStorage disk;
    FrozenRun run{frozen_config(stage), true, {}};
    EXPECT_THROW(
        {
          try {
            loaded_frozen(run, disk);
          } catch (const Error& error) {
            EXPECT_EQ(error.info().code, ErrorCode::kMismatch) << error.what();
            EXPECT_NE(std::string(error.what()).find("excluded"), std::string::npos);
            throw;
          }
        },
        Error)
        << "stage " << stage;
    MemoryStorage again;
    run.load.load_module_strict = false;
    const auto states = loaded_frozen(run, again);
    EXPECT_TRUE(holds_frozen(states, frozen_of(run.config, 1))) << "stage " << stage;
    if (stage == 0) continue;
    for (const bool exclude : {false, true}) {
      for (const Fp32Tensor& tensor : engine::get_fp32_state_dict_from_zero_checkpoint(
               again, "/run", {.exclude_frozen_parameters = exclude})) {
        EXPECT_FALSE(frozen_of(run.config, 0).contains({tensor.name(), "param"})) << tensor.name();
      }
    }
  }
}

// Where the universal form has them, they are loaded; DeepSpeed leaves them as they are.
TEST(FrozenParameters, AreLoadedFromTheUniversalForm) {
  for (int stage = 1; stage <= 3; ++stage) {
    MemoryStorage disk;
    const TrainConfig config = frozen_config(stage);
    trained(config, {.data = 2}, disk);
    to_universal(disk);
    TrainConfig other = config;
    ++other.model.seed;
    std::vector<TrainingState> states(3);
    sim::Cluster cluster({.data = 3}, {.seed = 4});
    cluster.run([&](sim::Rank& rank) {
      const ParallelState parallel = properties::parallel_state(rank);
      Trainer trainer(other, parallel);
      trainer.initialise();
      Json json = properties::deepspeed_config(other, {.data = 3}, stage);
      json["checkpoint"] = {{"load_universal", true}};
      CheckpointEngine(disk, parallel, json, [](const std::string&) {
      }).load_checkpoint(&trainer.state(), "/run", {});
      trainer.refresh_parameters();
      states[static_cast<size_t>(rank.number())] = trainer.state();
    });
    EXPECT_TRUE(holds_frozen(states, frozen_of(config, 0))) << "stage " << stage;
  }
}

// The real ones: frozen parameters, buffers and tied names of what DeepSpeed saved, beside what its
// own zero_to_fp32 made of it.
TEST(Fp32StateDict, OfARecordedCheckpointIsDeepSpeeds) {
  checkpoint::PosixStorage disk;
  const std::string folder = std::string(ISOSHARD_TRACES) + "/deepspeed/z3_bf16_dp2_frozen/";
  const auto all = engine::get_fp32_state_dict_from_zero_checkpoint(disk, folder + "ckpt", {});
  const checkpoint::ShardedState real =
      checkpoint::read_checkpoint(disk, folder + "fp32", {.workers = 1});
  std::map<std::string, int> leaves;
  for (const auto& parameter : real.parameters) leaves[parameter.name] = parameter.weight;
  for (const auto& buffer : real.buffers) leaves[buffer.name] = buffer.leaf;
  for (const auto& alias : real.aliases) {
    leaves[alias.name] = real.find_parameter(alias.target)->weight;
  }
  std::set<std::string> names;
  for (const Fp32Tensor& tensor : all) {
    names.insert(tensor.name());
    ASSERT_TRUE(leaves.contains(tensor.name())) << tensor.name();
    const checkpoint::Leaf& leaf = real.leaf(leaves[tensor.name()]);
    EXPECT_EQ(tensor.shape(), leaf.shape) << tensor.name();
    std::vector<std::byte> bytes(static_cast<size_t>(leaf.size_bytes()));
    reshard::read_elements(real, leaf, 0, bytes);
    std::vector<float> expected(static_cast<size_t>(leaf.size_elements()));
    cast(leaf.dtype, bytes, DType::kFloat32, std::as_writable_bytes(std::span(expected)));
    EXPECT_EQ(tensor.contiguous(), expected) << tensor.name();
  }
  EXPECT_EQ(names.size(), leaves.size());
  const auto trainable = engine::get_fp32_state_dict_from_zero_checkpoint(
      disk, folder + "ckpt", {.exclude_frozen_parameters = true});
  EXPECT_LT(trainable.size(), all.size());
  EXPECT_THROW(
      engine::get_fp32_state_dict_from_zero_checkpoint(disk, folder + "ckpt", {.tag = "none"}),
      Error);
}

// Saved on one topology and stage, converted by production, loaded on others, trained on: one run.
TEST(UniversalLoad, GoesOnOnAnyTopologyAndStage) {
  const std::vector<std::pair<Topology, int>> targets = {{{.data = 3}, 3},
                                                         {{.data = 1}, 0},
                                                         {{.tensor = 2}, 2},
                                                         {{.sequence = 2}, 1},
                                                         {{.data = 2, .tensor = 2}, 3}};
  const reference::OptimizerKind kinds[] = {reference::OptimizerKind::kSgd,
                                            reference::OptimizerKind::kAdamW,
                                            reference::OptimizerKind::kLion};
  for (int stage = 1; stage <= 3; ++stage) {
    for (const bool experts : {false, true}) {
      TrainConfig config = small(stage);
      config.schedule.kind = reference::ScheduleKind::kWarmup;
      config.model.dtype = DType::kBFloat16;
      if (!experts) config.optimizer.kind = kinds[stage - 1];
      if (experts) config.model.experts = 4;
      MemoryStorage disk;
      trained(config, {.data = 2, .expert = experts ? 2 : 1}, disk);
      to_universal(disk);
      const properties::Record one = properties::single_rank(config, 4);
      for (const auto& [topology, target_stage] : targets) {
        TrainConfig other = config;
        other.stage = target_stage;
        std::vector<TrainingState> states(static_cast<size_t>(topology.world()));
        std::vector<float> losses;
        sim::Cluster cluster(topology, {.seed = 4});
        cluster.run([&](sim::Rank& rank) {
          const ParallelState parallel = properties::parallel_state(rank);
          Trainer trainer(other, parallel);
          Json json = properties::deepspeed_config(other, topology, target_stage);
          json["checkpoint"] = {{"load_universal", true}};
          CheckpointEngine(disk, parallel, json, [](const std::string&) {
          }).load_checkpoint(&trainer.state(), "/run", {});
          trainer.refresh_parameters();
          for (int i = 0; i < 2; ++i) {
            const float loss = trainer.step().loss;
            if (rank.number() == 0) losses.push_back(loss);
          }
          states[static_cast<size_t>(rank.number())] = trainer.state();
        });
        EXPECT_EQ(losses, (std::vector<float>{one.steps[2].loss, one.steps[3].loss}));
        EXPECT_EQ(reference::difference(one.state, reference::whole_state_of(states)), "")
            << to_string(topology) << " stage " << target_stage << " from stage " << stage;
      }
    }
  }
}

TEST(UniversalLoad, AFlippedBitIsRefused) {
  MemoryStorage disk;
  const TrainConfig config = small(1);
  trained(config, {.data = 2}, disk);
  to_universal(disk);
  const std::string path = "/run/u/zero/model.norm.weight/fp32.pt";
  const int64_t size = disk.open_read(path)->size_bytes();
  int refused = 0, flipped = 0;
  for (int64_t at = 0; at < size; at += 8) {
    const auto turn = [&] {
      std::byte byte{};
      disk.open_read(path)->read_at(at, {&byte, 1});
      byte ^= std::byte{1};
      const auto file = disk.open_write(path);
      file->write_at(at, {&byte, 1});
      file->close();
    };
    turn();
    ++flipped;
    sim::Cluster cluster({});
    try {
      cluster.run([&](sim::Rank& rank) {
        const ParallelState parallel = properties::parallel_state(rank);
        Trainer trainer(config, parallel);
        Json json = properties::deepspeed_config(config, {}, 1);
        json["checkpoint"] = {{"load_universal", true}};
        CheckpointEngine(disk, parallel, json, [](const std::string&) {
        }).load_checkpoint(&trainer.state(), "/run", {});
      });
    } catch (const Error&) {
      ++refused;
    }
    turn();
  }
  // The payload, the pickle and the archive's words are most of the file; the rest is padding.
  EXPECT_GT(refused, flipped / 3);
}

TEST(UniversalLoad, RefusesWhatIsNone) {
  World world;
  world.more_config = {{"checkpoint", {{"load_universal", true}}}};
  const auto load = [&](const std::string& tag) {
    return world.run([&](sim::Rank&, Trainer& trainer, CheckpointEngine& files) {
      files.load_checkpoint(&trainer.state(), "/run", {.tag = tag});
    });
  };
  world.run([](sim::Rank&, Trainer& trainer, CheckpointEngine& files) { save(trainer, files); });
  EXPECT_NE(std::string(load("").what()).find("no universal checkpoint"), std::string::npos);
  EXPECT_NE(std::string(load("global_step0").what()).find("no universal folder"), std::string::npos)
      << load("global_step0").what();
}

// The same of a pipeline, whose layers lie in files of their own.
TEST(Engine, APipelinesLayersAreReadAtEveryLoad) {
  World world;
  world.topology = {.pipeline = 2};
  world.config.model.layers = 2;
  world.run([](sim::Rank&, Trainer& trainer, CheckpointEngine& files) {
    trainer.step();
    save(trainer, files);
  });
  const auto load = [&](const LoadOptions& options) {
    return world.run([&](sim::Rank&, Trainer& trainer, CheckpointEngine& files) {
      files.load_checkpoint(&trainer.state(), "/run", options);
    });
  };
  EXPECT_EQ(load({}).info().what, "");
  const auto keep = [](const LoadOptions::Source&, const TrainedParameter&, std::vector<float>*) {};
  const std::string custom = load({.load_module_only = true, .custom_load_fn = keep}).what();
  EXPECT_NE(custom.find("AssertionError"), std::string::npos) << custom;
  const std::string norm = "/run/global_step1/layer_03-model_states.pt";
  const std::string layer =
      read_small_file(world.disk, "/run/global_step1/layer_01-model_states.pt", 1 << 20);
  checkpoint::replace_small_file(world.disk, norm, layer);  // it has no "weight"
  EXPECT_NE(load({}).info().what, "");
  EXPECT_NE(load({.load_module_only = true}).info().what, "");
  const LoadOptions lenient{.load_module_strict = false, .load_module_only = true};
  EXPECT_EQ(load(lenient).info().what, "");
  world.disk.remove_file(norm);
  EXPECT_NE(load({}).info().what, "");
}

TEST(Engine, AModuleThatLacksANameIsLoadedOnlyIfItMay) {
  World world;
  std::vector<float> norm;
  world.run([](sim::Rank&, Trainer& trainer, CheckpointEngine& files) {
    trainer.step();
    for (TrainedParameter& p : trainer.state().parameters) {
      if (p.name == "model.norm.weight") p.name = p.module_name = "model.other.weight";
    }
    save(trainer, files);
  });
  const auto load = [&](const LoadOptions& options) {
    return world.run([&](sim::Rank&, Trainer& trainer, CheckpointEngine& files) {
      trainer.step();
      files.load_checkpoint(&trainer.state(), "/run", options);
    });
  };
  EXPECT_NE(load({.load_module_only = true}).info().what, "");
  EXPECT_EQ(load({.load_module_strict = false, .load_module_only = true}).info().what, "");
  // The caller's own way: the norm under the other name, everything else doubled.
  std::vector<TrainingState> states(2);
  std::vector<TrainingState> plain(2);
  const auto custom = [](const LoadOptions::Source& source, const TrainedParameter& p,
                         std::vector<float>* values) {
    const auto found = source(p.name == "model.norm.weight" ? "model.other.weight" : p.name);
    ASSERT_TRUE(found.has_value()) << p.name;
    EXPECT_FALSE(source("nowhere").has_value());
    *values = *found;
    for (float& value : *values) value *= 2;
  };
  const auto masters = [&](const LoadOptions& options) {
    std::vector<float> values;
    const Error error = world.run([&](sim::Rank& rank, Trainer& trainer, CheckpointEngine& files) {
      files.load_checkpoint(&trainer.state(), "/run", options);
      if (rank.number() == 0) values = trainer.state().groups[0].master;
    });
    EXPECT_EQ(error.info().what, "") << error.what();
    return values;
  };
  const std::vector<float> once = masters({.load_module_strict = false, .load_module_only = true});
  const std::vector<float> twice = masters({.load_module_only = true, .custom_load_fn = custom});
  ASSERT_EQ(once.size(), twice.size());
  int64_t doubled = 0;
  for (size_t i = 0; i < once.size(); ++i) doubled += twice[i] == 2 * once[i];
  EXPECT_GT(doubled, static_cast<int64_t>(once.size()) / 2);
}

}  // namespace
}  // namespace isoshard
