// Rules for a state that the reader takes: what its CRCs, and on demand its payloads, prove.
#include <algorithm>
#include <map>
#include <set>

#include "core/error.h"
#include "core/layout.h"
#include "core/polynomial.h"
#include "core/zero_rules.h"
#include "reshard/copies.h"
#include "reshard/doctor_rules.h"
#include "reshard/report_text.h"
#include "reshard/weights_inventory.h"

namespace isoshard::reshard {
namespace {

using checkpoint::Flavour;
using checkpoint::GroupState;
using checkpoint::Leaf;
using checkpoint::ParameterState;
using checkpoint::ShardedState;
using checkpoint::ZipRecord;

// Whether records hold nothing but zeros, by their CRCs alone.
class ZeroRecords {
 public:
  explicit ZeroRecords(const ShardedState& state) : state_(state) {}

  // Every record that the leaf touches, whole; an empty leaf is zero.
  bool hold(const Leaf& leaf) {
    return std::ranges::all_of(leaf.fragments, [&](const checkpoint::FileFragment& fragment) {
      const checkpoint::SourceFile& file = state_.files[static_cast<size_t>(fragment.file)];
      if (!file.torch) return false;  // computed from several files
      const std::vector<ZipRecord>& records = file.torch->zip().records;
      const auto behind =
          std::ranges::upper_bound(records, fragment.offset_bytes, {}, &ZipRecord::data_offset);
      if (behind == records.begin()) return false;
      const ZipRecord& record = *std::prev(behind);
      if (fragment.offset_bytes >= record.data_offset + record.size_bytes) return false;
      return record.crc32 == crc_of_zeros(record.size_bytes);
    });
  }

 private:
  uint32_t crc_of_zeros(int64_t size_bytes) {
    const auto [known, fresh] = crcs_.emplace(size_bytes, 0);
    if (fresh) known->second = static_cast<uint32_t>(crc32_polynomial().finish(0, size_bytes));
    return known->second;
  }

