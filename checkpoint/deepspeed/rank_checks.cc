// See rank_checks.h.
#include "checkpoint/deepspeed/rank_checks.h"

#include <map>
#include <string>
#include <utility>

#include "checkpoint/cancel.h"
#include "checkpoint/deepspeed/hyper.h"
#include "checkpoint/deepspeed/reader.h"
#include "checkpoint/deepspeed/zero_files.h"
#include "core/error.h"
#include "core/mutant.h"

namespace isoshard::checkpoint {

void check_scalars(const ShardedState& state) {
  std::map<std::string, std::pair<std::string, std::string>> first;  // state[k] name → value, file
  for (int file : state.optim_files) {
    throw_if_cancelled();
    const Fields f(state.document(file));
    const NodeId optimizer = f.need(f.root(), "optimizer_state_dict");
    const NodeId base = state.flavour == Flavour::kZero3
                            ? f.need(optimizer, "optimizer_state_dict")
                            : f.need(optimizer, "base_optimizer_state");
    const std::vector<NodeId>& entries = f.pickle().entries(f.need(base, "state"));
    for (size_t i = 0; i + 1 < entries.size(); i += 2) {
      const std::string index = std::to_string(f.integer(entries[i], "state key"));
      for (const auto& [key, node] : sort_optimizer_state(f, entries[i + 1], "state").scalars) {
        const std::string value = scalar_text(state, {file, node});
        const auto [known, fresh] =
            first.emplace(index + " " + key, std::pair(value, f.document().path()));
        if (fresh || known->second.first == value || mutant("steps_of_two_saves")) continue;
        throw Error(
            ErrorInfo{.code = ErrorCode::kMismatch,
                      .what = "Ranks stand at different steps: files of two saves are mixed.",
                      .file = f.document().path(),
                      .entry = "state[" + index + "][" + quote(key) + "]",
                      .expected = known->second.first + " as in " + known->second.second,
                      .found = value,
                      .next = "put the files of one save together"});
      }
    }
  }
}

void compare_ranks(ShardedState* state, const ModelStates& model) {
  const std::string first = client_state_json(state->document(model.file)).dump();
  const auto crc_of = [&](int file, const std::string& name) -> int64_t {
    const Fields f(state->document(file));
    const TensorView view = f.tensor(f.need(f.need(f.root(), "module"), name), name);
    return f.document().record(view.storage).crc32;
  };
  bool same_buffers = true;
  for (size_t rank = 1; rank < state->model_files.size(); ++rank) {
    throw_if_cancelled();
    const int file = state->model_files[rank];
    for (const std::string& name : model.buffer_names) {
      same_buffers = same_buffers && crc_of(file, name) == crc_of(model.file, name);
    }
    const bool same = client_state_json(state->document(file)).dump() == first;
    if (!same) state->own_client_state.push_back(file);
  }
  if (!same_buffers) {
    state->notices.push_back("buffers differ between ranks; rank 0's are used, as DeepSpeed does");
    state->skipped.push_back("buffers of ranks other than 0, which differ from rank 0's");
  }
}

}  // namespace isoshard::checkpoint
