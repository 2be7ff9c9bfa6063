// Typed access to the dictionaries of a DeepSpeed file; every failure names file, path and type.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "checkpoint/sharded_state.h"

namespace isoshard::checkpoint {

class Fields {
 public:
  explicit Fields(const TorchFile& document) : document_(document), pickle_(document.pickle()) {}

  NodeId root() const { return pickle_.root; }
  NodeId need(NodeId mapping, const std::string& key) const;   // Error(kCorrupt) if absent
  NodeId maybe(NodeId mapping, const std::string& key) const;  // kNoNode if absent or None
  int64_t integer(NodeId node, const std::string& what) const;
  std::string text(NodeId node, const std::string& what) const;
  // The number of a ZeroStageEnum, or a plain int.
  int64_t stage(NodeId node) const;
  bool truth(NodeId mapping, const std::string& key) const;  // key present and True
  const std::vector<NodeId>& list(NodeId node, const std::string& what) const;
  Shape shape(NodeId node, const std::string& what) const;  // torch.Size, tuple or list of int
  TensorView tensor(NodeId node, const std::string& what) const;
  TensorView flat_tensor(NodeId node, const std::string& what) const;  // contiguous, 1-D

  // Entries of a mapping with string keys; unsafe names are refused (contracts §6).
  std::vector<std::pair<std::string, NodeId>> named(NodeId mapping, const std::string& what) const;

  // Fields of a pickled record such as fragment_address or LossScaler.
  NodeId state_of(NodeId object) const;

  [[noreturn]] void fail(const std::string& what, const std::string& entry,
                         const std::string& expected, const std::string& found) const;
  const Pickle& pickle() const { return pickle_; }
  const TorchFile& document() const { return document_; }

 private:
  const TorchFile& document_;
  const Pickle& pickle_;
};

// Whether two values of files are alike: numbers, text, lists and dictionaries (in any order);
// objects of other kinds count as alike if both are such.
bool same_value(const Fields& a, NodeId x, const Fields& b, NodeId y);

}  // namespace isoshard::checkpoint
