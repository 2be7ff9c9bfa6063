// See replicas.h: the sets of a state, compared by what a pass has summed up.
#include "reshard/replicas.h"

#include <algorithm>
#include <functional>
#include <map>
#include <optional>

#include "checkpoint/cancel.h"
#include "checkpoint/deepspeed/names.h"
#include "checkpoint/deepspeed/source.h"
#include "checkpoint/format/crc.h"
#include "core/error.h"
#include "core/polynomial.h"
#include "reshard/bit_difference.h"
#include "reshard/parallel.h"
#include "reshard/rank_place.h"
#include "reshard/tensor_values.h"

namespace isoshard::reshard {
namespace {

using checkpoint::FileFragment;
using checkpoint::Leaf;
using checkpoint::ShardedState;

constexpr int64_t kStepBytes = 1 << 20;

// Where a leaf lies, as text: two leaves of the same bytes have the same.
std::string lying(const Leaf& leaf) {
  std::string text = leaf.name;
  for (const FileFragment& f : leaf.fragments) {
    for (const int64_t number : {f.begin, f.count, int64_t{f.file}, f.offset_bytes})
      text += ":" + std::to_string(number);
  }
  return text;
}

const FileFragment* fragment_of(const Leaf& leaf, int64_t element) {
  for (const FileFragment& f : leaf.fragments) {
    if (element >= f.begin && element < f.begin + f.count) return &f;
  }
  return nullptr;
}

// The record that holds a byte of a torch file; nullptr in other files.
const checkpoint::ZipRecord* record_at(const checkpoint::SourceFile& file, int64_t offset) {
  if (!file.torch) return nullptr;
  for (const checkpoint::ZipRecord& record : file.torch->zip().records) {
    if (offset >= record.data_offset && offset < record.data_offset + record.size_bytes)
      return &record;
  }
  return nullptr;
}

bool crc_holds(const checkpoint::SourceFile& file, const checkpoint::ZipRecord& record) {
  checkpoint::RawCrcs crcs;
  std::vector<std::byte> step;
  for (int64_t at = 0; at < record.size_bytes; at += kStepBytes) {
    checkpoint::throw_if_cancelled();
    step.resize(static_cast<size_t>(std::min(kStepBytes, record.size_bytes - at)));
    file.bytes().read_at(record.data_offset + at, step);
    crcs.update(step);
  }
  return crc32_polynomial().finish(crcs.crc32, record.size_bytes) == record.crc32;
}

// The name of a state, which a file has given, as it can be printed.
std::string printable(const std::string& state) {
  const std::string quoted = quote(state);
  return quoted == '"' + state + '"' ? state : quoted;
}

ReplicaCopy copy_of(const ShardedState& state, const Leaf& leaf, const std::string& stated) {
  ReplicaCopy copy;
  if (!leaf.fragments.empty())
    copy.file = state.files[static_cast<size_t>(leaf.fragments.front().file)].relative;
  copy.place = place_of_file(copy.file);
  for (const FileFragment& f : leaf.fragments) {
    if (f.file == leaf.fragments.front().file) continue;
    copy.place = "mp rank " +
                 std::to_string(checkpoint::parse_file_name(checkpoint::base_name(copy.file)).mp) +
                 ", several files";
    break;
  }
  if (leaf.state != stated && leaf.state.find("rank") != std::string::npos)
    copy.place += (copy.place.empty() ? "" : ", ") + printable(leaf.state);
  else if (leaf.state != stated)
    copy.place += (copy.place.empty() ? "" : "; ") + printable(leaf.state);
  return copy;
}

// The two leaves, element by element.
CopyContrast contrast_of(const ShardedState& state, const Leaf& one, const Leaf& other,
                         BitDifference* bits) {
  CopyContrast result;
  result.total = one.size_elements();
  const auto item = static_cast<size_t>(item_size_bytes(one.dtype));
  const int64_t step = kStepBytes / static_cast<int64_t>(item);
  std::vector<std::byte> expected, found;
  for (int64_t begin = 0; begin < result.total; begin += step) {
    checkpoint::throw_if_cancelled();
    const int64_t count = std::min(step, result.total - begin);
    expected.resize(static_cast<size_t>(count) * item);
    found.resize(expected.size());
    read_elements(state, one, begin, expected);
    read_elements(state, other, begin, found);
    if (expected == found) continue;
    for (int64_t i = 0; i < count; ++i) {
      const auto was = std::span(expected).subspan(static_cast<size_t>(i) * item, item);
      const auto is = std::span(found).subspan(static_cast<size_t>(i) * item, item);
      if (std::ranges::equal(was, is)) continue;
      bits->add(was, is);
      if (bits->count() > 1) continue;
      result.element = begin + i;
      result.index = to_string(index_of(begin + i, other.shape));
      result.expected = element_bits(was) + " (" + element_text(one.dtype, was) + ")";
      result.found = element_bits(is) + " (" + element_text(one.dtype, is) + ")";
      const FileFragment* place = fragment_of(other, begin + i);
      if (place == nullptr) continue;
      const checkpoint::SourceFile& file = state.files[static_cast<size_t>(place->file)];
      result.file = file.relative;
      result.offset_bytes =
          place->offset_bytes + (begin + i - place->begin) * static_cast<int64_t>(item);
      const checkpoint::ZipRecord* record = record_at(file, result.offset_bytes);
      if (record != nullptr) result.entry = record->name;
    }
  }
  result.differing = bits->count();
  result.how = bits->text();
  return result;
}

class SetComparison {
 public:
  SetComparison(const ShardedState& state, const TensorSet& set, const std::vector<LeafCrc>& known)
      : state_(state), set_(set), known_(known) {}

