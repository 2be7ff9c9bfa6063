// Opens files, and finds out which reader a folder wants.
#include "checkpoint/deepspeed/reader.h"

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <thread>

#include "checkpoint/cancel.h"
#include "checkpoint/deepspeed/zero_files.h"
#include "checkpoint/format/crc.h"
#include "core/cast.h"
#include "core/error.h"
#include "core/mutant.h"
#include "core/threads.h"

namespace isoshard::checkpoint {

std::vector<int> open_files(ShardedState* state, Storage& storage,
                            const std::vector<std::string>& names, const ReadOptions& options) {
  std::vector<std::shared_ptr<TorchFile>> opened(names.size());
  std::vector<std::exception_ptr> failures(names.size());
  std::atomic<size_t> next{0};
  PickleShelf shelf;
  const auto work = [&] {
    for (size_t i = next++; i < names.size(); i = next++) {
      try {
        throw_if_cancelled();
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
    if (prefix != stem && prefix != "archive" && !options.allow_renamed &&
        !mutant("swapped_names_allowed")) {
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
      if (crc32_of(std::as_bytes(std::span(bytes))) != record.crc32 &&
          !mutant("scalar_crc_skipped"))
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

std::string ScalarTexts::of(const std::vector<Scalar>& scalars) {
  std::string result;
  for (const Scalar& scalar : scalars) {
    std::string& text = texts_[{scalar.value.file, scalar.value.node}];
    if (text.empty()) text = scalar_text(state_, scalar.value);
    result += scalar.name + " " + text + " ";
  }
  return result;
}

void require_source(Storage& storage, const std::string& path, const std::string& tag) {
  // Opening says best what a path is that is neither: nothing, a pipe, a circle of links.
  if (!storage.is_directory(path)) {
    if (!storage.is_file(path)) storage.open_read(path);
    return;
  }
  const auto pointer = [&](const char* name) { return storage.is_file(join(path, name)); };
  if (!tag.empty() || pointer("latest") || pointer("latest_universal")) return;
  for (const DirectoryEntry& entry : storage.list(path)) {
    if (entry.name == "latest" || entry.name == "latest_universal")
      storage.open_read(join(path, entry.name));
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
