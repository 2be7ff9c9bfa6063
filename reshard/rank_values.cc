// See rank_values.h.
#include "reshard/rank_values.h"

#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <tuple>

#include "checkpoint/cancel.h"
#include "checkpoint/deepspeed/hyper.h"
#include "checkpoint/format/crc.h"
#include "core/error.h"
#include "reshard/rank_place.h"
#include "reshard/tensor_values.h"
#include "reshard/value_walk.h"

namespace isoshard::reshard {
namespace {

using checkpoint::FileName;
using checkpoint::kNoNode;
using checkpoint::NodeId;
using checkpoint::Pickle;
using checkpoint::TorchFile;

// What ranks rightly have of their own, at any depth.
const std::set<std::string> kOwn = {"params",           "param_slice_mappings",
                                    "group_paddings",   "param_alignment_paddings",
                                    "ds_autoep_layers", "ds_zero_partition_groups"};
// What every rank of any parallelism repeats, of a model file.
const std::set<std::string> kShared = {"lr_scheduler",
                                       "data_sampler",
                                       "random_ltd",
                                       "skipped_steps",
                                       "global_steps",
                                       "global_samples",
                                       "dp_world_size",
                                       "mp_world_size",
                                       "ds_config",
                                       "ds_version",
                                       "checkpoint_parallel_dimensions",
                                       "universal_checkpoint_info"};
// What every rank repeats of an optimizer's file, under optimizer_state_dict.
const std::set<std::string> kOptimizer = {"loss_scaler", "dynamic_loss_scale", "overflow",
                                          "clip_grad",   "zero_stage",         "partition_count",
                                          "ds_version"};
// The optimizer's own state there, whose groups a pipeline's stages may have otherwise.
const std::set<std::string> kBase = {"base_optimizer_state", "optimizer_state_dict"};
// Models and optimizers say the same of these.
const std::set<std::string> kEverywhere = {"ds_config", "ds_version"};

// What the values of all files may take: each file has the budget of its walk, and a thousand files
// a thousand of these. A value is a path, its text and what a map holds beside them.
constexpr int64_t kMostBytes = int64_t{256} << 20, kValueBytes = 300;
// Differences beyond these are counted and not listed.
constexpr int kMostListed = 1000;

enum class Family { kModel, kOptim, kExpertOptim };

struct RankFile {
  std::string relative;
  FileName name;
  Family family = Family::kModel;
};

struct Value {
  ReplicaKind kind = ReplicaKind::kValue;
  bool judged = true;
  bool structural = false;                   // of a pipeline: compared where stages have the same
  std::set<Family> families;                 // whose files must have it
  std::map<std::string, int> numbers;        // of texts
  std::vector<std::pair<int, int>> holders;  // file, number of its text
};

struct Buffer {
  std::map<std::string, std::vector<int>> files;  // by dtype, shape and CRCs
  int64_t elements = 0;
};

std::optional<Family> family_of(const FileName& name) {
  switch (name.kind) {
    case FileName::Kind::kModel:
    case FileName::Kind::kModelOfRank:
      return Family::kModel;
    case FileName::Kind::kOptim:
      return Family::kOptim;
    case FileName::Kind::kExpertOptim:
      return Family::kExpertOptim;
    default:
      return std::nullopt;
  }
}

// JSON of ASCII alone: of other characters a terminal may obey some, or turn the line round.
std::string printable(const nlohmann::json& value) {
  std::string text;
  for (const char c :
       value.dump(-1, ' ', /*ensure_ascii=*/true, nlohmann::json::error_handler_t::replace)) {
    if (c == 0x7f)
      text += "\\u007f";
    else
      text += c;
  }
  return text;
}

checkpoint::Leaf buffer_leaf(const TorchFile& document, int file, const std::string& name) {
  const NodeId module = document.pickle().find(document.pickle().root, "module");
  const NodeId node = module == kNoNode ? kNoNode : document.pickle().find(module, name);
  const auto view = node == kNoNode ? std::nullopt : document.tensor(node);
  if (!view) return {};
  return checkpoint::file_leaf(document, file, *view, name, "param");
}

class RankValues {
 public:
  RankValues(Storage& storage, std::string folder, ReplicaReport* report)
      : storage_(storage), folder_(std::move(folder)), report_(*report) {}

