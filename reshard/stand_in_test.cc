// What stand-ins for many lost files share.
#include "reshard/stand_in.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "checkpoint/posix_storage.h"

namespace isoshard::reshard {
namespace {

const char* const kFolder = ISOSHARD_TRACES "/deepspeed/z1_bf16_dp2/ckpt/global_step3";

const std::string* pickle_in(const StandIn& made) {
  for (const Pieces::Piece& piece : made.contents->pieces) {
    if (piece.shared) return piece.shared.get();
  }
  return nullptr;
}

// A few bytes of a model file can ask for ten thousand of them.
TEST(StandIn, OfOneSiblingThePickleIsHeldOnce) {
  checkpoint::PosixStorage disk;
  const std::string name = "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt";
  const auto sibling =
      std::make_shared<const checkpoint::TorchFile>(disk, std::string(kFolder) + "/" + name);
  const SiblingForm form = sibling_form(sibling);
  const StandIn first = sibling_stand_in("first.pt", form, "lost");
  const StandIn second = sibling_stand_in("second.pt", form, "lost");
  ASSERT_NE(pickle_in(first), nullptr);
  EXPECT_EQ(pickle_in(first), pickle_in(second));
  StandInStorage shown(disk, kFolder);
  shown.put("first.pt", first.contents);
  const checkpoint::TorchFile read(shown, std::string(kFolder) + "/first.pt");
  EXPECT_EQ(read.storages().size(), sibling->storages().size());
  EXPECT_EQ(read.pickle().size(), sibling->pickle().size());
  EXPECT_GT(first.held_bytes, 0);
}

}  // namespace
}  // namespace isoshard::reshard
