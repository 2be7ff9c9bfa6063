// UlyssesSPDataLoaderAdapter (deepspeed/runtime/sequence_parallel/ulysses_sp.py): makes of the P
// loaders of a sequence-parallel group, each of which has samples of its own, one stream in which
// every rank has its slice of every sample.
//
//   call i of P  →  the sample of rank i's loader; this rank has positions [c·r, c·(r+1)), c = S/P
//
// In place of `labels` comes `shift_labels`, shifted over the whole sample before it is cut: the
// next token, and −100 at the end. (What this repository trains on is reference/data.h, of which
// the adapter is one order.)
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "core/communicator.h"

namespace isoshard::reference {

// A tensor of a batch: `rows` of `length` integers.
struct BatchColumn {
  std::string key;
  int64_t rows = 0;
  int64_t length = 0;
  std::vector<int64_t> values;
  bool operator==(const BatchColumn&) const = default;
};
using LoadedBatch = std::vector<BatchColumn>;

struct BatchLoader {
  std::function<LoadedBatch(int64_t number)> batch;
  int64_t size = 0;  // batches an epoch
};

class DataLoaderAdapter {
 public:
  // `group`: the sequence-parallel one; it outlives the object.
  DataLoaderAdapter(BatchLoader loader, Communicator* group)
      : loader_(std::move(loader)), group_(*group) {}

  // Nothing at the end of an epoch; the call after it begins the next one. Every P-th call is
  // collective. Throws Error(kUsage) with what DeepSpeed raises: no position_ids (ValueError), no
  // input_ids (KeyError), columns of another length than input_ids (ValueError), a length that P
  // does not divide (ValueError), no labels (KeyError).
  std::optional<LoadedBatch> next();
  // len(): of an epoch.
  int64_t size() const { return loader_.size * group_.size(); }

 private:
  void refill();

  BatchLoader loader_;
  Communicator& group_;
  int64_t number_ = 0;  // of the loader's next batch
  std::deque<LoadedBatch> ready_;
};

}  // namespace isoshard::reference