  void run() {
    list_files();
    if (files_.size() < 2) return;
    checkpoint::PickleShelf shelf;
    for (size_t i = 0; i < files_.size(); ++i) {
      checkpoint::throw_if_cancelled();
      try {
        read(static_cast<int>(i), &shelf);
        read_.insert(static_cast<int>(i));
      } catch (const Error& error) {
        if (error.info().code == ErrorCode::kInterrupted) throw;
        report_.uncompared.push_back(quote(files_[i].relative) +
                                     ": its values could not be read: " + error.info().what);
      }
    }
    group_mp_ranks();
    for (const auto& [path, value] : values_) compare(path, value);
    if (unlisted_ > 0)
      report_.uncompared.push_back(std::to_string(unlisted_) +
                                   " more values that differ are counted and not listed");
    for (const auto& [key, buffer] : buffers_) compare_buffer(key.second, buffer);
  }

 private:
  void list_files() {
    for (const DirectoryEntry& entry : storage_.list(folder_)) {
      const FileName name = checkpoint::parse_file_name(entry.name);
      if (const std::optional<Family> family = family_of(name))
        files_.push_back({entry.name, name, *family});
      pipeline_ = pipeline_ || name.kind == FileName::Kind::kLayer;
    }
    std::ranges::stable_sort(
        files_, {}, [](const RankFile& f) { return std::tuple(f.family, f.name.mp, f.name.dp); });
  }

  void put(int file, const std::string& path, const std::string& text, const Value& like) {
    const auto [known, fresh] = values_.try_emplace(path, like);
    Value& value = known->second;
    const auto [number, other] =
        value.numbers.emplace(text, static_cast<int>(value.numbers.size()));
    if (value.holders.empty() || value.holders.back().first != file)
      value.holders.emplace_back(file, number->second);
    bytes_ += static_cast<int64_t>(sizeof value.holders.back());
    if (fresh) bytes_ += kValueBytes + 2 * static_cast<int64_t>(path.size());
    if (other) bytes_ += kValueBytes + static_cast<int64_t>(text.size());
    if (bytes_ > kMostBytes) {
      throw Error(ErrorInfo{
          .code = ErrorCode::kLimit,
          .what = "A limit against resource bombs was reached: values of all ranks.",
          .file = files_[static_cast<size_t>(file)].relative,
          .expected = "at most " + std::to_string(kMostBytes) + " bytes of paths and texts",
          .next = "find out who wrote these files; a checkpoint needs less"});
    }
    if (!value.structural || !pipeline_) return;
    paths_[{files_[static_cast<size_t>(file)].family, files_[static_cast<size_t>(file)].name.mp}]
        .insert(path);
  }

  void walk(int file, const TorchFile& document, NodeId node, const std::string& path,
            const Value& like, bool steps_only = false) {
    ValueWalk(document, kOwn, &budget_, [&](const std::string& at, const std::string& text) {
      put(file, at, text, like);
    }).walk(node, path, steps_only);
  }

  void read(int file, checkpoint::PickleShelf* shelf) {
    budget_ = {};
    const RankFile& rank = files_[static_cast<size_t>(file)];
    const auto opened =
        std::make_shared<TorchFile>(storage_, checkpoint::join(folder_, rank.relative), shelf);
    const TorchFile& document = *opened;
    const Pickle& pickle = document.pickle();
    const std::vector<NodeId>& entries = pickle.entries(pickle.root);
    for (size_t i = 0; i + 1 < entries.size(); i += 2) {
      if (pickle.kind(entries[i]) != checkpoint::Kind::kString) continue;
      const std::string& key = pickle.text(entries[i]);
      if (rank.family == Family::kOptim && key == "optimizer_state_dict") {
        read_optimizer(file, document, entries[i + 1]);
      } else if (key == "optimizer" && rank.family != Family::kOptim) {
        walk(file, document, entries[i + 1], of_family(rank.family) + key,
             {.structural = true, .families = {rank.family}}, /*steps_only=*/true);
      } else if (kEverywhere.contains(key)) {
        walk(file, document, entries[i + 1], key, {.families = {Family::kModel, Family::kOptim}});
      } else if (kShared.contains(key) && rank.family == Family::kModel) {
        walk(file, document, entries[i + 1], key, {.families = {Family::kModel}});
      }
    }
    if (rank.family == Family::kModel) read_client_state(file, document);
    if (rank.name.kind == FileName::Kind::kModelOfRank) read_buffers(file, opened);
  }

  static std::string of_family(Family family) {
    return family == Family::kExpertOptim ? "expp " : "";
  }

  void read_optimizer(int file, const TorchFile& document, NodeId node) {
    const Pickle& pickle = document.pickle();
    const std::vector<NodeId>& entries = pickle.entries(node);
    for (size_t i = 0; i + 1 < entries.size(); i += 2) {
      if (pickle.kind(entries[i]) != checkpoint::Kind::kString) continue;
      const std::string& key = pickle.text(entries[i]);
      if (kOwn.contains(key)) continue;
      const bool base = kBase.contains(key);
      walk(file, document, entries[i + 1], "optimizer_state_dict." + shortened(plain_name(key)),
           {.judged = base || kOptimizer.contains(key),
            .structural = base || !kOptimizer.contains(key),
            .families = {Family::kOptim}});
    }
  }

