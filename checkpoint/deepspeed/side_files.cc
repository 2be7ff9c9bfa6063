// See side_files.h.
#include "checkpoint/deepspeed/side_files.h"

#include <algorithm>
#include <array>
#include <string_view>

#include "checkpoint/deepspeed/source.h"
#include "checkpoint/shallow_json.h"
#include "core/error.h"
#include "core/utf8.h"

namespace isoshard::checkpoint {
namespace {

constexpr const char* kConfig = "config.json";
constexpr int64_t kConfigLimitBytes = 16 << 20;

// Vocabularies come under many names; what a Trainer leaves beside them has none of these.
bool is_side_file(const std::string& name) {
  static constexpr std::array<std::string_view, 10> kFronts = {
      "tokenizer",     "vocab",        "merges",    "special_tokens_map.", "added_tokens.",
      "chat_template", "preprocessor", "processor", "video_preprocessor",  "normalizer."};
  static constexpr std::array<std::string_view, 4> kEnds = {".model", ".tiktoken", ".vocab",
                                                            ".spm"};
  return name == kConfig || name == "generation_config.json" ||
         std::ranges::any_of(kFronts, [&](auto front) { return name.starts_with(front); }) ||
         std::ranges::any_of(kEnds, [&](auto end) { return name.ends_with(end); });
}

}  // namespace

std::string folder_of_config(Storage& storage, const ShardedState& state) {
  for (const std::string& folder : {parent_folder(state.folder), state.folder}) {
    if (storage.is_file(join(folder, kConfig))) return folder;
  }
  return "";
}

nlohmann::json read_model_config(Storage& storage, const std::string& folder) {
  const std::string path = join(folder, kConfig);
  if (!storage.is_file(path)) {
    throw Error(ErrorInfo{.code = ErrorCode::kNotFound,
                          .what = "There is no config.json, without which from_pretrained does not "
                                  "know the model.",
                          .file = folder,
                          .safe = "nothing was written",
                          .next = "name the model's folder with --config; --no-config writes the "
                                  "weights alone"});
  }
  nlohmann::json config =
      parse_shallow_json(read_small_file(storage, path, kConfigLimitBytes), path);
  if (config.is_object()) return config;
  throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                        .what = "The model's config is not a JSON object.",
                        .file = path,
                        .safe = "nothing was written",
                        .next = "name another folder with --config"});
}

std::vector<std::string> side_files(Storage& storage, const std::string& folder,
                                    const nlohmann::json& config) {
  std::vector<std::string> names;
  for (const DirectoryEntry& entry : storage.list(folder)) {
    const bool code = config.contains("auto_map") && entry.name.ends_with(".py") &&
                      entry.name != "zero_to_fp32.py" && entry.name != "zero_to_torch.py";
    if (!is_side_file(entry.name) && !code) continue;
    if (!why_unsafe_name(entry.name).empty()) continue;
    if (storage.is_file(join(folder, entry.name))) names.push_back(entry.name);
  }
  return names;
}

std::vector<FileBlueprint> copy_side_files(ShardedState* state, Storage& storage,
                                           const std::string& folder,
                                           const std::vector<std::string>& names) {
  std::vector<FileBlueprint> files;
  for (const std::string& name : names) {
    const std::string path = join(folder, name);
    std::shared_ptr<ReadableFile> opened = storage.open_read(path);
    const int64_t bytes = opened->size_bytes();
    state->files.push_back({path, name, nullptr, std::move(opened), /*inside=*/false});
    const int number = static_cast<int>(state->files.size()) - 1;
    files.push_back(whole_copy(name, number, bytes));
  }
  return files;
}

}  // namespace isoshard::checkpoint
