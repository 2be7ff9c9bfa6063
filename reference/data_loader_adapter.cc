// See data_loader_adapter.h.
#include "reference/data_loader_adapter.h"

#include <algorithm>

#include "core/error.h"
#include "core/mutant.h"
#include "reference/data.h"

namespace isoshard::reference {
namespace {

[[noreturn]] void refuse(const std::string& what, const std::string& entry,
                         const std::string& expected, const std::string& found) {
  throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                        .what = what,
                        .entry = entry,
                        .expected = expected,
                        .found = found,
                        .next = "correct what the loader or its collator returns"});
}

const BatchColumn& column(const LoadedBatch& batch, const std::string& key,
                          const std::string& error) {
  for (const BatchColumn& one : batch) {
    if (one.key == key) return one;
  }
  refuse("A batch lacks what sequence parallelism needs (DeepSpeed: " + error + ").", key,
         "a column " + key, "none");
}

// shift_labels of whole samples: the label behind each position.
BatchColumn shifted(const BatchColumn& labels) {
  BatchColumn result = labels;
  result.key = "shift_labels";
  if (labels.length == 0) return result;
  for (int64_t row = 0; row < labels.rows; ++row) {
    const auto first = result.values.begin() + row * labels.length;
    if (!mutant("labels_not_shifted")) std::rotate(first, first + 1, first + labels.length);
    first[labels.length - 1] = kIgnored;
  }
  return result;
}

BatchColumn slice(const BatchColumn& whole, int ranks, int rank) {
  const int64_t length = whole.length / ranks;
  BatchColumn part{.key = whole.key, .rows = whole.rows, .length = length, .values = {}};
  for (int64_t row = 0; row < whole.rows; ++row) {
    const auto first = whole.values.begin() + row * whole.length +
                       (mutant("slice_of_first_rank") ? 0 : rank) * length;
    part.values.insert(part.values.end(), first, first + length);
  }
  return part;
}

}  // namespace

std::optional<LoadedBatch> DataLoaderAdapter::next() {
  if (ready_.empty()) {
    if (number_ == loader_.size) {
      number_ = 0;
      return std::nullopt;
    }
    refill();
  }
  LoadedBatch batch = std::move(ready_.front());
  ready_.pop_front();
  return batch;
}

void DataLoaderAdapter::refill() {
  const LoadedBatch own = loader_.batch(number_++);
  column(own, "position_ids", "ValueError");
  const int64_t length = column(own, "input_ids", "KeyError").length;
  const size_t ranks = static_cast<size_t>(group_.size());
  std::vector<int64_t> lengths(ranks);
  std::vector<Buffer> targets;
  for (int64_t& one : lengths) targets.push_back(buffer(std::span(&one, 1)));
  group_.all_gather(const_buffer(std::span(&length, 1)), targets);
  std::vector<LoadedBatch> batches(ranks);
  for (const BatchColumn& mine : own) {
    if (mine.length != length) {
      refuse("The columns of a batch have several lengths (DeepSpeed: ValueError).", mine.key,
             std::to_string(length) + ", as input_ids", std::to_string(mine.length));
    }
    targets.clear();
    for (size_t i = 0; i < ranks; ++i) {
      batches[i].push_back({mine.key, mine.rows, lengths[i], {}});
      std::vector<int64_t>& values = batches[i].back().values;
      values.resize(static_cast<size_t>(mine.rows * lengths[i]));
      targets.push_back(buffer(std::span(values)));
    }
    group_.all_gather(const_buffer(std::span<const int64_t>(mine.values)), targets);
  }
  for (size_t i = 0; i < ranks; ++i) {
    if (lengths[i] % group_.size() != 0 && !mutant("uneven_sample_cut")) {
      refuse("A sample cannot be cut for the sequence-parallel ranks (DeepSpeed: ValueError).",
             "the sample of rank " + std::to_string(i),
             "a length that " + std::to_string(group_.size()) + " divides",
             std::to_string(lengths[i]) + " mod " + std::to_string(group_.size()) + " is " +
                 std::to_string(lengths[i] % group_.size()));
    }
    const BatchColumn labels = column(batches[i], "labels", "KeyError");
    std::erase_if(batches[i], [](const BatchColumn& one) { return one.key == "labels"; });
    batches[i].push_back(shifted(labels));
    for (BatchColumn& one : batches[i]) one = slice(one, group_.size(), group_.rank());
    ready_.push_back(std::move(batches[i]));
  }
}

}  // namespace isoshard::reference
