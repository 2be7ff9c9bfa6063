// Inventory of a tag folder: which files must be there, which must not, and which form they have.
#include "checkpoint/deepspeed/reader.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <map>
#include <set>
#include <thread>

#include "checkpoint/deepspeed/hyper.h"
#include "checkpoint/deepspeed/names.h"
#include "checkpoint/deepspeed/zero_files.h"
#include "checkpoint/format/crc.h"
#include "core/cast.h"
#include "core/error.h"
#include "core/threads.h"

namespace isoshard::checkpoint {
namespace {

struct Inventory {
  std::map<int, std::string> model;          // by mp
  std::map<int, std::string> model_of_rank;  // by dp
  std::map<int, std::string> optim;          // by dp
  std::vector<std::string> other;
};

[[noreturn]] void refuse(ErrorCode code, const std::string& what, const std::string& file,
                         const std::string& expected, const std::string& found,
                         const std::string& next) {
  throw Error(ErrorInfo{.code = code,
                        .what = what,
                        .file = file,
                        .expected = expected,
                        .found = found,
                        .next = next});
}

constexpr const char* kCovered = "ZeRO stages 0 to 3, BF16_Optimizer, Ulysses";
constexpr const char* kElsewhere =
    "rename a file that only its name makes so, or convert the checkpoint with DeepSpeed "
    "(ds_to_universal.py); docs/SUPPORT.md lists what is covered";

Inventory take_inventory(Storage& storage, const std::string& folder) {
  Inventory inventory;
  using Kind = FileName::Kind;
  for (const DirectoryEntry& entry : storage.list(folder)) {
    const FileName name = parse_file_name(entry.name);
    const std::string path = join(folder, entry.name);
    if (entry.name == "offloaded_tensors") {
      refuse(ErrorCode::kUnsupported, "Optimizer state offloaded to NVMe is not supported.", path,
             "no offloaded_tensors folder", "one", "save without NVMe offload");
    }
    if (name.kind == Kind::kLayer)
      refuse(ErrorCode::kUnsupported, "Pipeline checkpoints are not supported yet.", path, kCovered,
             entry.name, kElsewhere);
    if (name.kind == Kind::kExpert || name.kind == Kind::kExpertOptim) {
      refuse(ErrorCode::kUnsupported,
             "Mixture-of-experts checkpoints (native MoE, AutoEP) are not supported yet.", path,
             kCovered, entry.name, kElsewhere);
    }
    if (name.kind != Kind::kOther && name.kind != Kind::kModel && name.mp != 0) {
      refuse(ErrorCode::kUnsupported,
             "Tensor-parallel checkpoints (several mp ranks) are not supported yet.", path,
             "mp_rank_00 only", entry.name, kElsewhere);
    }
    std::map<int, std::string>* where = name.kind == Kind::kModel         ? &inventory.model
                                        : name.kind == Kind::kModelOfRank ? &inventory.model_of_rank
                                        : name.kind == Kind::kOptim       ? &inventory.optim
                                                                          : nullptr;
    if (where == nullptr) {
      inventory.other.push_back(entry.name);
      continue;
    }
    const int rank = name.kind == Kind::kModel ? name.mp : name.dp;
    const auto [known, fresh] = where->emplace(rank, entry.name);
    if (!fresh) {
      refuse(ErrorCode::kMismatch,
             "Two files stand for the same rank; one is left over from another save.", folder,
             "one file for rank " + std::to_string(rank), known->second + " and " + entry.name,
             "remove the older one after looking at both");
    }
  }
  if (inventory.model.size() > 1) {
    refuse(ErrorCode::kUnsupported,
           "Tensor-parallel checkpoints (several mp ranks) are not supported yet.", folder,
           "mp_rank_00 only", std::to_string(inventory.model.size()) + " model files", kElsewhere);
  }
  return inventory;
}

// Files of ranks 0 … count−1, all there and no more.
std::vector<std::string> complete(const std::map<int, std::string>& files, int64_t count,
                                  const std::string& folder, const std::string& what) {
  std::string missing, extra;
  for (int64_t rank = 0; rank < count; ++rank) {
    if (files.count(static_cast<int>(rank)) == 0 && missing.size() < 200)
      missing += (missing.empty() ? "rank " : ", ") + std::to_string(rank);
  }
  for (const auto& [rank, name] : files) {
    if (rank >= count) extra += (extra.empty() ? "" : ", ") + name;
  }
  if (!missing.empty()) {
    refuse(ErrorCode::kIncomplete, "The checkpoint is incomplete: " + what + " files are missing.",
           folder, std::to_string(count) + " files, ranks 0 to " + std::to_string(count - 1),
           "missing: " + missing,
           "bring the missing files from the node that wrote them, or use an older checkpoint");
  }
  if (!extra.empty()) {
    refuse(ErrorCode::kMismatch,
           "The folder holds " + what + " files of a larger world: shards of two saves are mixed.",
           folder, std::to_string(count) + " files", "also " + extra,
           "find out which save is the newer one; do not delete before");
  }
  std::vector<std::string> names;
  for (const auto& [rank, name] : files) names.push_back(name);
  return names;
}

void check_scalars(const ShardedState& state) {
  // Every rank's optimizer must stand at the same step.
  std::map<std::string, std::pair<std::string, std::string>> first;  // state[k] name → value, file
  for (int file : state.optim_files) {
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
        if (fresh || known->second.first == value) continue;
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

// What ranks above 0 hold of their own at stage 3: client state and buffers. Their pickles are
// dropped where they say nothing that rank 0's does not.
void compare_ranks(ShardedState* state, const ModelStates& model) {
  const std::string first = client_state_json(state->document(model.file)).dump();
  const auto crc_of = [&](int file, const std::string& name) -> int64_t {
    const Fields f(state->document(file));
    const TensorView view = f.tensor(f.need(f.need(f.root(), "module"), name), name);
    return f.document().record(view.storage).crc32;
  };
  bool same_buffers = true;
  for (size_t rank = 1; rank < state->model_files.size(); ++rank) {
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

// Ranks above 0 need no pickle any more: what was read of it stands in the state.
void drop_pickles(ShardedState* state) {
  const std::set<int> keep(state->own_client_state.begin(), state->own_client_state.end());
  const auto drop = [&](const std::vector<int>& files) {
    for (size_t rank = 1; rank < files.size(); ++rank) {
      if (keep.count(files[rank]) == 0)
        state->files[static_cast<size_t>(files[rank])].torch->drop_pickle();
    }
  };
  drop(state->model_files);
  drop(state->optim_files);
}

void read_zero(ShardedState* state, Storage& storage, const ReadOptions& options) {
  const Inventory inventory = take_inventory(storage, state->folder);
  for (const std::string& name : inventory.other) {
    if (name != "MANIFEST.json" && name != "certificate.json") {
      state->notices.push_back(
          "a file that is no part of a DeepSpeed checkpoint lies in the folder: " + quote(name));
    }
  }
  const bool stage3 = !inventory.model_of_rank.empty();
  if (stage3 && !inventory.model.empty()) {
    refuse(ErrorCode::kMismatch, "Model files of stage 3 and of stages 0 to 2 lie in one folder.",
           state->folder, "one form",
           inventory.model.begin()->second + " and " + inventory.model_of_rank.begin()->second,
           "find out which save is the newer one");
  }
  if (!stage3 && inventory.model.empty()) {
    refuse(ErrorCode::kIncomplete, "The checkpoint is incomplete: there is no model file.",
           state->folder, "mp_rank_00_model_states.pt or zero_pp_rank_0_mp_rank_00_model_states.pt",
           std::to_string(inventory.optim.size()) + " optimizer files",
           "bring it from the node of rank 0");
  }
  const std::string first_name =
      stage3 ? inventory.model_of_rank.begin()->second : inventory.model.begin()->second;
  const int first = open_files(state, storage, {first_name}, options)[0];
  const ModelStates model = read_model_states(*state, first);
  state->version = model.version;
  set_topology(state, model, options.sequence_degree);
  const int64_t dp = model.dp_world;
  if (!stage3) {
    state->model_files = {first};
    if (!model.has_param_shapes) {
      if (!inventory.optim.empty()) {
        refuse(ErrorCode::kUnsupported,
               "Optimizer files lie beside a model file without param_shapes (bf16 pipeline or "
               "stale files).",
               state->folder, "no optimizer files at stage 0", inventory.optim.begin()->second,
               "remove stale files after looking at them");
      }
      read_zero0(state, model, options, storage);
      return;
    }
    state->optim_files = open_files(
        state, storage, complete(inventory.optim, dp, state->folder, "optimizer"), options);
    read_zero12(state, model);
  } else {
    std::vector<std::string> names = complete(inventory.model_of_rank, dp, state->folder, "model");
    state->model_files = {first};
    names.erase(names.begin());
    for (int file : open_files(state, storage, names, options)) state->model_files.push_back(file);
    state->optim_files = open_files(
        state, storage, complete(inventory.optim, dp, state->folder, "optimizer"), options);
    read_zero3(state, model);
    compare_ranks(state, model);
  }
  add_module_entries(state, model);
  check_scalars(*state);
  drop_pickles(state);
}

}  // namespace

std::vector<int> open_files(ShardedState* state, Storage& storage,
                            const std::vector<std::string>& names, const ReadOptions& options) {
  std::vector<std::shared_ptr<TorchFile>> opened(names.size());
  std::vector<std::exception_ptr> failures(names.size());
  std::atomic<size_t> next{0};
  PickleShelf shelf;
  const auto work = [&] {
    for (size_t i = next++; i < names.size(); i = next++) {
      try {
        opened[i] = std::make_shared<TorchFile>(storage, join(state->folder, names[i]), &shelf);
      } catch (...) {
        failures[i] = std::current_exception();
      }
    }
  };
  std::vector<std::thread> threads;
  for (int i = 1; i < options.workers && names.size() > 8; ++i) {
    if (!try_start(&threads, work)) break;
  }
  work();
  for (std::thread& thread : threads) thread.join();
  std::vector<int> numbers;
  for (size_t i = 0; i < names.size(); ++i) {
    if (failures[i]) std::rethrow_exception(failures[i]);  // the first by name, on every run
    const std::string base = base_name(names[i]);
    const std::string stem = base.substr(0, base.rfind('.'));
    const std::string& prefix = opened[i]->zip().prefix;
    if (prefix != stem && prefix != "archive" && !options.allow_renamed) {
      throw Error(ErrorInfo{
          .code = ErrorCode::kMismatch,
          .what = "The file was saved under another name: two files may be swapped.",
          .file = opened[i]->path(),
          .entry = "archive prefix",
          .expected = quote(stem),
          .found = quote(prefix),
          .next = "rename it back, or pass --allow-renamed if you renamed it on purpose"});
    }
    if (prefix != stem && prefix != "archive") {
      state->inferred.push_back(quote(names[i]) +
                                ": taken for what its name says, though it was saved as " +
                                quote(prefix) + " (--allow-renamed)");
      state->not_verified.push_back("whose file " + quote(names[i]) + " is: it was saved as " +
                                    quote(prefix) + " (--allow-renamed)");
    }
    state->files.push_back({opened[i]->path(), names[i], opened[i], nullptr});
    numbers.push_back(static_cast<int>(state->files.size()) - 1);
  }
  return numbers;
}

std::string scalar_text(const ShardedState& state, NodeRef ref) {
  const TorchFile& document = state.document(ref.file);
  const Pickle& pickle = document.pickle();
  double value = 0;
  switch (pickle.kind(ref.node)) {
    case Kind::kNone:
      return "None";
    case Kind::kInt:
    case Kind::kBool:
      return std::to_string(pickle.integer_value(ref.node));
    case Kind::kFloat:
      value = pickle.real_value(ref.node);
      break;
    default: {
      const Fields fields(document);
      const TensorView view = fields.tensor(ref.node, "scalar");
      if (numel(view.shape) != 1)
        fields.fail("A scalar state has several elements.", "scalar", "1", to_string(view.shape));
      const ZipRecord& record = document.record(view.storage);
      if (record.size_bytes > 4096)
        fields.fail("A scalar lies in a large storage.", quote(record.name), "at most 4096 bytes",
                    std::to_string(record.size_bytes));
      std::string bytes(static_cast<size_t>(record.size_bytes), '\0');
      document.file().read_at(record.data_offset, std::as_writable_bytes(std::span(bytes)));
      if (crc32_of(std::as_bytes(std::span(bytes))) != record.crc32)
        fields.fail("A record's bytes do not fit its CRC.", quote(record.name),
                    hex16(record.crc32).substr(8), "another");
      const std::byte* at = reinterpret_cast<const std::byte*>(bytes.data()) +
                            view.offset * item_size_bytes(view.dtype);
      if (view.dtype == DType::kInt64) {
        int64_t whole;
        std::memcpy(&whole, at, sizeof whole);
        return std::to_string(whole);
      }
      if (view.dtype == DType::kFloat64) {
        std::memcpy(&value, at, sizeof value);
      } else {
        float single = 0;
        cast(view.dtype, {at, static_cast<size_t>(item_size_bytes(view.dtype))}, DType::kFloat32,
             std::as_writable_bytes(std::span(&single, 1)));
        value = single;
      }
    }
  }
  char buffer[64];
  const bool whole = std::isfinite(value) && value == std::floor(value) && std::fabs(value) < 9e15;
  std::snprintf(buffer, sizeof buffer, whole ? "%.0f" : "%a", value);
  return buffer;
}

void require_source(Storage& storage, const std::string& path, const std::string& tag) {
  // Opening says best what a path is that is neither: nothing, a pipe, a circle of links.
  if (!storage.is_directory(path)) {
    if (!storage.is_file(path)) storage.open_read(path);
    return;
  }
  const std::string latest = join(path, "latest");
  if (!tag.empty() || storage.is_file(latest)) return;
  for (const DirectoryEntry& entry : storage.list(path)) {
    if (entry.name == "latest") storage.open_read(latest);
  }
}

ShardedState read_checkpoint(Storage& storage, const std::string& path,
                             const ReadOptions& options) {
  require_source(storage, path, options.tag);
  const SourcePlace place = resolve_source(storage, path, options.tag);
  ShardedState state;
  state.folder = place.folder;
  state.tag = place.tag;
  state.notices = place.notices;
  state.has_places = options.places;
  if (place.kind == SourcePlace::Kind::kZero) read_zero(&state, storage, options);
  if (place.kind == SourcePlace::Kind::kUniversal) read_universal(&state, storage, options);
  if (place.kind == SourcePlace::Kind::kWeights) read_weights(&state, storage, place);
  if (state.has_places) check_cover(state);
  state.find_parameter("");  // completes the index
  return state;
}

}  // namespace isoshard::checkpoint
