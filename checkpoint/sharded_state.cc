// Small helpers of ShardedState.
#include "checkpoint/sharded_state.h"

#include <algorithm>

#include "core/check.h"
#include "core/mutant.h"

namespace isoshard::checkpoint {

const char* name(Flavour flavour) {
  switch (flavour) {
    case Flavour::kZero0:
      return "ZeRO-0 (no partitions)";
    case Flavour::kZero12:
      return "ZeRO-1/2";
    case Flavour::kBf16Optimizer:
      return "BF16_Optimizer (ZeRO-1 form)";
    case Flavour::kZero3:
      return "ZeRO-3";
    case Flavour::kUniversal12:
      return "universal (ZeRO-1/2 form)";
    case Flavour::kUniversal3:
      return "universal (ZeRO-3 form)";
    case Flavour::kWeights:
      break;
  }
  return "weights only";
}

int ShardedState::add_leaf(Leaf leaf) {
  leaves.push_back(std::move(leaf));
  return static_cast<int>(leaves.size()) - 1;
}

void ShardedState::enlist(int number) {
  const int owner = parameters[static_cast<size_t>(number)].group;
  if (owner < 0) return;
  GroupState& group = groups[static_cast<size_t>(owner)];
  group.parameters.push_back(number);
  group.flat_order.push_back(number);
}

void ShardedState::refuse(ErrorCode code, const std::string& what, const std::string& entry,
                          const std::string& expected, const std::string& found,
                          const std::string& next) const {
  throw Error(ErrorInfo{.code = code,
                        .what = what,
                        .file = folder,
                        .entry = entry,
                        .expected = expected,
                        .found = found,
                        .next = next});
}

int ShardedState::state_leaf(const ParameterState& parameter, const std::string& state) const {
  for (int number : parameter.states) {
    if (leaf(number).state == state) return number;
  }
  return -1;
}

void ShardedState::set_parameters(std::vector<ParameterState> list) {
  parameters = std::move(list);
  index_.clear();
  indexed_ = 0;
}

const ParameterState* ShardedState::find_parameter(const std::string& name) const {
  for (; indexed_ < parameters.size(); ++indexed_) {
    index_.emplace(parameters[indexed_].name, indexed_);
  }
  const auto found = index_.find(name);
  return found == index_.end() ? nullptr : &parameters[found->second];
}

std::vector<FileFragment> file_fragments(const TorchFile& document, int file,
                                         const TensorView& view) {
  const int64_t total = numel(view.shape);
  const int64_t item = item_size_bytes(view.dtype);
  const int64_t start = document.data_offset(view);
  if (total == 0) return {};
  if (view.is_contiguous() || mutant("view_taken_for_contiguous")) return {{0, total, file, start}};
  // The longest run of inner dimensions that lies in one piece.
  int64_t run = 1;
  size_t outer = view.shape.size();
  while (outer > 0 && (view.shape[outer - 1] == 1 || view.stride[outer - 1] == run)) {
    run *= view.shape[--outer];
  }
  std::vector<FileFragment> result;
  std::vector<int64_t> index(outer, 0);
  for (int64_t begin = 0; begin < total; begin += run) {
    int64_t offset = 0;
    for (size_t i = 0; i < outer; ++i) offset += index[i] * view.stride[i];
    result.push_back({begin, run, file, start + offset * item});
    for (size_t i = outer; i-- > 0;) {
      if (++index[i] < view.shape[i]) break;
      index[i] = 0;
    }
  }
  return result;
}

Leaf file_leaf(const TorchFile& document, int file, const TensorView& view, const std::string& name,
               const std::string& state) {
  return {.name = name,
          .state = state,
          .dtype = view.dtype,
          .shape = view.shape,
          .requires_grad = view.requires_grad,
          .fragments = file_fragments(document, file, view)};
}

void append_fragments(const Leaf& leaf, int64_t begin, int64_t count, int64_t at,
                      std::vector<FileFragment>* result) {
  const int64_t item = item_size_bytes(leaf.dtype), end = begin + count;
  auto fragment = std::upper_bound(
      leaf.fragments.begin(), leaf.fragments.end(), begin,
      [](int64_t from, const FileFragment& f) { return from < f.begin + f.count; });
  for (int64_t from = begin; from < end; ++fragment) {
    CHECK(fragment != leaf.fragments.end() && fragment->begin <= from, "a shard has a gap");
    const int64_t length = std::min(end, fragment->begin + fragment->count) - from;
    result->push_back({at + (from - begin), length, fragment->file,
                       fragment->offset_bytes + (from - fragment->begin) * item});
    from += length;
  }
}

void check_cover(const ShardedState& state) {
  for (const Leaf& leaf : state.leaves) {
    int64_t next = 0;
    for (const FileFragment& fragment : leaf.fragments) {
      CHECK(fragment.begin == next || mutant("cover_unchecked"),
            "fragments of " + leaf.name + " leave a gap or overlap");
      CHECK(fragment.count > 0, "an empty fragment of " + leaf.name);
      next += fragment.count;
    }
    CHECK(next == leaf.size_elements(), "fragments of " + leaf.name + " end too early");
  }
}

}  // namespace isoshard::checkpoint