  void read_client_state(int file, const TorchFile& document) {
    const nlohmann::json state = checkpoint::client_state_json(document);
    for (const auto& [key, value] : state.items()) {
      put(file, "client state " + shortened(plain_name(key)), shortened(printable(value)),
          {.kind = ReplicaKind::kClientState, .judged = false, .families = {Family::kModel}});
    }
  }

  void read_buffers(int file, const std::shared_ptr<TorchFile>& opened) {
    const TorchFile& document = *opened;
    const Pickle& pickle = document.pickle();
    const NodeId names = pickle.find(pickle.root, "buffer_names");
    if (names == kNoNode || pickle.kind(names) != checkpoint::Kind::kList) return;
    checkpoint::ShardedState state;
    state.files.push_back(
        {document.path(), files_[static_cast<size_t>(file)].relative, opened, nullptr});
    std::set<std::string> seen;
    for (const NodeId node : pickle.items(names)) {
      if (pickle.kind(node) != checkpoint::Kind::kString) continue;
      if (!seen.insert(pickle.text(node)).second) continue;
      const checkpoint::Leaf leaf = buffer_leaf(document, 0, pickle.text(node));
      if (leaf.name.empty()) continue;
      const LeafCrc crc = crc_of_leaf(state, leaf);
      Buffer& buffer = buffers_[{files_[static_cast<size_t>(file)].name.mp, pickle.text(node)}];
      buffer.elements = leaf.size_elements();
      buffer
          .files[name(leaf.dtype) + to_string(leaf.shape) + checkpoint::hex16(crc.ecma) +
                 checkpoint::hex16(crc.jones)]
          .push_back(file);
    }
  }

  // Tensor-parallel ranks have the same entries, all of them compared. Of a pipeline, whose stages
  // may have their own, mp ranks with the same paths are compared with each other.
  void group_mp_ranks() {
    std::map<std::pair<Family, std::set<std::string>>, std::vector<int>> known;
    for (const auto& [rank, paths] : paths_) known[{rank.first, paths}].push_back(rank.second);
    int number = 0;
    std::map<Family, std::string> texts;
    std::map<Family, int> classes;
    for (const auto& [kind, ranks] : known) {
      std::string list;
      for (const int rank : ranks) {
        class_of_[{kind.first, rank}] = number;
        list += (list.empty() ? "" : ", ") + std::to_string(rank);
      }
      ++number;
      texts[kind.first] += (classes[kind.first]++ == 0 ? "" : "; of ") + list;
    }
    for (const auto& [family, text] : texts) {
      if (classes[family] < 2) continue;
      report_.uncompared.push_back(of_family(family) +
                                   "optimizer entries of stages that have others: only among mp "
                                   "ranks that have the same, of " +
                                   text);
    }
  }

  void compare(const std::string& path, const Value& value) {
    std::vector<std::string> texts(value.numbers.size());
    for (const auto& [text, number] : value.numbers) texts[static_cast<size_t>(number)] = text;
    std::map<int, int> held(value.holders.begin(), value.holders.end());
    std::map<int, std::vector<int>> classes;  // files to be compared
    for (const int file : read_) {
      const RankFile& rank = files_[static_cast<size_t>(file)];
      if (!value.families.contains(rank.family)) continue;
      if (!value.structural || !pipeline_) {
        classes[0].push_back(file);
        continue;
      }
      const auto own = class_of_.find({rank.family, rank.name.mp});
      const auto paths = paths_.find({rank.family, rank.name.mp});
      if (own != class_of_.end() && paths->second.contains(path))
        classes[own->second].push_back(file);
    }
    for (const auto& [number, files] : classes) {
      std::vector<std::string> contents;
      for (const int file : files) {
        const auto text = held.find(file);
        contents.push_back(text == held.end() ? "absent"
                                              : texts[static_cast<size_t>(text->second)]);
      }
      compare_files(path, value, files, contents);
    }
  }

