// The plain values of a pickle's subtree, each with its path, as text that tells type and bits.
#pragma once

#include <functional>
#include <set>
#include <string>

#include "checkpoint/format/torch_file.h"

namespace isoshard::reshard {

class ValueWalk {
 public:
  using Visit = std::function<void(const std::string& path, const std::string& text)>;

  // `skipped`: keys whose values are left out at any depth ("params" only where it is a list).
  ValueWalk(const checkpoint::TorchFile& document, std::set<std::string> skipped, Visit visit)
      : document_(document), skipped_(std::move(skipped)), visit_(std::move(visit)) {}

  // Tensors of no dimension are values, and read; all others are none. With `steps_only` only those
  // named "step" are: of other states a parameter may have an element of its own. Throws
  // Error(kLimit) beyond a million values: shared objects count each time.
  void walk(checkpoint::NodeId node, const std::string& path, bool steps_only);

 private:
  struct Place {
    std::string path;
    bool step = false;  // the last key is "step"
    int depth = 0;
  };
  void visit(checkpoint::NodeId node, const Place& place);
  void visit_mapping(const std::vector<checkpoint::NodeId>& entries, const Place& place);
  void visit_list(const std::vector<checkpoint::NodeId>& items, const Place& place);
  void visit_object(checkpoint::NodeId node, const Place& place);
  std::string plain_text(checkpoint::NodeId node) const;
  std::string tensor_text(const checkpoint::TensorView& view) const;

  const checkpoint::TorchFile& document_;
  std::set<std::string> skipped_;
  Visit visit_;
  bool steps_only_ = false;
  int64_t visited_ = 0;
};

}  // namespace isoshard::reshard
