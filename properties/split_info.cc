// See split_info.h.
#include "properties/split_info.h"

#include <algorithm>

namespace isoshard::properties {
namespace {

using checkpoint::NodeId;
using reference::Cut;

// Python's re.escape between ^ and $.
std::string pattern_of(const std::string& name) {
  const std::string special = "()[]{}?*+-|^$\\.&~# \t\n\r\v\f";
  std::string result = "^";
  for (char c : name) {
    if (special.find(c) != std::string::npos) result += '\\';
    result += c;
  }
  return result + "$";
}

Shape strides_of(const Shape& shape) {
  Shape strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * shape[i];
  return strides;
}

}  // namespace

const Shape& SplitInfo::shape_of(size_t number) const {
  const ModelParameter& parameter = model_.parameters[number];
  return parameter.whole ? *parameter.whole : parameter.shape;
}

NodeId SplitInfo::integers(const std::vector<int64_t>& values, bool tuple) {
  std::vector<NodeId> items;
  for (int64_t value : values) items.push_back(builder_.pickle.integer(value));
  return tuple ? builder_.pickle.tuple(std::move(items)) : builder_.pickle.list(std::move(items));
}

// [part][rank], counted; what is cut whole is one part.
std::vector<std::vector<int64_t>> SplitInfo::widths_of(size_t number) const {
  std::vector<std::vector<int64_t>> widths;
  const ModelParameter& parameter = model_.parameters[number];
  std::vector<int64_t> parts = parameter.parts;
  if (parameter.cut != Cut::kParts) parts = {shape_of(number)[parameter.cut == Cut::kRow ? 1 : 0]};
  for (int64_t rows : parts) {
    const std::vector<int> held = reference::owners(rule_of(model_, number), rows, ranks_);
    widths.emplace_back();
    for (int rank = 0; rank < ranks_; ++rank)
      widths.back().push_back(std::count(held.begin(), held.end(), rank));
  }
  return widths;
}

// One piece for each part, also where the rank holds nothing of it.
NodeId SplitInfo::pieces_of(size_t number, int rank) {
  const Shape& shape = shape_of(number);
  const reference::CutRule rule = rule_of(model_, number);
  std::vector<NodeId> pieces;
  const auto add = [&](const Shape& extents, int64_t source, int64_t dest, const Shape& shard,
                       const std::vector<int64_t>& locations) {
    const auto address = [&](int64_t offset, const Shape& whole) {
      return builder_.pickle.list({builder_.pickle.integer(offset), integers(strides_of(whole))});
    };
    pieces.push_back(builder_.dict({{"shape", integers(extents)},
                                    {"source", address(source, shape)},
                                    {"dest", address(dest, shard)},
                                    {"locations", integers(locations)}}));
  };
  if (rule.cut == Cut::kWhole) {
    std::vector<int64_t> everyone;
    for (int other = 0; other < ranks_; ++other) everyone.push_back(other);
    add(shape, 0, 0, shape, everyone);
    return builder_.pickle.list(std::move(pieces));
  }
  const Shape shard = reference::shard_shape(rule, shape, rank, ranks_);
  const size_t axis = rule.cut == Cut::kRow ? 1 : 0;
  int64_t begin = 0, dest = 0;
  for (const std::vector<int64_t>& widths : widths_of(number)) {
    for (int other = 0; other < ranks_; ++other) {
      Shape extents = shape;
      extents[axis] = widths[static_cast<size_t>(other)];
      if (other == rank)
        add(extents, begin * strides_of(shape)[axis], dest * strides_of(shard)[axis], shard,
            {rank});
      if (other == rank) dest += extents[axis];
      begin += extents[axis];
    }
  }
  return builder_.pickle.list(std::move(pieces));
}

NodeId SplitInfo::map_of(size_t number) {
  std::vector<NodeId> ranks;
  for (int rank = 0; rank < ranks_; ++rank) {
    const Shape shard =
        reference::shard_shape(rule_of(model_, number), shape_of(number), rank, ranks_);
    ranks.push_back(builder_.pickle.integer(rank));
    ranks.push_back(
        builder_.dict({{"shard_shape", integers(shard)}, {"pieces", pieces_of(number, rank)}}));
  }
  return builder_.dict({{"logical_shape", integers(shape_of(number))},
                        {"ranks", builder_.pickle.dict(std::move(ranks))}});
}

NodeId SplitInfo::run() {
  checkpoint::Pickle& pickle = builder_.pickle;
  std::vector<NodeId> rows, whole, parts;
  std::vector<std::pair<std::string, NodeId>> widths, maps;
  for (size_t i = 0; i < model_.parameters.size(); ++i) {
    const ModelParameter& parameter = model_.parameters[i];
    const std::string pattern = pattern_of(parameter.name);
    if (parameter.cut == Cut::kRow) rows.push_back(pickle.string(pattern));
    if (parameter.cut == Cut::kWhole) whole.push_back(pickle.string(pattern));
    if (parameter.cut == Cut::kParts) {
      std::vector<NodeId> shape = {integers(parameter.parts, /*tuple=*/true)};
      for (size_t d = 1; d < shape_of(i).size(); ++d)
        shape.push_back(pickle.integer(d + 1 == shape_of(i).size() ? -1 : shape_of(i)[d]));
      parts.push_back(builder_.dict({{"patterns", pickle.list({pickle.string(pattern)})},
                                     {"shape", pickle.list(std::move(shape))},
                                     {"partition_dim", pickle.integer(0)}}));
      std::vector<NodeId> lists;
      for (const std::vector<int64_t>& list : widths_of(i)) lists.push_back(integers(list));
      widths.emplace_back(pattern, pickle.list(std::move(lists)));
    }
    maps.emplace_back(pattern, map_of(i));
  }
  std::vector<std::pair<std::string, NodeId>> info = {
      {"universal_checkpoint_version", pickle.real(0.4)},
      {"parameter_with_row_parallelism_patterns", pickle.list(std::move(rows))},
      {"tp_replicated_parameter_patterns", pickle.list(std::move(whole))},
      {"vocabulary_parameter_patterns", pickle.list({})},
      {"parameter_with_sub_params", pickle.list(std::move(parts))}};
  if (!widths.empty())
    info.emplace_back("sub_param_shard_widths", builder_.dict(std::move(widths)));
  if (model_.maps)
    info.emplace_back("affine_map", builder_.dict({{"version", pickle.integer(1)},
                                                   {"params", builder_.dict(std::move(maps))}}));
  return builder_.dict(std::move(info));
}

}  // namespace isoshard::properties
