// A state with one parameter, its master and its copy, for the tests of what is stored twice.
#pragma once

#include <span>
#include <vector>

#include "checkpoint/memory_storage.h"
#include "checkpoint/sharded_state.h"

namespace isoshard::reshard {

// One file that holds `lead` bytes, masters and then their bfloat16 copies; the masters lie in two
// pieces. With an odd `lead` every element lies where no processor likes it.
inline checkpoint::ShardedState state_of(const std::vector<float>& masters,
                                         const std::vector<uint16_t>& copies, int64_t lead = 0) {
  checkpoint::MemoryStorage storage;
  const auto count = static_cast<int64_t>(masters.size());
  const auto file = storage.create("/file");
  file->write_at(lead, std::as_bytes(std::span(masters)));
  file->write_at(lead + 4 * count, std::as_bytes(std::span(copies)));
  file->close();
  checkpoint::ShardedState state;
  state.files.push_back({"/file", "file", nullptr, storage.open_read("/file")});
  checkpoint::ParameterState parameter{.name = "w", .shape = {count}, .states = {}, .scalars = {}};
  const int64_t cut = count / 2;
  parameter.weight =
      state.add_leaf({.name = "w",
                      .state = "fp32",
                      .shape = {count},
                      .fragments = {{0, cut, 0, lead}, {cut, count - cut, 0, lead + 4 * cut}}});
  parameter.model_copy = state.add_leaf({.name = "w",
                                         .state = "param",
                                         .dtype = DType::kBFloat16,
                                         .shape = {count},
                                         .fragments = {{0, count, 0, lead + 4 * count}}});
  state.parameters.push_back(parameter);
  return state;
}

// Besides: a second name with other bits, and one whose target is not there.
inline checkpoint::ShardedState state_with_ties() {
  checkpoint::ShardedState state = state_of({1.0f, 2.0f}, {0x3F80, 0x4000});
  const int other = state.add_leaf({.name = "tied",
                                    .state = "param",
                                    .dtype = DType::kBFloat16,
                                    .shape = {2},
                                    .fragments = {{0, 2, 0, 0}}});
  state.aliases = {{"tied", "w", other}, {"lost", "nowhere", -1}};
  return state;
}

}  // namespace isoshard::reshard