  std::optional<ReplicaDifference> run() {
    std::vector<std::string> contents;
    for (const int number : set_.leaves) contents.push_back(content_of(number));
    ReplicaDifference result{.kind = set_.kind};
    vote(contents, &result);
    if (result.groups.size() < 2) return std::nullopt;
    const Leaf& first = leaf(0);
    result.name = first.name;
    if (first.state.find("rank") == std::string::npos) result.state = first.state;
    for (size_t i = 0; i < set_.leaves.size(); ++i)
      result.copies.push_back(copy_of(state_, leaf(i), result.state));
    bool damage = false;
    for (size_t g = 1; g < result.groups.size(); ++g) {
      const auto against = static_cast<size_t>(result.groups[0][0]);
      const auto copy = static_cast<size_t>(result.groups[g][0]);
      BitDifference bits(first.dtype);
      CopyContrast contrast = contrast_of(state_, leaf(against), leaf(copy), &bits);
      contrast.copy = static_cast<int>(copy);
      contrast.against = static_cast<int>(against);
      damage = damage || bits.looks_like_damage();
      result.contrasts.push_back(std::move(contrast));
    }
    const bool all_apart = result.groups.size() == result.copies.size();
    result.judged = set_.kind != ReplicaKind::kBuffer || !all_apart || damage;
    result.evidence = evidence(result);
    return result;
  }

 private:
  const Leaf& leaf(size_t copy) const { return state_.leaf(set_.leaves[copy]); }

  std::string content_of(int number) const {
    const auto at = static_cast<size_t>(number);
    const LeafCrc crc = at < known_.size() && known_[at].known
                            ? known_[at]
                            : crc_of_leaf(state_, state_.leaf(number));
    return checkpoint::hex16(crc.ecma) + checkpoint::hex16(crc.jones);
  }

  std::string evidence(const ReplicaDifference& difference) const {
    std::string text;
    const auto add = [&](const std::string& more) { text += (text.empty() ? "" : "; ") + more; };
    for (const CopyContrast& contrast : difference.contrasts) {
      for (const int copy : {contrast.copy, contrast.against}) {
        const std::string broken = broken_record(copy, contrast.element);
        if (!broken.empty() && text.find(broken) == std::string::npos) add(broken);
      }
    }
    const std::string cast = by_the_other_dtype(difference);
    if (!cast.empty()) add(cast);
    return text;
  }

  // Whether the record that holds an element of a copy does not fit its CRC.
  std::string broken_record(int copy, int64_t element) const {
    const FileFragment* place = fragment_of(leaf(static_cast<size_t>(copy)), element);
    if (place == nullptr) return "";
    const checkpoint::SourceFile& file = state_.files[static_cast<size_t>(place->file)];
    const checkpoint::ZipRecord* record = record_at(file, place->offset_bytes);
    if (record == nullptr || crc_holds(file, *record)) return "";
    return quote(file.relative) + " " + plain_name(record->name) +
           " does not fit its CRC: it is damaged";
  }

