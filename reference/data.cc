// See data.h.
#include "reference/data.h"

#include "core/mutant.h"
#include "core/numbers.h"
#include "core/random.h"

namespace isoshard::reference {
namespace {

enum Stream : uint64_t { kTokens = 1, kMask = 2, kMaskSample = 3, kCuts = 4 };

// A document begins here.
bool begins_document(const DataConfig& data, int64_t sample, int64_t position) {
  if (position == 0) return true;
  return data.packed && keyed_random(data.seed, {kCuts, static_cast<uint64_t>(sample),
                                                 static_cast<uint64_t>(position)}) %
                                4 ==
                            0;
}

}  // namespace

int64_t token_of(const DataConfig& data, int64_t vocabulary, int64_t sample, int64_t position) {
  const uint64_t word = keyed_random(
      data.seed, {kTokens, static_cast<uint64_t>(sample), static_cast<uint64_t>(position)});
  return static_cast<int64_t>(word % static_cast<uint64_t>(vocabulary));
}

int64_t label_of(const DataConfig& data, int64_t vocabulary, int64_t sample, int64_t position) {
  if (position + 1 >= data.sequence_length) return kIgnored;
  if (begins_document(data, sample, position + 1) && !mutant("labels_across_documents"))
    return kIgnored;
  if (data.masked > 0) {
    const uint64_t share = static_cast<uint64_t>(data.masked), s = static_cast<uint64_t>(sample);
    if (keyed_random(data.seed, {kMaskSample, s}) % share == 0) return kIgnored;
    if (keyed_random(data.seed, {kMask, s, static_cast<uint64_t>(position)}) % share == 0) {
      return kIgnored;
    }
  }
  return token_of(data, vocabulary, sample, position + 1);
}

int64_t position_of(const DataConfig& data, int64_t sample, int64_t position) {
  int64_t begin = position;
  while (!begins_document(data, sample, begin)) --begin;
  return position - begin;
}

BatchPlan plan_batch(const DataConfig& data, int data_ranks) {
  BatchPlan plan(static_cast<size_t>(data_ranks));
  const int64_t steps = div_ceil(div_ceil(data.batch, data_ranks), data.micro_batch);
  for (int rank = 0; rank < data_ranks; ++rank) {
    const Span run = even_share(data.batch, data_ranks, rank);
    std::vector<std::vector<int64_t>>& own = plan[static_cast<size_t>(rank)];
    own.resize(static_cast<size_t>(steps));
    for (int64_t k = 0; k < run.size(); ++k) {
      own[static_cast<size_t>(k / data.micro_batch)].push_back(
          data.strided ? rank + k * data_ranks
                       : (mutant("every_rank_the_same_samples") ? 0 : run.begin) + k);
    }
  }
  return plan;
}

Span positions_of(const DataConfig& data, int sequence_ranks, int rank) {
  return even_share(data.sequence_length, sequence_ranks, rank);
}

std::vector<LeafRange> token_leaves(const DataConfig& data, const std::vector<int64_t>& samples,
                                    Span positions) {
  std::vector<LeafRange> ranges;
  if (positions.size() == 0) return ranges;
  for (const int64_t sample : samples) {
    const LeafIndex end = positions.end == data.sequence_length ? token_leaf(sample + 1, 0)
                                                                : token_leaf(sample, positions.end);
    ranges.push_back({token_leaf(sample, positions.begin), end});
  }
  return ranges;
}

}  // namespace isoshard::reference
