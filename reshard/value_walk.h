// The plain values of a pickle's subtree, each with its path, as text that tells type and bits.
#pragma once

#include <functional>
#include <map>
#include <set>
#include <string>

#include "checkpoint/format/torch_file.h"

namespace isoshard::reshard {

// What all walks through one file may cost together: a pickle of few bytes can share a node under
// many long keys, and each way to it is a value with a path of its own.
struct WalkBudget {
  int64_t values = 250'000;
  int64_t bytes = int64_t{32} << 20;   // of paths and texts
  std::map<int, bool> crc_holds = {};  // by storage
};

class ValueWalk {
 public:
  using Visit = std::function<void(const std::string& path, const std::string& text)>;

  // `skipped`: keys whose values are left out at any depth ("params" only where it is a list).
  // `budget`: of the file, for all its walks.
  ValueWalk(const checkpoint::TorchFile& document, const std::set<std::string>& skipped,
            WalkBudget* budget, Visit visit)
      : document_(document), skipped_(skipped), budget_(*budget), visit_(std::move(visit)) {}

  // Tensors of no dimension are values, and read; all others are none. With `steps_only` only those
  // named "step" are: of other states a parameter may have an element of its own. Throws
  // Error(kLimit) where the budget ends: shared objects count each time.
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
  std::string plain_text(checkpoint::NodeId node);
  std::string tensor_text(const checkpoint::TensorView& view);
  bool crc_holds(int storage);
  size_t bytes_of(checkpoint::NodeId node) const;
  void spend(int64_t values, size_t bytes, const Place& place);
  [[noreturn]] void limit(const Place& place) const;

  const checkpoint::TorchFile& document_;
  const std::set<std::string>& skipped_;
  WalkBudget& budget_;
  Visit visit_;
  bool steps_only_ = false;
};

// At most some 200 bytes of a text, whole characters; of a longer one the hash stands for the rest.
std::string shortened(const std::string& text);

}  // namespace isoshard::reshard
