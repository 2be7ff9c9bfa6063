// What a checkpoint says of its tensor-parallel split: universal_checkpoint_info of the model files
// (deepspeed/checkpoint/constants.py; collected by module_inject/layers.py). 0.19.8 records an
// affine map for every parameter; older versions, and Megatron clients, record lists of patterns.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint/deepspeed/fields.h"
#include "checkpoint/deepspeed/patterns.h"
#include "checkpoint/sharded_state.h"
#include "checkpoint/tensor_split.h"

namespace isoshard::checkpoint {

class TensorParallelInfo {
 public:
  // Of model file number `file`, whose Fields must outlive this; `info` may be kNoNode.
  TensorParallelInfo(const Fields& fields, int file, NodeId info);

  bool present() const { return info_ != kNoNode; }
  // True if there is a list or a map that speaks of any parameter.
  bool says_anything() const;

  // The split of a parameter whose shard has these shapes by rank; nothing: the rank's files do not
  // name it, so that it holds no element. Throws Error(kCorrupt, kMismatch, kUnsupported).
  TensorSplit split_of(const std::string& name,
                       const std::vector<std::optional<Shape>>& shards) const;

  // Patterns, of whatever list, that match none of the names (DeepSpeed: "Unused patterns").
  std::vector<std::string> unused_patterns(const std::vector<std::string>& names) const;
  // Whether maps are recorded, and neither one of them nor a list speaks of this parameter.
  bool left_out(const std::string& name) const;

 private:
  struct SubParams {
    std::string pattern;
    NodeId entry = kNoNode;
    NodeId shape = kNoNode;
    int64_t dim = 0;
  };

  [[noreturn]] void refuse(const std::string& what, const std::string& name,
                           const std::string& expected, const std::string& found) const;
  std::vector<const PatternList*> lists() const;
  PatternList read_list(const char* key) const;
  void read_sub_params();
  void read_maps();
  AffineMap read_map(NodeId node, const std::string& name) const;
  MapPiece read_piece(NodeId node, const std::string& name) const;

  int one_match(const PatternList& list, const char* key, const std::string& name) const;
  TensorSplit by_lists(const std::string& name, const std::vector<Shape>& shards) const;
  void cut_sub_params(const SubParams& entry, const std::string& name,
                      const std::vector<Shape>& shards, TensorSplit* split) const;
  Widths sub_widths(const SubParams& entry, const std::string& name,
                    const std::vector<Shape>& shards, TensorSplit* split) const;
  void adopt_map(const AffineMap& map, const std::string& name, TensorSplit* split) const;
  void strip_vocabulary(const std::string& name, TensorSplit* split) const;

  const Fields& fields_;
  int file_;
  NodeId info_;
  double version_ = 0;
  PatternList replicated_, averaged_, two_sub_params_, rows_, vocabulary_, unsupported_, maps_;
  std::vector<std::string> reasons_;  // of unsupported_
  std::vector<NodeId> map_nodes_;     // of maps_
  std::vector<SubParams> sub_params_;
  PatternList sub_patterns_;
  std::vector<size_t> sub_entry_;  // of sub_patterns_: number in sub_params_
};

// What the joined state makes doubtful of it: patterns for nothing, parameters without a word. With
// `strict` they are doubts, otherwise inferences. Frozen parameters, experts, aliases and buffers
// count as names too; DeepSpeed's converter forgets them (merge_tp_slices, strict_mode).
void tell_unused_patterns(ShardedState* state, const TensorParallelInfo& info, bool strict);

}  // namespace isoshard::checkpoint
