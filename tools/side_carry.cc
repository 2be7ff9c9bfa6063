// See side_carry.h; names as transformers (trainer.py) and accelerate (checkpointing.py) write
// them.
#include "tools/side_carry.h"

#include <cstdio>

#include "checkpoint/deepspeed/source.h"
#include "checkpoint/small_file.h"
#include "core/error.h"

namespace isoshard::tools {
namespace {

// The rank of a file with the state of a rank's random generators; −1: no such file.
int random_rank(const std::string& name) {
  int rank = -1, length = 0;
  if (name == "rng_state.pth") return 0;  // of a run of one process
  for (const char* form : {"rng_state_%d.pth%n", "random_states_%d.pkl%n"}) {
    rank = -1;
    length = 0;
    if (std::sscanf(name.c_str(), form, &rank, &length) == 1 &&
        static_cast<size_t>(length) == name.size())
      return rank;
  }
  return -1;
}

bool is_of_a_run(Storage& storage, const std::string& folder) {
  return storage.is_file(checkpoint::join(folder, "trainer_state.json")) ||
         storage.is_file(checkpoint::join(folder, "random_states_0.pkl"));
}

// Pointers are made anew, and recovery scripts are not written.
bool is_left(const std::string& name) {
  return name == "latest" || name == "latest_universal" || name == "zero_to_fp32.py" ||
         name == "zero_to_torch.py" || name.front() == '.';
}

}  // namespace

void carry_side_files(Session* session, const checkpoint::ShardedState& state,
                      const std::string& save_folder, const Topology& target, bool overwrite,
                      reshard::ConvertOptions* options) {
  Storage& storage = session->storage;
  const std::string folder = checkpoint::parent_folder(state.folder);
  if (!is_of_a_run(storage, folder)) return;
  int random = 0;
  std::string list;
  for (const DirectoryEntry& entry : storage.list(folder)) {
    const std::string from = checkpoint::join(folder, entry.name);
    if (is_left(entry.name) || !storage.is_file(from)) continue;
    const std::string to = checkpoint::join(save_folder, entry.name);
    random += random_rank(entry.name) >= 0;
    if (storage.is_file(to) && !overwrite && !checkpoint::same_bytes(storage, from, to)) {
      throw Error(ErrorInfo{.code = ErrorCode::kExists,
                            .what = "A file of another run lies where one of this run would go.",
                            .file = to,
                            .expected = "no such file, or the bytes of " + quote(from),
                            .safe = "nothing was written",
                            .next = "name another target, give --overwrite, or leave the files "
                                    "beside the source behind with --no-side-files"});
    }
    options->side_files.emplace_back(from, to);
    options->certificate["carried"].push_back(entry.name);
    list += (list.empty() ? "" : ", ") + entry.name;
  }
  session->say("carried      " + list);
  const int ranks = target.world();
  if (random == 0 || random == ranks) return;
  const std::string text = "states of random generators: " + std::to_string(random) +
                           " files, the target has " + std::to_string(ranks) +
                           " ranks; they go along, and do not fit it";
  session->notice("notice: " + text);
  options->certificate["not_fitting"].push_back(text);
}

}  // namespace isoshard::tools