  // Masters speak for copies in the model's dtype, and these for masters.
  std::string by_the_other_dtype(const ReplicaDifference& difference) const {
    const int first = set_.leaves[0];
    const checkpoint::ParameterState* parameter = state_.find_parameter(leaf(0).name);
    if (parameter == nullptr || parameter->model_copy < 0) return "";
    const bool masters = first == parameter->weight;
    if (!masters && first != parameter->model_copy) return "";
    std::string fits, fails;
    for (const std::vector<int>& group : difference.groups) {
      const auto number = static_cast<size_t>(group[0]);
      const int own = set_.leaves[number];
      const CopyPair pair{CopyPair::Kind::kMaster, leaf(0).name, masters ? own : parameter->weight,
                          masters ? parameter->model_copy : own};
      const CopyReport report = compare_copies(state_, {pair}, 1);
      if (!report.uncompared.empty()) return "";
      std::string& list = report.differences.empty() ? fits : fails;
      list += (list.empty() ? "" : ", ") + difference.copies[number].place;
    }
    const std::string other = masters ? "the model's copy" : "the fp32 master, rounded,";
    if (fits.empty()) return other + " agrees with none of them";
    if (fails.empty()) return other + " agrees with all of them: the difference is below its bits";
    return other + " agrees with " + fits + ", not with " + fails;
  }