  const ShardedState& state_;
  std::map<int64_t, uint32_t> crcs_;
};

std::string step_of(const ShardedState& state, const ParameterState& parameter) {
  for (const checkpoint::Scalar& scalar : parameter.scalars) {
    if (scalar.name == "step") return checkpoint::scalar_text(state, scalar.value);
  }
  return "";
}

// kSilent: nothing but zeros, or no elements, which an honest run may leave in this group.
enum class Moments { kSilent, kUnknown, kZero, kLive };

// Of a group of Adam's after its first step. Experts are routed to or not: a group of them alone
// says nothing.
Moments moments_of(const ShardedState& state, const GroupState& group, ZeroRecords* zeros,
                   std::string* step) {
  bool experts = true, elements = false;
  for (int number : group.parameters) {
    const ParameterState& parameter = state.parameters[static_cast<size_t>(number)];
    experts = experts && parameter.name.find("expert") != std::string::npos;
    const int first = state.state_leaf(parameter, "exp_avg");
    const int second = state.state_leaf(parameter, "exp_avg_sq");
    if (first < 0 || second < 0) return Moments::kUnknown;
    elements = elements || numel(parameter.shape) > 0;
    if (!zeros->hold(state.leaf(first)) || !zeros->hold(state.leaf(second))) return Moments::kLive;
    if (step->empty()) *step = step_of(state, parameter);
  }
  if (experts || !elements) return Moments::kSilent;
  if (step->empty() || *step == "0" || *step == "None" || step->front() == '-')
    return Moments::kUnknown;
  return Moments::kZero;
}

void tell_moments(Patient* patient, const std::vector<std::string>& dead, bool all) {
  patient->result.symptoms.push_back(
      {.rule = "zero-moments",
       .grade = all ? Grade::kProven : Grade::kSuspect,
       .verdict = Verdict::kSuspect,
       .file = patient->state->folder,
       .entry = "exp_avg, exp_avg_sq",
       .found = with_details(std::string(all ? "all moments" : "all moments of a group") +
                                 " are zero: every record's CRC is that of zeros",
                             dead),
       .proof =
           all ? "a step with any gradient but zero leaves a moment that is not"
               : "a step with any gradient but zero leaves a moment that is not; a group whose "
                 "parameters were never used would look so too, and the other groups' moments are "
                 "not zero or not known",
       .fault = "an optimizer was made anew under an old step (DeepSpeed issues 6691, 8147)",
       .safe = "weights and masters; training goes on from them as after a cold start",
       .next = "reshard or convert from the checkpoint this one was made of, or train on knowing "
               "that the moments are lost"});
}

// The leaf of a weight whose elements stand elsewhere.
int add_moved(ShardedState* state, const Leaf& like,
              std::vector<checkpoint::FileFragment> fragments) {
  Leaf leaf = like;
  leaf.fragments = std::move(fragments);
  return state->add_leaf(std::move(leaf));
}

std::map<int, int> weights_before_round_robin(ShardedState* state) {
  std::map<int, int> moved;  // leaf → leaf
  for (const GroupState& group : state->groups) {
    std::map<int64_t, int> believed;  // end in the flat buffer → leaf that was cut from there
    int64_t end = 0;
    for (int number : group.parameters) {
      const int leaf = state->parameters[static_cast<size_t>(number)].weight;
      end += state->leaf(leaf).size_elements();
      believed[end] = leaf;
    }
    int64_t at = 0;
    for (int number : group.flat_order) {
      const Leaf own = state->leaf(state->parameters[static_cast<size_t>(number)].weight);
      std::vector<checkpoint::FileFragment> fragments;
      for (int64_t done = 0; done < own.size_elements();) {
        const auto piece = believed.upper_bound(at + done);
        const Leaf& from = state->leaf(piece->second);
        const int64_t begin = from.size_elements() - (piece->first - at - done);
        const int64_t count = std::min(piece->first - at, own.size_elements()) - done;
        checkpoint::append_fragments(from, begin, count, done, &fragments);
        done += count;
      }
      at += own.size_elements();
      moved[state->parameters[static_cast<size_t>(number)].weight] =
          add_moved(state, own, std::move(fragments));
    }
  }
  return moved;
}

// What was joined in the order of rank names, put into the order of ranks.
std::map<int, int> weights_by_rank(ShardedState* state, int digits) {
  std::map<int, int> moved;
  const int dp = state->topology.zero_ranks();
  const std::vector<int> order = alphabetical_ranks(dp, digits);
  for (const GroupState& group : state->groups) {
    int64_t total = 0;
    for (int number : group.flat_order)
      total += numel(state->parameters[static_cast<size_t>(number)].shape);
    const int64_t partition = std::max<int64_t>(flat_sizes(total, dp).partition, 1);
    int64_t offset = 0;
    for (int number : group.flat_order) {
      const int weight = state->parameters[static_cast<size_t>(number)].weight;
      const Leaf own = state->leaf(weight);
      const TensorLayout layout{
          .numel = own.size_elements(),
          .ranks = dp,
          .placement = FlatShard{.group_offset = offset, .partition = partition}};
      offset += own.size_elements();
      std::map<int64_t, std::pair<int64_t, int64_t>> stored;  // begin → where it stands, count
      int64_t at = 0;
      for (int rank : order) {
        const RankFragment fragment = fragment_on(layout, rank);
        if (fragment.count > 0) stored[fragment.begin] = {at, fragment.count};
        at += fragment.count;
      }
      std::vector<checkpoint::FileFragment> fragments;
      for (const auto& [begin, place] : stored)
        checkpoint::append_fragments(own, place.first, place.second, begin, &fragments);
      moved[weight] = add_moved(state, own, std::move(fragments));
    }
  }
  return moved;
}

// Masters of trained parameters that have a copy in the model's dtype.
std::vector<CopyPair> master_pairs(const ShardedState& state) {
  std::vector<std::string> orphans;
  std::vector<CopyPair> pairs = copy_pairs(state, &orphans);
  std::erase_if(pairs, [&](const CopyPair& pair) {
    return pair.kind != CopyPair::Kind::kMaster || state.leaf(pair.original).size_elements() == 0;
  });
  return pairs;
}

template <typename Move>
bool explains(const Patient& patient, std::vector<CopyPair> pairs, const Move& move) {
  ShardedState state = *patient.state;
  const std::map<int, int> moved = move(&state);
  for (CopyPair& pair : pairs) {
    const auto found = moved.find(pair.original);
    if (found != moved.end()) pair.original = found->second;
  }
  const CopyReport report = compare_copies(state, pairs, patient.options.read.workers);
  return report.differences.empty() && report.uncompared.empty();
}

void tell_swapped(Patient* patient, const std::string& rule, const CopyReport& report,
                  const std::string& how, const std::string& fault) {
  std::vector<std::string> details;
  for (const CopyDifference& difference : report.differences) {
    details.push_back(quote(difference.pair.name) + ": " + std::to_string(difference.differing) +
                      " of " + std::to_string(difference.total) + " elements");
  }
  const auto pairs = static_cast<size_t>(report.pairs[0]);
  patient->result.symptoms.push_back(
      {.rule = rule,
       .verdict = Verdict::kSuspect,
       .file = patient->state->folder,
       .entry = "zero/*/fp32.pt, and the moments beside",
       .found = with_details(count_of(details.size(), "master") + " of " + std::to_string(pairs) +
                                 " do not round to the model's own copies",
                             details),
       .proof = "put back " + how + ", all " + count_of(pairs, "master") +
                " round to the model's copies, bit for bit",
       .fault = fault,
       .safe = "the model's own copies (mp_rank_00_model_states.pt), and the source checkpoint",
       .next = "convert the source checkpoint again with isoshard"});
}

}  // namespace

void look_for_missing_model_files(Patient* patient) {
  const ShardedState& state = *patient->state;
  const size_t there = state.model_files.size(), ranks = state.optim_files.size();
  if (state.flavour != Flavour::kZero3 || there >= ranks) return;
  patient->result.symptoms.push_back(
      {.rule = "missing-shards",
       .verdict = Verdict::kIncomplete,
       .file = state.folder,
       .entry = "model files",
       .found = std::to_string(there) + " of " + count_of(ranks, "file"),
       .proof = "each of the " + count_of(ranks, "optimizer file") + " has one beside it",
       .fault = "files of some nodes were not copied; DeepSpeed cannot resume without them",
       .safe = "weights and moments: convert --to fp32 and reshard do without",
       .next = "bring the missing files, or isoshard reshard"});
}

void look_for_missing_weights(Patient* patient) {
  const ShardedState& state = *patient->state;
  if (state.flavour != Flavour::kWeights || !patient->place.folder_named) return;
  const WeightsInventory inventory = take_weights_inventory(patient->storage, state);
  if (inventory.missing.empty()) return;
  patient->result.symptoms.push_back(
      {.rule = "missing-shards",
       .verdict = Verdict::kIncomplete,
       .file = state.folder,
       .found = with_details("parts of the weights are missing", inventory.missing),
       .proof = "the index, or the names of the others, count them",
       .fault = "a copy of the folder, or the tool that wrote it, did not come to its end",
       .safe = "the parts that are there",
       .next = "bring the missing files, or make the folder again from its checkpoint"});
}

void look_for_zero_moments(Patient* patient) {
  const ShardedState& state = *patient->state;
  if (state.flavour == Flavour::kWeights || !state.stepped) return;
  ZeroRecords zeros(state);
  std::vector<std::string> dead;
  bool all = true;
  for (size_t number = 0; number < state.groups.size(); ++number) {
    const GroupState& group = state.groups[number];
    std::string step;
    const Moments moments = moments_of(state, group, &zeros, &step);
    all = all && (moments == Moments::kZero || moments == Moments::kSilent);
    if (moments != Moments::kZero) continue;
    dead.push_back("group " + std::to_string(number) + ", " +
                   count_of(group.parameters.size(), "parameter") + ", step " + step);
  }
  if (!dead.empty()) tell_moments(patient, dead, all);
}

void look_for_swapped_values(Patient* patient) {
  const ShardedState& state = *patient->state;
  std::vector<std::string>* not_looked = &patient->result.not_looked;
  if (state.flavour != Flavour::kUniversal12) {
    if (state.flavour == Flavour::kUniversal3)
      not_looked->push_back("rank-order: at stage 3 weights have no second copy");
    return;
  }
  if (state.topology.tensor * state.topology.pipeline > 1 ||
      state.expert_layout != checkpoint::ExpertLayout::kNone) {
    return not_looked->push_back(
        "round-robin, rank-order: where pieces of several mp ranks or experts were joined, the "
        "places of ranks are not recorded");
  }
  const std::vector<CopyPair> pairs = master_pairs(state);
  if (pairs.empty()) return not_looked->push_back("round-robin, rank-order: no copies to hold to");
  const CopyReport report = compare_copies(state, pairs, patient->options.read.workers);
  if (report.differences.empty()) return;
  if (state.round_robin && explains(*patient, pairs, weights_before_round_robin)) {
    return tell_swapped(patient, "round-robin", report, "through the map of round robin",
                        "ds_to_universal cuts a permuted buffer by the unpermuted map (errata 1)");
  }
  for (int digits : {1, 2}) {
    const int first = digits == 1 ? 11 : 101;
    if (state.topology.zero_ranks() < first) continue;
    const auto move = [&](ShardedState* moved) { return weights_by_rank(moved, digits); };
    if (!explains(*patient, pairs, move)) continue;
    return tell_swapped(
        patient, "rank-order", report, "into the order of rank numbers",
        "ds_to_universal joins fragments sorted as text: 10, 11, 9 (DeepSpeed issue "
        "5342)");
  }
  patient->result.notices.push_back(
      count_of(report.differences.size(), "master") +
      " do not round to the model's own copies, in no way that a rule explains; see isoshard "
      "verify");
}

}  // namespace isoshard::reshard
