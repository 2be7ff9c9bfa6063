// Stage 0: which entry of the module each numbered slot of an optimizer's state stands for. Names
// are inferred from order and shapes, then proven by values where the optimizer keeps masters.
//
//   module            scale  buffer  embed  norm (frozen)  up  head (alias of embed)
//   entries             A              B          C        D
//   group 0 (slots)                    0                   1      order inside a group is kept,
//   group 1 (slots)     0                                         groups may interleave
#pragma once

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/deepspeed/master_compare.h"
#include "checkpoint/deepspeed/order_search.h"
#include "checkpoint/sharded_state.h"
#include "core/error.h"

namespace isoshard::checkpoint {

// One parameter as the optimizer knows it: a number, and tensors of the parameter's shape.
struct Slot {
  size_t group = 0;
  size_t family = 0;           // groups of experts that were one before they were split
  size_t index_local = 0;      // in the group
  std::optional<bool> expert;  // whether its group is one of experts; nothing: no group says so
  std::optional<Shape> shape;  // nothing: never stepped, and there is no master
  std::optional<TensorView> master;
  NodeId state = kNoNode;
  std::vector<std::pair<std::string, TensorView>> tensors;
  std::vector<std::pair<std::string, NodeId>> scalars;
  size_t entry = 0;  // number among the entries, once assigned
};

// A parameter that a slot may stand for: a tensor of the module that is neither buffer nor alias,
// or an expert of the rank whose optimizer it is.
struct ModuleEntry {
  Leaf leaf;               // in the model's dtype; its name is the one among all ranks' experts
  std::string local_name;  // as the rank's own module names it
  bool expert = false;
  bool replaced = false;  // by AutoEP, which makes new parameters of routers and experts
  bool owned = false;     // by the optimizer
};

std::string describe(const Slot& slot);
std::string describe(const ModuleEntry& entry);

class SlotNames {
 public:
  // Slots stand group by group in the optimizer's file, number `file` of the state. An order is a
  // list of numbers of entries, in which a group's parameters may stand. Where that leaves several
  // ways a family, whose groups were one before they were split, keeps to the order as a whole.
  SlotNames(const ShardedState& state, int file, std::vector<Slot>* slots,
            const std::vector<ModuleEntry>& entries, std::vector<std::vector<size_t>> orders);

  // Sets `entry` of each slot and returns the evidence; Error(kMismatch) where there is not one way
  // alone. Values decide only where shapes do not: reading them takes time.
  std::string infer();
  // The same, as `text` says it: a name a line, a blank line between groups. `path` is its file.
  void take_order(const std::string& path, const std::string& text);
  // Every master, cast to the module's dtype, must equal its entry; Error(kMismatch).
  void prove();

  [[noreturn]] void refuse(ErrorCode code, const std::string& what, const std::string& entry,
                           const std::string& expected, const std::string& found) const;

 private:
  struct Search {
    std::vector<OrderSearch::Order> ways;  // entries by slot: none, the only one, or several
    size_t order = 0;                      // the number of the order in which the last was found
    bool too_many = false;
    std::optional<size_t> stuck;
  };

  Search search(const std::vector<size_t>& sizes, bool values, bool empty_ones);
  // By the order within each group, or else within each family.
  Search find_ways(const std::vector<size_t>& sizes, bool* values);
  [[noreturn]] void explain(const Search& result, bool values) const;
  bool fits(const Slot& slot, const ModuleEntry& entry) const {
    return (!slot.expert || *slot.expert == entry.expert) &&
           (!slot.shape || *slot.shape == entry.leaf.shape);
  }
  const std::optional<Difference>& difference(size_t slot, size_t entry);

  const ShardedState& state_;
  const int file_;
  std::vector<Slot>& slots_;
  const std::vector<ModuleEntry>& entries_;
  const std::vector<std::vector<size_t>> orders_;
  std::vector<size_t> group_sizes_, family_sizes_;
  bool has_masters_ = false;
  std::map<std::pair<size_t, size_t>, std::optional<Difference>> differences_;  // slot, entry
};

}  // namespace isoshard::checkpoint
