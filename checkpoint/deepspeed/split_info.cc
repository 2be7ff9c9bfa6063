// universal_checkpoint_info of a target: the source's lists, with maps and widths for the target's
// tensor-parallel ranks (deepspeed/checkpoint/affine.py, to_dict; key order as 0.19.8 writes it).
#include <algorithm>

#include "checkpoint/deepspeed/patterns.h"
#include "checkpoint/deepspeed/reshard_target.h"

namespace isoshard::checkpoint {
namespace {

NodeId list_of(Pickle* pickle, const std::vector<int64_t>& numbers) {
  std::vector<NodeId> items;
  for (int64_t number : numbers) items.push_back(pickle->integer(number));
  return pickle->list(std::move(items));
}

NodeId piece_node(TorchBuilder* builder, const MapPiece& piece) {
  Pickle& pickle = builder->pickle;
  const auto address = [&](int64_t offset, const Shape& strides) {
    return pickle.list({pickle.integer(offset), list_of(&pickle, strides)});
  };
  return builder->dict(
      {{"shape", list_of(&pickle, piece.shape)},
       {"source", address(piece.source_offset, piece.source_stride)},
       {"dest", address(piece.dest_offset, piece.dest_stride)},
       {"locations", list_of(&pickle, {piece.locations.begin(), piece.locations.end()})}});
}

class SplitInfoWriter {
 public:
  SplitInfoWriter(TorchBuilder* builder, const ReshardTarget& target)
      : builder_(*builder),
        pickle_(builder->pickle),
        target_(target),
        state_(target.state),
        fields_(state_.document(state_.split_file)) {}

  NodeId run() {
    const NodeId info = fields_.need(fields_.root(), "universal_checkpoint_info");
    MappingCopy copy(&builder_, state_, {state_.split_file, info});
    if (const NodeId widths = fields_.maybe(info, "sub_param_shard_widths"); widths != kNoNode)
      copy.set("sub_param_shard_widths", sub_param_widths(widths));
    if (const NodeId maps = fields_.maybe(info, "affine_map"); maps != kNoNode)
      copy.set("affine_map", affine_maps(maps));
    if (const int64_t rows = vocabulary_rows(); rows > 0)
      copy.set_if_present("padded_vocab_size", pickle_.integer(rows));
    return copy.finish();
  }

 private:
  int64_t vocabulary_rows() const {
    for (size_t i = 0; i < target_.maps.size(); ++i) {
      const int split = state_.parameters[i].split;
      if (split >= 0 && state_.splits[static_cast<size_t>(split)].vocabulary)
        return target_.maps[i].logical_shape.at(0);
    }
    return 0;
  }

  NodeId integers(const std::vector<int64_t>& numbers) { return list_of(&pickle_, numbers); }

  // By pattern: the target's widths of the first parameter that matches.
  NodeId sub_param_widths(NodeId source) {
    PatternList patterns;
    const std::vector<NodeId>& entries = fields_.pickle().entries(source);
    for (size_t i = 0; i + 1 < entries.size(); i += 2)
      patterns.add(fields_.text(entries[i], "sub_param_shard_widths"), fields_.document().path());
    std::vector<NodeId> widths(patterns.size(), kNoNode);
    for (size_t i = 0; i < state_.parameters.size(); ++i) {
      const int split = state_.parameters[i].split;
      const int number = patterns.first(state_.parameters[i].name);
      if (split < 0 || number < 0 || widths[static_cast<size_t>(number)] != kNoNode) continue;
      std::vector<NodeId> lists;
      for (const std::vector<int64_t>& sub :
           widths_of(state_.splits[static_cast<size_t>(split)], target_.maps[i]))
        lists.push_back(integers(sub));
      widths[static_cast<size_t>(number)] = pickle_.list(std::move(lists));
    }
    std::vector<std::pair<std::string, NodeId>> result;
    for (size_t i = 0; i < widths.size(); ++i) {
      if (widths[i] != kNoNode)
        result.emplace_back(patterns.pattern(static_cast<int>(i)), widths[i]);
    }
    return builder_.dict(std::move(result));
  }

  NodeId affine_maps(NodeId source) {
    PatternList patterns;
    const NodeId params = fields_.need(source, "params");
    const std::vector<NodeId>& entries = fields_.pickle().entries(params);
    for (size_t i = 0; i + 1 < entries.size(); i += 2)
      patterns.add(fields_.text(entries[i], "affine_map"), fields_.document().path());
    std::vector<NodeId> maps(patterns.size(), kNoNode);
    for (size_t i = 0; i < state_.parameters.size(); ++i) {
      const int number = patterns.first(state_.parameters[i].name);
      if (number >= 0) maps[static_cast<size_t>(number)] = map_node(&builder_, target_.maps[i]);
    }
    std::vector<std::pair<std::string, NodeId>> result;
    for (size_t i = 0; i < maps.size(); ++i) {
      if (maps[i] != kNoNode) result.emplace_back(patterns.pattern(static_cast<int>(i)), maps[i]);
    }
    return builder_.dict(
        {{"version", pickle_.integer(1)}, {"params", builder_.dict(std::move(result))}});
  }

  TorchBuilder& builder_;
  Pickle& pickle_;
  const ReshardTarget& target_;
  const ShardedState& state_;
  const Fields fields_;
};

}  // namespace

NodeId map_node(TorchBuilder* builder, const AffineMap& map) {
  Pickle& pickle = builder->pickle;
  std::vector<NodeId> ranks;
  for (size_t t = 0; t < map.ranks.size(); ++t) {
    std::vector<NodeId> pieces;
    for (const MapPiece& piece : map.ranks[t].pieces) pieces.push_back(piece_node(builder, piece));
    ranks.push_back(pickle.integer(static_cast<int64_t>(t)));
    ranks.push_back(builder->dict({{"shard_shape", list_of(&pickle, map.ranks[t].shard_shape)},
                                   {"pieces", pickle.list(std::move(pieces))}}));
  }
  return builder->dict({{"logical_shape", list_of(&pickle, map.logical_shape)},
                        {"ranks", pickle.dict(std::move(ranks))}});
}

NodeId target_split_info(TorchBuilder* builder, const ReshardTarget& target) {
  return SplitInfoWriter(builder, target).run();
}

}  // namespace isoshard::checkpoint
