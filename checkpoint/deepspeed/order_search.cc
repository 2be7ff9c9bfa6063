// Windows first, which alone decide most cases; then a walk that keeps every state's ways.
#include "checkpoint/deepspeed/order_search.h"

#include <set>

namespace isoshard::checkpoint {

bool OrderSearch::find_windows() {
  earliest_.resize(slots_);
  latest_.resize(slots_);
  for (size_t group = 0; group < sizes_.size(); ++group) {
    size_t candidate = 0;
    for (size_t slot = begins_[group]; slot < begins_[group] + sizes_[group]; ++slot) {
      while (candidate < candidates_ && !fits_(slot, candidate)) ++candidate;
      if (candidate == candidates_) {
        stuck = slot;
        return false;
      }
      earliest_[slot] = candidate++;
    }
    candidate = candidates_;
    for (size_t slot = begins_[group] + sizes_[group]; slot-- > begins_[group];) {
      do --candidate;  // ends at earliest_ at the latest
      while (!fits_(slot, candidate));
      latest_[slot] = candidate;
    }
    work_ += candidates_;
    too_many = work_ > kWorkLimit;
    if (too_many) return false;
  }
  return true;
}

void OrderSearch::walk() {
  if (earliest_ == latest_) {
    const std::set<size_t> distinct(earliest_.begin(), earliest_.end());
    if (distinct.size() == slots_) orders = {earliest_};
    return;
  }
  Layer layer = {{Placed(sizes_.size(), 0), {kStart}}};
  for (size_t candidate = 0; candidate < candidates_ && !layer.empty(); ++candidate) {
    layer = step(layer, candidate);
    too_many = work_ > kWorkLimit;
    if (too_many) return;
  }
  if (layer.empty()) return;
  for (size_t way : layer.begin()->second) {
    Order& order = orders.emplace_back(slots_);
    for (; way != kStart; way = placements_[way].before) {
      order[placements_[way].slot] = placements_[way].candidate;
    }
  }
}

OrderSearch::Layer OrderSearch::step(const Layer& layer, size_t candidate) {
  Layer next;
  for (const auto& [placed, ways] : layer) {
    if (work_ > kWorkLimit) break;  // walk() gives up
    work_ += 2 * sizes_.size() + 8;
    reach(&next, placed, ways, candidate + 1);  // the candidate is left out
    for (size_t group = 0; group < sizes_.size(); ++group) {
      const size_t slot = begins_[group] + placed[group];
      if (placed[group] == sizes_[group] || candidate < earliest_[slot] ||
          candidate > latest_[slot] || !fits_(slot, candidate)) {
        continue;
      }
      work_ += sizes_.size() + 8;
      Placed more = placed;
      ++more[group];
      Ways longer;
      for (size_t way : ways) {
        longer.push_back(placements_.size());
        placements_.push_back({way, slot, candidate});
      }
      reach(&next, more, longer, candidate + 1);
    }
  }
  return next;
}

// Adds a state before candidate `next`, unless a slot can no longer be placed.
void OrderSearch::reach(Layer* layer, const Placed& placed, const Ways& ways, size_t next) const {
  size_t rest = 0;
  for (size_t group = 0; group < sizes_.size(); ++group) {
    if (placed[group] == sizes_[group]) continue;
    if (latest_[begins_[group] + placed[group]] < next) return;
    rest += sizes_[group] - placed[group];
  }
  if (rest > candidates_ - next) return;
  Ways& known = (*layer)[placed];
  known.insert(known.end(), ways.begin(), ways.end());
  if (known.size() > 2) known.resize(2);
}

}  // namespace isoshard::checkpoint
