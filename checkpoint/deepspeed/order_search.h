// In which orders unnamed slots can stand for named candidates. Stage 0 infers names with it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <utility>
#include <vector>

namespace isoshard::checkpoint {

// Assignments of slots to candidates that keep the order inside every group; slots are numbered
// group by group. The walk goes over the candidates: its state is how many slots of each group are
// placed, with up to two ways to get there.
class OrderSearch {
 public:
  using Order = std::vector<size_t>;  // candidates by slot
  using Fits = std::function<bool(size_t slot, size_t candidate)>;

  OrderSearch() = default;
  OrderSearch(std::vector<size_t> group_sizes, size_t candidates, Fits fits)
      : sizes_(std::move(group_sizes)), candidates_(candidates), fits_(std::move(fits)) {
    for (size_t size : sizes_) {
      begins_.push_back(slots_);
      slots_ += size;
    }
    if (slots_ <= candidates_ && find_windows()) walk();
  }

  std::vector<Order> orders;    // none, the only one, or two of several
  bool too_many = false;        // given up; orders is empty
  std::optional<size_t> stuck;  // a slot without a place even in its group alone

 private:
  // A way is a chain of placements, named by its last.
  struct Placement {
    size_t before;
    size_t slot;
    size_t candidate;
  };
  using Placed = std::vector<size_t>;
  using Ways = std::vector<size_t>;
  using Layer = std::map<Placed, Ways>;
  static constexpr size_t kStart = SIZE_MAX;
  static constexpr size_t kWorkLimit = 10'000'000;

  bool find_windows();
  void walk();
  void reach(Layer* layer, const Placed& placed, const Ways& ways, size_t next) const;
  Layer step(const Layer& layer, size_t candidate);

  std::vector<size_t> sizes_;   // of the groups
  std::vector<size_t> begins_;  // first slot of each group
  size_t slots_ = 0;
  size_t candidates_ = 0;
  Fits fits_;
  Order earliest_, latest_;  // every order lies between the two
  std::vector<Placement> placements_;
  size_t work_ = 0;  // about the words touched
};

}  // namespace isoshard::checkpoint
