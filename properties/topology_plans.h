// Plans between simulated runs of any two topologies and stages: who holds which element is what
// the reference says of each rank, where it goes is the production planner's work.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "properties/file_bridge.h"

namespace isoshard::properties {

class TopologyPlans {
 public:
  // Every topology of up to `world` ranks whose ep divides dp·sp and the number of experts, at each
  // stage.
  TopologyPlans(int world, int experts);
  ~TopologyPlans();

  size_t size() const { return legs_.size(); }
  const Leg& leg(size_t number) const { return legs_[number]; }
  // "" if the plan from one to the other brings every rank of the target each of its elements, from
  // a rank that holds it; `skew`: the plan reads the element before each.
  // Thread-safe.
  std::string difference(size_t from, size_t to, bool skew) const;

 private:
  struct Side;
  class Sides;
  std::vector<Leg> legs_;
  std::vector<std::unique_ptr<Side>> sides_;
};

}  // namespace isoshard::properties