  const ShardedState& state_;
  const TensorSet& set_;
  const std::vector<LeafCrc>& known_;
};

}  // namespace

LeafCrc crc_of_leaf(const ShardedState& state, const Leaf& leaf) {
  checkpoint::RawCrcs crcs;
  const int64_t item = item_size_bytes(leaf.dtype);
  const int64_t step = kStepBytes / item;
  std::vector<std::byte> bytes;
  for (int64_t begin = 0; begin < leaf.size_elements(); begin += step) {
    checkpoint::throw_if_cancelled();
    bytes.resize(static_cast<size_t>(std::min(step, leaf.size_elements() - begin) * item));
    read_elements(state, leaf, begin, bytes);
    crcs.update(bytes);
  }
  return {true, crc64_ecma_polynomial().finish(crcs.ecma, leaf.size_bytes()),
          crc64_jones_polynomial().finish(crcs.jones, leaf.size_bytes())};
}

void vote(const std::vector<std::string>& contents, ReplicaDifference* difference) {
  std::map<std::string, size_t> numbers;
  for (size_t i = 0; i < contents.size(); ++i) {
    const auto [known, fresh] = numbers.emplace(contents[i], difference->groups.size());
    if (fresh) difference->groups.emplace_back();
    difference->groups[known->second].push_back(static_cast<int>(i));
  }
  std::ranges::stable_sort(difference->groups, std::greater<>(),
                           [](const std::vector<int>& group) { return group.size(); });
  difference->majority =
      difference->groups.size() > 1 && difference->groups[0].size() > difference->groups[1].size();
}

namespace {

bool same_size(const ShardedState& state, const CopyPair& pair) {
  return state.leaf(pair.original).size_elements() == state.leaf(pair.copy).size_elements();
}

// The leaves of each tensor that is stored more than once, whatever their dtypes; the original,
// whose size all of them have, first.
std::vector<std::vector<int>> stored_again(const ShardedState& state) {
  std::vector<std::string> orphans;
  std::vector<std::vector<int>> result;
  std::map<std::string, size_t> by_place;  // of the original
  for (const CopyPair& pair : copy_pairs(state, &orphans)) {
    if (pair.kind != CopyPair::Kind::kReplica || !same_size(state, pair)) continue;
    const auto [known, fresh] = by_place.emplace(lying(state.leaf(pair.original)), result.size());
    if (fresh) result.push_back({pair.original});
    result[known->second].push_back(pair.copy);
  }
  return result;
}

}  // namespace

std::vector<TensorSet> replica_sets(const ShardedState& state) {
  std::vector<TensorSet> sets;
  for (const std::vector<int>& leaves : stored_again(state)) {
    std::map<DType, std::vector<int>> by_dtype;
    for (const int leaf : leaves) by_dtype[state.leaf(leaf).dtype].push_back(leaf);
    for (const auto& [dtype, alike] : by_dtype) {
      if (alike.size() > 1) sets.push_back({ReplicaKind::kTensor, alike});
    }
  }
  return sets;
}

bool in_a_set(const ShardedState& state, const CopyPair& pair) {
  return pair.kind == CopyPair::Kind::kReplica && same_size(state, pair) &&
         state.leaf(pair.original).dtype == state.leaf(pair.copy).dtype;
}

void compare_dtypes(const ShardedState& state, ReplicaReport* report) {
  for (const std::vector<int>& leaves : stored_again(state)) {
    std::vector<std::string> dtypes;
    for (const int leaf : leaves) dtypes.push_back(name(state.leaf(leaf).dtype));
    const Leaf& first = state.leaf(leaves[0]);
    ReplicaDifference result{.kind = ReplicaKind::kTensor, .name = first.name};
    vote(dtypes, &result);
    if (result.groups.size() < 2) continue;
    if (first.state.find("rank") == std::string::npos) result.state = first.state;
    for (const int leaf : leaves)
      result.copies.push_back(copy_of(state, state.leaf(leaf), result.state));
    for (size_t g = 1; g < result.groups.size(); ++g) {
      const int copy = result.groups[g][0], against = result.groups[0][0];
      result.contrasts.push_back({.copy = copy,
                                  .against = against,
                                  .file = result.copies[static_cast<size_t>(copy)].file,
                                  .entry = first.name,
                                  .found = dtypes[static_cast<size_t>(copy)],
                                  .expected = dtypes[static_cast<size_t>(against)],
                                  .how = "the dtypes differ"});
    }
    ReplicaCount& count = report->of(ReplicaKind::kTensor);
    ++count.sets;
    ++count.differing;
    count.copies += static_cast<int64_t>(leaves.size());
    report->differences.push_back(std::move(result));
  }
}

void compare_sets(const ShardedState& state, const std::vector<TensorSet>& sets,
                  const std::vector<LeafCrc>& known, int workers, ReplicaReport* report) {
  std::vector<std::optional<ReplicaDifference>> differences(sets.size());
  parallel_for(sets.size(), workers,
               [&](size_t i) { differences[i] = SetComparison(state, sets[i], known).run(); });
  for (size_t i = 0; i < sets.size(); ++i) {
    ReplicaCount& count = report->of(sets[i].kind);
    ++count.sets;
    count.copies += static_cast<int64_t>(sets[i].leaves.size());
    count.elements +=
        state.leaf(sets[i].leaves[0]).size_elements() * static_cast<int64_t>(sets[i].leaves.size());
    if (!differences[i]) continue;
    ++count.differing;
    report->differences.push_back(std::move(*differences[i]));
  }
}

namespace {

// Which other ranks' copies of the same the master agrees with.
std::string other_ranks(const ShardedState& state, const CopyPair& pair, int workers) {
  std::vector<CopyPair> others;
  for (const auto& [original, copy] : state.replicas) {
    if (original == pair.copy) others.push_back({pair.kind, pair.name, pair.original, copy});
  }
  if (others.empty()) return "";
  const CopyReport report = compare_copies(state, others, workers);
  const size_t differing = report.differences.size();
  const size_t fitting = others.size() - differing - report.uncompared.size();
  if (fitting > 0 && differing == 0)
    return "the same copy of " + std::to_string(fitting) +
           (fitting == 1 ? " other rank" : " other ranks") +
           " agrees with the master: this copy is suspicious";
  if (fitting == 0) return "nor do the copies of other ranks: the master is suspicious";
  return "of the copies of other ranks " + std::to_string(fitting) + " agree with the master";
}

}  // namespace

void add_pairs(const ShardedState& state, const CopyReport& pairs, int workers,
               ReplicaReport* report) {
  constexpr ReplicaKind kKinds[] = {ReplicaKind::kMaster, ReplicaKind::kRestated,
                                    ReplicaKind::kTied};
  for (size_t kind = 0; kind < 3; ++kind) {
    report->of(kKinds[kind]).sets += pairs.pairs[kind];
    report->of(kKinds[kind]).copies += 2 * pairs.pairs[kind];
  }
  for (const CopyDifference& d : pairs.differences) {
    if (d.pair.kind == CopyPair::Kind::kReplica) continue;
    ReplicaDifference difference{.kind = kKinds[static_cast<size_t>(d.pair.kind)],
                                 .name = d.pair.name};
    const Leaf &original = state.leaf(d.pair.original), &copy = state.leaf(d.pair.copy);
    difference.copies = {copy_of(state, original, ""), copy_of(state, copy, "")};
    difference.groups = {{0}, {1}};
    difference.contrasts = {{.copy = 1,
                             .against = 0,
                             .file = difference.copies[1].file,
                             .index = d.index,
                             .found = d.found,
                             .expected = d.expected,
                             .differing = d.differing,
                             .total = d.total,
                             .how = ""}};
    if (d.pair.kind == CopyPair::Kind::kMaster)
      difference.evidence = other_ranks(state, d.pair, workers);
    ++report->of(difference.kind).differing;
    report->differences.push_back(std::move(difference));
  }
  for (const std::string& reason : pairs.uncompared) report->uncompared.push_back(reason);
}

}  // namespace isoshard::reshard
