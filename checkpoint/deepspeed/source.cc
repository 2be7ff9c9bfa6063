// Resolution of SOURCE. Nothing here opens a checkpoint file.
#include "checkpoint/deepspeed/source.h"

#include <algorithm>

#include "checkpoint/deepspeed/names.h"
#include "core/error.h"
#include "core/mutant.h"
#include "core/utf8.h"

namespace isoshard::checkpoint {
namespace {

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

bool is_weights_name(const std::string& name) {
  const bool torch_bin = name.rfind("pytorch_model", 0) == 0 && ends_with(name, ".bin");
  return torch_bin || (name.rfind("model", 0) == 0 && ends_with(name, ".safetensors"));
}

bool has_zero_files(const std::vector<DirectoryEntry>& entries) {
  return std::any_of(entries.begin(), entries.end(), [](const DirectoryEntry& entry) {
    return parse_file_name(entry.name).kind != FileName::Kind::kOther;
  });
}

bool has_folder(const std::vector<DirectoryEntry>& entries, const std::string& name) {
  return std::any_of(entries.begin(), entries.end(), [&](const DirectoryEntry& entry) {
    return entry.name == name && entry.kind == DirectoryEntry::Kind::kDirectory;
  });
}

// The names of tags, for messages.
std::string tags_told(Storage& storage, const std::string& folder) {
  std::string tags;
  for (const std::string& name : tags_in(storage, folder))
    tags += (tags.empty() ? "" : ", ") + quote(name);
  return tags.empty() ? "no folder there looks like a tag" : "tags there: " + tags;
}

SourcePlace tag_place(Storage& storage, const std::string& save_folder, const std::string& tag,
                      const std::string& from) {
  const std::string why = why_unsafe_name(tag);
  if (!why.empty() && !mutant("latest_escapes")) {
    const bool zeros = !tag.empty() && tag.find_first_not_of('\0') == tag.npos;
    throw Error(
        ErrorInfo{.code = zeros || tag.empty() ? ErrorCode::kIncomplete : ErrorCode::kHostile,
                  .what = "The tag in " + from + " cannot be used: " +
                          (zeros ? "it is zeros, which is what a file has whose bytes never "
                                   "reached the disk"
                                 : why) +
                          ".",
                  .file = join(save_folder, from),
                  .expected = "the name of a tag folder",
                  .found = zeros ? std::to_string(tag.size()) + " zeros"
                                 : quote(tag) + ", " + std::to_string(tag.size()) + " bytes",
                  .next = "name one with --tag; " + tags_told(storage, save_folder)});
  }
  SourcePlace place{.kind = SourcePlace::Kind::kZero,
                    .folder = join(save_folder, tag),
                    .save_folder = save_folder,
                    .tag = tag,
                    .files = {},
                    .notices = {}};
  if (!storage.is_directory(place.folder)) {
    throw Error(ErrorInfo{.code = ErrorCode::kNotFound,
                          .what = "The tag " + quote(tag) + " (from " + from + ") has no folder.",
                          .file = place.folder,
                          .expected = "a folder of that name",
                          .found = "none",
                          .next = "name another with --tag; " + tags_told(storage, save_folder)});
  }
  if (has_folder(storage.list(place.folder), "zero")) place.kind = SourcePlace::Kind::kUniversal;
  return place;
}

// A file that is a part of a checkpoint says nothing alone.
void refuse_part(Storage& storage, const std::string& path) {
  const std::string name = base_name(path), folder = parent_folder(path);
  const std::string zero = base_name(parent_folder(folder));  // of zero/<parameter>/fp32.pt
  const bool is_part = parse_file_name(name).kind != FileName::Kind::kOther ||
                       name.starts_with("latest") || (zero == "zero" && ends_with(name, ".pt"));
  const bool known = ends_with(name, ".pt") || ends_with(name, ".bin") || ends_with(name, ".pth") ||
                     ends_with(name, ".safetensors") || ends_with(name, ".ckpt");
  if (!is_part && known) return;
  if (!is_part) {
    const std::unique_ptr<ReadableFile> file = storage.open_read(path);
    std::string magic(file->size_bytes() > 4 ? 2 : 0, '\0');
    file->read_at(0, std::as_writable_bytes(std::span(magic)));
    if (magic == "PK") return;  // weights under any name
  }
  throw Error(ErrorInfo{
      .code = ErrorCode::kUsage,
      .what = is_part ? "This is one file of a checkpoint." : "This file holds no weights.",
      .file = path,
      .expected = "a folder, or a file of weights (.safetensors, .bin, .pt)",
      .next = "name the folder it lies in: " +
              quote(zero == "zero" ? parent_folder(parent_folder(folder)) : folder)});
}

SourcePlace weights_place(const std::string& folder, const std::vector<DirectoryEntry>& entries) {
  SourcePlace place{.kind = SourcePlace::Kind::kWeights,
                    .folder = folder,
                    .save_folder = "",
                    .tag = base_name(folder),
                    .files = {},
                    .notices = {}};
  bool safetensors = false;
  for (const DirectoryEntry& entry : entries) {
    safetensors =
        safetensors || (is_weights_name(entry.name) && ends_with(entry.name, ".safetensors"));
  }
  for (const DirectoryEntry& entry : entries) {
    if (!is_weights_name(entry.name)) continue;
    if ((ends_with(entry.name, ".safetensors") == safetensors) !=
        mutant("bin_before_safetensors")) {
      place.files.push_back(entry.name);
    } else {
      place.notices.push_back("both .safetensors and .bin weights are there; .safetensors is read");
    }
  }
  return place;
}

}  // namespace

std::vector<std::string> tags_in(Storage& storage, const std::string& save_folder, bool links) {
  std::vector<std::string> names;
  for (const DirectoryEntry& entry : storage.list(save_folder)) {
    const std::string path = join(save_folder, entry.name);
    const bool folder =
        entry.kind == DirectoryEntry::Kind::kDirectory ||
        (links && entry.kind == DirectoryEntry::Kind::kOther && storage.is_directory(path));
    if (!folder || entry.name[0] == '.') continue;
    try {
      const std::vector<DirectoryEntry> inside = storage.list(path);
      const bool pointer = storage.is_file(join(path, "latest"));
      if (pointer || has_zero_files(inside) || has_folder(inside, "zero"))
        names.push_back(entry.name);
    } catch (const Error& error) {  // lost+found of another user, for one
      if (error.info().code != ErrorCode::kPermission) throw;
    }
  }
  return names;
}

std::vector<std::string> save_folders_in(Storage& storage, const std::string& folder) {
  std::vector<std::string> names = tags_in(storage, folder);
  std::erase_if(names, [&](const std::string& name) {
    return !storage.is_file(join(join(folder, name), "latest"));
  });
  return names;
}

std::string pointer_text(Storage& storage, const std::string& path) {
  std::string text = read_small_file(storage, path, 4096);
  const auto blank = [](char c) { return c == ' ' || c == '\n' || c == '\r' || c == '\t'; };
  while (!text.empty() && blank(text.back()) && !mutant("latest_with_blanks")) text.pop_back();
  while (!text.empty() && blank(text.front())) text.erase(0, 1);
  return text;
}

std::string join(const std::string& folder, const std::string& name) {
  if (folder.empty() || folder == ".") return name;
  return folder.back() == '/' ? folder + name : folder + "/" + name;
}

std::string base_name(const std::string& path) {
  size_t end = path.size();
  while (end > 1 && path[end - 1] == '/') --end;
  const size_t slash = path.rfind('/', end - 1);
  return slash == std::string::npos ? path.substr(0, end) : path.substr(slash + 1, end - slash - 1);
}

std::string parent_folder(const std::string& path) {
  size_t end = path.size();
  while (end > 1 && path[end - 1] == '/') --end;
  const size_t slash = path.rfind('/', end - 1);
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

SourcePlace resolve_source(Storage& storage, const std::string& path, const std::string& tag) {
  if (storage.is_file(path)) {
    refuse_part(storage, path);
    return {.kind = SourcePlace::Kind::kWeights,
            .folder = parent_folder(path),
            .save_folder = "",
            .tag = base_name(path),
            .files = {base_name(path)},
            .folder_named = false,
            .notices = {}};
  }
  if (!storage.is_directory(path)) {
    throw Error(ErrorInfo{.code = ErrorCode::kNotFound,
                          .what = "There is no such file or folder.",
                          .file = path,
                          .next = "check the path; SOURCE is a save folder, a tag "
                                  "folder, a universal folder, or an fp32 file or folder"});
  }
  if (!tag.empty()) return tag_place(storage, path, tag, "--tag");
  const std::vector<DirectoryEntry> entries = storage.list(path);
  const bool latest = storage.is_file(join(path, "latest"));
  const bool universal = storage.is_file(join(path, "latest_universal"));
  if (latest || universal) {
    const std::string pointer =
        latest && !(mutant("universal_pointer_first") && universal) ? "latest" : "latest_universal";
    SourcePlace place =
        tag_place(storage, path, pointer_text(storage, join(path, pointer)), pointer);
    if (latest && universal) {
      place.notices.push_back(
          "both latest and latest_universal are there; latest is followed "
          "(--tag chooses another)");
    }
    return place;
  }
  SourcePlace place{.kind = SourcePlace::Kind::kZero,
                    .folder = path,
                    .save_folder = "",
                    .tag = base_name(path),
                    .files = {},
                    .notices = {}};
  if (has_folder(entries, "zero")) {
    place.kind = SourcePlace::Kind::kUniversal;
    return place;
  }
  if (has_zero_files(entries)) return place;
  SourcePlace weights = weights_place(path, entries);
  if (!weights.files.empty()) return weights;
  // A folder of runs with one save folder in it, as Lightning and Accelerate leave it. A tag
  // without a pointer may be a save that has not ended: it must be named.
  const std::vector<std::string> inner = save_folders_in(storage, path);
  if (inner.size() == 1) {
    SourcePlace found = resolve_source(storage, join(path, inner[0]), "");
    found.notices.push_back("the checkpoint lies one level down, in " + quote(inner[0]));
    return found;
  }
  throw Error(
      ErrorInfo{.code = ErrorCode::kNotFound,
                .what = "The folder holds no checkpoint that is known here.",
                .file = path,
                .expected = "latest or latest_universal, *_model_states.pt files, a zero/ "
                            "folder, or model*.safetensors / pytorch_model*.bin",
                .found = std::to_string(entries.size()) + " entries",
                .next = "name the save folder or the tag folder; " + tags_told(storage, path)});
}

}  // namespace isoshard::checkpoint