  void compare_files(const std::string& path, const Value& value, const std::vector<int>& files,
                     const std::vector<std::string>& contents) {
    if (files.size() < 2) return;
    ReplicaCount& count = report_.of(value.kind);
    ++count.sets;
    count.copies += static_cast<int64_t>(files.size());
    count.elements += static_cast<int64_t>(files.size());
    ReplicaDifference result{.kind = value.kind, .name = path, .judged = value.judged};
    vote(contents, &result);
    if (result.groups.size() < 2) return;
    ++count.differing;
    if (++listed_[value.judged ? 1 : 0] > kMostListed) {
      ++unlisted_;
      return;
    }
    for (const int file : files) {
      const std::string& relative = files_[static_cast<size_t>(file)].relative;
      result.copies.push_back({relative, place_of_file(relative)});
    }
    for (size_t g = 1; g < result.groups.size(); ++g) {
      const int copy = result.groups[g][0], against = result.groups[0][0];
      result.contrasts.push_back({.copy = copy,
                                  .against = against,
                                  .file = result.copies[static_cast<size_t>(copy)].file,
                                  .entry = path,
                                  .found = contents[static_cast<size_t>(copy)],
                                  .expected = contents[static_cast<size_t>(against)]});
    }
    if (value.families.size() > 1 && path.starts_with("ds_config") &&
        !within_families(files, contents)) {
      result.judged = false;
      result.evidence = "model and optimizer files each say one thing: one kind was edited";
    }
    if (path.ends_with(".step")) result.evidence = by_global_steps(result, contents);
    report_.differences.push_back(std::move(result));
  }

  // Whether files of one family differ among themselves.
  bool within_families(const std::vector<int>& files,
                       const std::vector<std::string>& contents) const {
    std::map<Family, std::set<std::string>> by_family;
    for (size_t i = 0; i < files.size(); ++i)
      by_family[files_[static_cast<size_t>(files[i])].family].insert(contents[i]);
    return std::ranges::any_of(by_family, [](const auto& each) { return each.second.size() > 1; });
  }

  // The step of an optimizer that has skipped none is global_steps.
  std::string by_global_steps(const ReplicaDifference& difference,
                              const std::vector<std::string>& contents) const {
    const auto steps = values_.find("global_steps");
    const auto skipped = values_.find("skipped_steps");
    if (steps == values_.end() || steps->second.numbers.size() != 1) return "";
    if (skipped == values_.end() || skipped->second.numbers.size() != 1 ||
        skipped->second.numbers.begin()->first != "0")
      return "";
    const std::string& told = steps->second.numbers.begin()->first;
    for (const std::vector<int>& group : difference.groups) {
      const std::string& text = contents[static_cast<size_t>(group[0])];
      if (text == told || text.starts_with(told + " ") || text.starts_with(told + ".0"))
        return "global_steps is " + told + ", as in " +
               quote(difference.copies[static_cast<size_t>(group[0])].file);
    }
    return "global_steps is " + told + ", as in none of them";
  }

  void compare_buffer(const std::string& name, const Buffer& buffer) {
    std::vector<int> files;
    for (const auto& [content, holders] : buffer.files)
      files.insert(files.end(), holders.begin(), holders.end());
    std::ranges::sort(files);
    if (files.size() < 2) return;
    if (buffer.files.size() == 1) {
      ReplicaCount& count = report_.of(ReplicaKind::kBuffer);
      ++count.sets;
      count.copies += static_cast<int64_t>(files.size());
      count.elements += static_cast<int64_t>(files.size()) * buffer.elements;
      return;
    }
    checkpoint::ShardedState state;
    TensorSet set{ReplicaKind::kBuffer, {}};
    for (const int file : files) {
      const std::string& relative = files_[static_cast<size_t>(file)].relative;
      const std::string path = checkpoint::join(folder_, relative);
      const auto document = std::make_shared<TorchFile>(storage_, path);
      const auto number = static_cast<int>(state.files.size());
      state.files.push_back({path, relative, document, nullptr});
      set.leaves.push_back(state.add_leaf(buffer_leaf(*document, number, name)));
      const checkpoint::Leaf &first = state.leaf(set.leaves[0]), &last = state.leaf(number);
      if (first.shape == last.shape && first.dtype == last.dtype) continue;
      report_.uncompared.push_back("buffer " + quote(name) +
                                   ": ranks differ in its shape or dtype");
      return;
    }
    compare_sets(state, {set}, {}, 1, &report_);
  }

  Storage& storage_;
  const std::string folder_;
  ReplicaReport& report_;
  std::vector<RankFile> files_;
  std::set<int> read_;
  bool pipeline_ = false;
  WalkBudget budget_;   // of the file that is being read
  int64_t bytes_ = 0;   // of values_
  int listed_[2] = {};  // differences that are not judged, and that are
  int64_t unlisted_ = 0;
  std::map<std::string, Value> values_;  // by path
  std::map<std::pair<Family, int>, std::set<std::string>> paths_;
  std::map<std::pair<Family, int>, int> class_of_;
  std::map<std::pair<int, std::string>, Buffer> buffers_;  // by mp rank and name
};

}  // namespace

void compare_rank_values(Storage& storage, const std::string& folder, ReplicaReport* report) {
  RankValues(storage, folder, report).run();
}

}  // namespace isoshard::reshard
