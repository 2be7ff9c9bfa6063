// See gradient.h.
#include "reference/gradient.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>

#include "core/check.h"
#include "core/exact_math.h"

namespace isoshard::reference {
namespace {

// Columns of row `row` that lie in a slice of the flat tensor.
Span columns(Span slice, int64_t row, int64_t width) {
  const int64_t begin = std::clamp(slice.begin - row * width, int64_t{0}, width);
  const int64_t end = std::clamp(slice.end - row * width, int64_t{0}, width);
  return {begin, std::max(begin, end)};
}

// Calls `visit(item, row, columns)` for the parts of items that a member owns.
template <typename Visit>
void visit_parts(const std::vector<ReduceItem>& items, size_t member, const Visit& visit) {
  for (const ReduceItem& item : items) {
    const Span slice = (*item.slices)[member];
    if (slice.size() <= 0 || item.width == 0) continue;
    for (int64_t row = slice.begin / item.width; row * item.width < slice.end; ++row) {
      visit(item, row, columns(slice, row, item.width));
    }
  }
}

// What goes to all members, one behind another, and how much to each.
struct Outgoing {
  std::vector<uint8_t> present;
  std::vector<float> values;
  std::vector<int64_t> flags, floats;  // by member
};

Outgoing pack(size_t members, const std::vector<ReduceItem>& items) {
  Outgoing out;
  for (size_t p = 0; p < members; ++p) {
    const size_t flags = out.present.size(), floats = out.values.size();
    visit_parts(items, p, [&](const ReduceItem& item, int64_t row, Span part) {
      const Partial& partial = (*item.mine)[static_cast<size_t>(row)];
      for (size_t node = 0; node < partial.nodes.size(); ++node) {
        out.present.push_back(partial.present[node]);
        const float* at = partial.values.data() + static_cast<int64_t>(node) * item.width;
        out.values.insert(out.values.end(), at + part.begin, at + part.end);
      }
    });
    out.flags.push_back(static_cast<int64_t>(out.present.size() - flags));
    out.floats.push_back(static_cast<int64_t>(out.values.size() - floats));
  }
  return out;
}

// all_to_all of runs of one buffer; `from` says how many elements come from each member.
template <typename T>
std::vector<T> exchange_runs(Communicator& group, const std::vector<T>& source,
                             const std::vector<int64_t>& to, const std::vector<int64_t>& from) {
  if (group.size() == 1) return source;
  std::vector<T> target(static_cast<size_t>(std::accumulate(from.begin(), from.end(), int64_t{0})));
  std::vector<ConstBuffer> send;
  std::vector<Buffer> receive;
  size_t sent = 0, received = 0;
  for (size_t p = 0; p < to.size(); ++p) {
    const size_t out = static_cast<size_t>(to[p]), in = static_cast<size_t>(from[p]);
    send.push_back(const_buffer(std::span<const T>(source).subspan(sent, out)));
    receive.push_back(buffer(std::span<T>(target).subspan(received, in)));
    sent += out;
    received += in;
  }
  group.all_to_all(send, receive);
  return target;
}

}  // namespace

float* FixedSum::push(int64_t at, int64_t width) {
  settle();
  pending_at_ = at;
  pending_.assign(static_cast<size_t>(width), 0.0f);
  return pending_.data();
}

void FixedSum::settle() {
  for (size_t i = 0; i < pending_.size(); ++i) {
    const float x = std::abs(pending_[i]);
    largest_ = std::isfinite(x) ? std::max(largest_, x) : std::numeric_limits<float>::infinity();
    const double scaled = std::ldexp(static_cast<double>(pending_[i]), exponent_);  // exact
    if (!(std::abs(scaled) < limit_)) {
      saturated_ = true;
      continue;
    }
    // From 2^51 on a float's multiple is whole already.
    const double whole = std::abs(scaled) < 0x1p51 ? exact::nearest(scaled) : scaled;
    sums_[static_cast<size_t>(pending_at_) + i] += static_cast<int64_t>(whole);
  }
  pending_.clear();
}

void FixedSum::restart(int exponent, int64_t leaves) {
  limit_ = std::ldexp(1.0, 62 - std::bit_width(static_cast<uint64_t>(leaves - 1)));
  std::fill(sums_.begin(), sums_.end(), int64_t{0});
  pending_.clear();
  exponent_ = exponent;
  largest_ = 0.0f;
  saturated_ = false;
}

int FixedSum::exponent_for(int64_t leaves, float largest) {
  int magnitude = 0;
  const float fraction = std::frexp(largest, &magnitude);  // largest = fraction · 2^magnitude
  if (fraction == 0.5f) --magnitude;
  return 61 - std::bit_width(static_cast<uint64_t>(leaves - 1)) - magnitude - 4;
}

Gradient::Gradient(ReduceMode mode, const std::vector<TreeNode>& nodes, int64_t rows, int64_t width)
    : rows_(rows), width_(width) {
  if (mode == ReduceMode::kFixed) {
    fixed_.emplace(rows * width);
  } else {
    sums_.assign(static_cast<size_t>(rows), PartialSum(nodes, static_cast<size_t>(width)));
  }
}

std::vector<Partial> Gradient::finish() {
  std::vector<Partial> result;
  for (PartialSum& sum : sums_) result.push_back(sum.finish());
  return result;
}

std::vector<Values> reduce_to_owners(Communicator& group,
                                     const std::vector<std::vector<TreeNode>>& nodes,
                                     const std::vector<ReduceItem>& items) {
  const size_t members = static_cast<size_t>(group.size()), own = static_cast<size_t>(group.rank());
  CHECK(nodes.size() == members, "the frontier of each member");
  const Outgoing out = pack(members, items);
  int64_t flags = 0, floats = 0;  // that come from a member, for each node of its frontier
  visit_parts(items, own, [&](const ReduceItem&, int64_t, Span part) {
    ++flags;
    floats += part.size();
  });
  std::vector<int64_t> flag_counts, float_counts;
  for (const std::vector<TreeNode>& list : nodes) {
    flag_counts.push_back(flags * static_cast<int64_t>(list.size()));
    float_counts.push_back(floats * static_cast<int64_t>(list.size()));
  }
  const std::vector<uint8_t> present = exchange_runs(group, out.present, out.flags, flag_counts);
  const std::vector<float> values = exchange_runs(group, out.values, out.floats, float_counts);
  std::vector<size_t> flag_at(members, 0), float_at(members, 0);
  for (size_t m = 1; m < members; ++m) {
    flag_at[m] = flag_at[m - 1] + static_cast<size_t>(flag_counts[m - 1]);
    float_at[m] = float_at[m - 1] + static_cast<size_t>(float_counts[m - 1]);
  }
  std::vector<Values> roots(items.size());
  PartialCombiner combiner(0);
  visit_parts(items, own, [&](const ReduceItem& item, int64_t, Span part) {
    const size_t width = static_cast<size_t>(part.size());
    combiner.restart(width);
    for (size_t m = 0; m < members; ++m) {
      for (const TreeNode& node : nodes[m]) {
        if (present[flag_at[m]++] != 0) combiner.add(node, values.data() + float_at[m]);
        float_at[m] += width;
      }
    }
    Values& root = roots[static_cast<size_t>(&item - items.data())];
    root.resize(root.size() + width);
    combiner.finish(std::span(root).last(width));
  });
  return roots;
}

std::vector<Values> reduce_fixed(Communicator& group, const std::vector<FixedItem>& items) {
  const size_t members = static_cast<size_t>(group.size()), own = static_cast<size_t>(group.rank());
  std::vector<std::vector<int64_t>> source(members);
  for (size_t p = 0; p < members; ++p) {
    for (const FixedItem& item : items) {
      const auto sums = item.mine->sums().begin();
      source[p].insert(source[p].end(), sums + (*item.slices)[p].begin,
                       sums + (*item.slices)[p].end);
    }
  }
  std::vector<int64_t> total = source[own];
  if (members > 1) {
    std::vector<ConstBuffer> shares;
    for (const auto& share : source)
      shares.push_back(const_buffer(std::span<const int64_t>(share)));
    group.reduce_scatter(shares, buffer(std::span(total)), Reduction::kSum);
  }
  std::vector<Values> roots;
  size_t at = 0;
  for (const FixedItem& item : items) {
    Values root;
    for (int64_t i = 0; i < (*item.slices)[own].size(); ++i, ++at) {
      root.push_back(
          static_cast<float>(std::ldexp(static_cast<double>(total[at]), -item.mine->exponent())));
    }
    roots.push_back(std::move(root));
  }
  return roots;
}

}  // namespace isoshard::reference
