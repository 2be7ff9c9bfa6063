// See reshard.h.
#include "reference/reshard.h"

#include "core/check.h"

namespace isoshard::reference {
namespace {

FlatRules flat_rules(const Form& form) {
  return {
      .ranks = form.ranks, .round_robin = form.round_robin, .align_elements = form.align_elements};
}

template <typename Item>
std::vector<Item> pick(const std::vector<Item>& items, const std::vector<int>& numbers) {
  std::vector<Item> result;
  for (int number : numbers) result.push_back(items[static_cast<size_t>(number)]);
  return result;
}

GroupSizes sizes_of(const Groups& whole) {
  GroupSizes numels;
  for (const std::vector<Bits>& group : whole) {
    numels.emplace_back();
    for (const Bits& tensor : group) numels.back().push_back(static_cast<int64_t>(tensor.size()));
  }
  return numels;
}

}  // namespace

std::vector<BufferMembers> buffers_of(const GroupSizes& numels, const Form& form) {
  std::vector<BufferMembers> result;
  for (size_t g = 0; g < numels.size(); ++g) {
    const int group = static_cast<int>(g);
    if (form.stage == 0) {
      for (size_t i = 0; i < numels[g].size(); ++i)
        result.push_back({group, {static_cast<int>(i)}});
    } else if (form.stage == 3) {
      for (std::vector<int>& members : sub_groups(numels[g], form.ranks, form.sub_group_size)) {
        result.push_back({group, std::move(members)});
      }
    } else {
      result.push_back({group, flat_buffer(numels[g], flat_rules(form)).order});
    }
  }
  return result;
}

RankBuffers partition(const Groups& whole, const Form& form, uint32_t padding) {
  RankBuffers ranks(form.stage == 0 ? 1 : static_cast<size_t>(form.ranks));
  for (const BufferMembers& members : buffers_of(sizes_of(whole), form)) {
    const std::vector<Bits>& group = whole[static_cast<size_t>(members.group)];
    std::vector<Bits> pieces;
    if (form.stage == 0)
      pieces = pick(group, members.parameters);
    else if (form.stage == 3)
      pieces = partition_slots(pick(group, members.parameters), form.ranks, padding);
    else
      pieces = partition_flat(group, flat_rules(form), padding);
    for (size_t r = 0; r < ranks.size(); ++r) ranks[r].push_back(std::move(pieces[r]));
  }
  return ranks;
}

Groups gather(const RankBuffers& buffers, const GroupSizes& numels, const Form& form) {
  Groups whole;
  for (const std::vector<int64_t>& group : numels) whole.emplace_back(group.size());
  const std::vector<BufferMembers> all = buffers_of(numels, form);
  for (size_t b = 0; b < all.size(); ++b) {
    const size_t g = static_cast<size_t>(all[b].group);
    std::vector<Bits> pieces, tensors;
    for (const std::vector<Bits>& rank : buffers) pieces.push_back(rank[b]);
    if (form.stage == 0)
      tensors = std::move(pieces);
    else if (form.stage == 3)
      tensors = gather_slots(pieces, pick(numels[g], all[b].parameters));
    else
      tensors = gather_flat(pieces, numels[g], flat_rules(form));
    const bool whole_group =
        form.stage == 1 || form.stage == 2;  // already in the optimizer's order
    for (size_t i = 0; i < tensors.size(); ++i) {
      const size_t number = whole_group ? i : static_cast<size_t>(all[b].parameters[i]);
      whole[g][number] = std::move(tensors[i]);
    }
  }
  return whole;
}

// The definition of resharding: what the source's ranks hold together, cut as the target cuts it.
RankBuffers reshard(const RankBuffers& source, const GroupSizes& numels, const Change& change) {
  return partition(gather(source, numels, change.source), change.target, change.padding);
}

}  // namespace isoshard::reference
