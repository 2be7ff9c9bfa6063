// Files of experts folded with tensor-parallel ranks: what a load refuses, by DeepSpeed's own
// words.
#include "engine/folding.h"

#include <gtest/gtest.h>

#include "checkpoint/small_file.h"
#include "tests/engine_world.h"

namespace isoshard {
namespace {

using checkpoint::replace_small_file;
using engine::FoldedFile;
using engine::RankPlace;
using engine::RankReader;

void save_folded(World* world, const Topology& topology) {
  world->config.model.experts = 4;
  world->config.model.expert_intermediate = 3;
  world->topology = topology;
  const Error error = world->run(
      [](sim::Rank&, Trainer& trainer, CheckpointEngine& files) { save(trainer, files, "t"); });
  ASSERT_EQ(error.info().what, "");
}

Error load(World* world, const LoadOptions& options = {}) {
  return world->run([&](sim::Rank&, Trainer& trainer, CheckpointEngine& files) {
    files.load_checkpoint(&trainer.state(), "/run", options);
  });
}

void swap_files(World* world, const std::string& a, const std::string& b) {
  const std::string one = read_small_file(world->disk, "/run/t/" + a, 1 << 24);
  replace_small_file(world->disk, "/run/t/" + a,
                     read_small_file(world->disk, "/run/t/" + b, 1 << 24));
  replace_small_file(world->disk, "/run/t/" + b, one);
}

TEST(Folding, FilesOfAnotherRankAreRefused) {
  World world;
  save_folded(&world, {.tensor = 2, .expert = 2});
  EXPECT_EQ(load(&world).info().what, "");
  const std::string one = "zero_pp_rank_0_mp_rank_00_optim_states.pt";
  const std::string two = "zero_pp_rank_0_mp_rank_01_optim_states.pt";
  swap_files(&world, one, two);
  const Error error = load(&world);
  EXPECT_EQ(error.info().code, ErrorCode::kMismatch);
  EXPECT_NE(error.info().what.find("Folding metadata mismatch"), std::string::npos);
  EXPECT_EQ(error.info().entry, "folding tp_rank");
  EXPECT_EQ(load(&world, {.load_module_only = true}).info().what, "") << "it reads none of these";
  swap_files(&world, one, two);
  EXPECT_EQ(load(&world).info().what, "");
}

// Of four tensor-parallel ranks 0 and 2 hold the same experts, in files of their own.
TEST(Folding, AnExpertsFileSaysItsPlace) {
  World world;
  save_folded(&world, {.tensor = 4, .expert = 2});
  swap_files(&world, "layer_0_expert_0_mp_rank_00_model_states.pt",
             "layer_0_expert_0_mp_rank_02_model_states.pt");
  EXPECT_EQ(load(&world).info().what, "") << "the masters are the optimizer's";
  EXPECT_EQ(load(&world, {.load_module_only = true}).info().entry, "folding tp_rank");
}

TEST(Folding, ARunAndItsFilesAgreeWhetherTheyFold) {
  World folded, plain;
  save_folded(&folded, {.tensor = 2, .expert = 2});
  save_folded(&plain, {.data = 2, .expert = 2});
  TrainingState state;
  state.groups.push_back({.expert = true});
  const auto check = [&](World* world, const Topology& topology) -> std::string {
    const RankReader file(world->disk, "/run/t/mp_rank_00_model_states.pt");
    try {
      check_folding(file, state, RankPlace{topology, coordinate_of(topology, 0)},
                    FoldedFile::kModel);
    } catch (const Error& error) {
      return error.info().what + " " + error.info().entry;
    }
    return "";
  };
  EXPECT_EQ(check(&folded, {.tensor = 2, .expert = 2}), "");
  EXPECT_EQ(check(&plain, {.data = 2, .expert = 2}), "");
  EXPECT_NE(check(&folded, {.data = 2, .expert = 2}).find("requires a folded runtime"),
            std::string::npos);
  EXPECT_NE(check(&plain, {.tensor = 2, .expert = 2}).find("Missing AutoEP+AutoTP folding"),
            std::string::npos);
  EXPECT_NE(check(&folded, {.tensor = 4, .expert = 2}).find("folding tp_size"), std::string::npos);
  EXPECT_NE(check(&folded, {.data = 2, .tensor = 2, .expert = 2}).find("zero_partition_count"),
            std::string::npos);
}

}  // namespace
}  // namespace isoshard
