// See experts.h.
#include "reference/experts.h"

#include <algorithm>
#include <numeric>

#include "core/check.h"
#include "core/exact_math.h"
#include "core/mutant.h"
#include "reference/activation.h"

namespace isoshard::reference {
namespace {

constexpr int64_t kMostTokens = int64_t{1} << 32;  // that one rank can have sent

// x [n, in] · w [out, in]ᵀ.
Values linear(const Values& x, int64_t n, const float* w, int64_t out, int64_t in) {
  return contract({transposed({x.data(), n, in}).data(), in, n},
                  {transposed({w, out, in}).data(), in, out});
}

// dx = dy [n, out] · w [out, in].
Values linear_backward(const Values& dy, int64_t n, const float* w, int64_t out, int64_t in) {
  return contract({transposed({dy.data(), n, out}).data(), out, n}, {w, out, in});
}

}  // namespace

Routing route(const Values& logits, int64_t tokens, int64_t experts, int64_t top_k) {
  Routing routing;
  std::vector<int64_t> order(static_cast<size_t>(experts));
  for (int64_t t = 0; t < tokens; ++t) {
    const float* row = logits.data() + t * experts;
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return row[a] > row[b]; });
    const float most = row[order[0]];
    std::vector<int64_t> chosen(order.begin(), order.begin() + top_k);
    std::sort(chosen.begin(), chosen.end());
    Values exponentials;
    for (const int64_t e : chosen) {
      exponentials.push_back(static_cast<float>(exact::exp(static_cast<double>(row[e] - most))));
    }
    const float total = mutant("router_counts_all_experts") ? 1.0f : tree_total(exponentials);
    for (size_t k = 0; k < chosen.size(); ++k) {
      routing.expert.push_back(chosen[k]);
      routing.weight.push_back(exponentials[k] / total);
    }
  }
  return routing;
}

Values route_backward(const Routing& routing, const Values& weight_gradient, int64_t tokens,
                      int64_t experts, int64_t top_k) {
  Values out(static_cast<size_t>(tokens * experts), 0.0f);
  for (int64_t t = 0; t < tokens; ++t) {
    const size_t at = static_cast<size_t>(t * top_k), k = static_cast<size_t>(top_k);
    const std::span<const float> r = std::span(routing.weight).subspan(at, k);
    const std::span<const float> dr = std::span(weight_gradient).subspan(at, k);
    const float mean = tree_dot(r, dr);
    for (size_t i = 0; i < k; ++i) {
      out[static_cast<size_t>(t * experts + routing.expert[at + i])] = r[i] * (dr[i] - mean);
    }
  }
  return out;
}

Span lane_tokens(int64_t tokens, int lanes, int lane) {
  return {tokens * lane / lanes, tokens * (lane + 1) / lanes};
}

// own: [own lane's tokens, k, hidden] → [tokens, k, hidden].
Values Experts::gather_lanes(const Values& own, int64_t tokens) const {
  if (tensor_.size() == 1) return own;
  const int64_t width = shape_.top_k * shape_.hidden;
  Values all(static_cast<size_t>(tokens * width));
  std::vector<Buffer> targets;
  for (int lane = 0; lane < tensor_.size(); ++lane) {
    const Span span = lane_tokens(tokens, tensor_.size(), lane);
    targets.push_back(buffer(std::span(all).subspan(static_cast<size_t>(span.begin * width),
                                                    static_cast<size_t>(span.size() * width))));
  }
  tensor_.all_gather(const_buffer(std::span<const float>(own)), targets);
  return all;
}

// Sends the tokens of this rank's lane to their experts, and sorts what comes to this rank's.
void Experts::dispatch(const Values& x, const std::vector<LeafIndex>& leaves) {
  const int64_t h = shape_.hidden, k = shape_.top_k;
  const size_t members = static_cast<size_t>(expert_.size());
  const int64_t each = shape_.experts / expert_.size();
  sent_.assign(members, {});
  std::vector<std::vector<int64_t>> labels(members);  // expert on that rank, leaf
  std::vector<std::vector<float>> rows(members);
  const Span lane = lane_tokens(tokens_, tensor_.size(), tensor_.rank());
  for (int64_t slot = lane.begin * k; slot < lane.end * k; ++slot) {
    const int64_t expert = routing_.expert[static_cast<size_t>(slot)], t = slot / k;
    const size_t to = static_cast<size_t>(
        mutant("experts_take_neighbours") ? expert % expert_.size() : expert / each);
    sent_[to].push_back(slot);
    labels[to].push_back(expert % each);
    labels[to].push_back(static_cast<int64_t>(leaves[static_cast<size_t>(t)]));
    rows[to].insert(rows[to].end(), x.begin() + t * h, x.begin() + (t + 1) * h);
  }
  received_.assign(members, static_cast<int64_t>(sent_[0].size()));
  if (members > 1) {
    std::vector<std::vector<int64_t>> counts;
    for (const auto& list : sent_) counts.push_back({static_cast<int64_t>(list.size())});
    const auto theirs = exchange(expert_, counts, std::vector<int64_t>(members, 1));
    std::vector<int64_t> label_counts, row_counts;
    for (size_t p = 0; p < members; ++p) {
      received_[p] = theirs[p][0];
      CHECK(received_[p] >= 0 && received_[p] < kMostTokens, "a count of tokens from another rank");
      label_counts.push_back(2 * received_[p]);
      row_counts.push_back(h * received_[p]);
    }
    labels = exchange(expert_, labels, label_counts);
    rows = exchange(expert_, rows, row_counts);
  }
  work_.assign(static_cast<size_t>(each), {});
  for (size_t p = 0; p < members; ++p) {
    for (int64_t i = 0; i < received_[p]; ++i) {
      const size_t at = static_cast<size_t>(2 * i);
      CHECK(labels[p][at] >= 0 && labels[p][at] < each, "a token for an expert of another rank");
      work_[static_cast<size_t>(labels[p][at])].items.push_back(
          {static_cast<int>(p), i, static_cast<LeafIndex>(labels[p][at + 1])});
    }
  }
  for (Work& work : work_) {
    std::sort(work.items.begin(), work.items.end(),
              [](const auto& a, const auto& b) { return a.leaf < b.leaf; });
    for (const Work::Item& item : work.items) {
      const float* row = rows[static_cast<size_t>(item.source)].data() + item.place * h;
      work.x.insert(work.x.end(), row, row + h);
    }
  }
}

// Rows for the senders, in the order in which their tokens came: back to them, and over the lanes.
Values Experts::bring_back(std::vector<std::vector<float>> answers) {
  const int64_t h = shape_.hidden, k = shape_.top_k;
  const size_t members = static_cast<size_t>(expert_.size());
  if (members > 1) {
    std::vector<int64_t> counts;
    for (const auto& list : sent_) counts.push_back(static_cast<int64_t>(list.size()) * h);
    answers = exchange(expert_, answers, counts);
  }
  const Span lane = lane_tokens(tokens_, tensor_.size(), tensor_.rank());
  Values own(static_cast<size_t>(lane.size() * k * h));
  for (size_t p = 0; p < members; ++p) {
    for (size_t i = 0; i < sent_[p].size(); ++i) {
      std::copy_n(answers[p].begin() + static_cast<int64_t>(i) * h, h,
                  own.begin() + (sent_[p][i] - lane.begin * k) * h);
    }
  }
  return gather_lanes(own, tokens_);
}

Values Experts::forward(const Values& x, const std::vector<LeafIndex>& leaves,
                        const Routing& routing, const ExpertWeights& weights) {
  const int64_t h = shape_.hidden, f = shape_.intermediate;
  tokens_ = static_cast<int64_t>(leaves.size());
  routing_ = routing;
  dispatch(x, leaves);
  std::vector<std::vector<float>> answers;
  for (const int64_t count : received_) answers.emplace_back(static_cast<size_t>(count * h));
  for (size_t e = 0; e < work_.size(); ++e) {
    Work& work = work_[e];
    const int64_t n = static_cast<int64_t>(work.items.size()), expert = static_cast<int64_t>(e);
    work.h1 = linear(work.x, n, weights.w1 + expert * f * h, f, h);
    work.h3 = linear(work.x, n, weights.w3 + expert * f * h, f, h);
    for (size_t i = 0; i < work.h1.size(); ++i) {
      work.active.push_back(silu(work.h1[i]) * work.h3[i]);
    }
    const Values y = linear(work.active, n, weights.w2 + expert * h * f, h, f);
    for (int64_t i = 0; i < n; ++i) {
      const Work::Item& item = work.items[static_cast<size_t>(i)];
      std::copy_n(y.begin() + i * h, h,
                  answers[static_cast<size_t>(item.source)].begin() + item.place * h);
    }
  }
  return bring_back(std::move(answers));
}

Values Experts::backward(const Values& gradient, const ExpertWeights& weights,
                         const ExpertSink& sink) {
  const int64_t h = shape_.hidden, f = shape_.intermediate;
  const size_t members = static_cast<size_t>(expert_.size());
  std::vector<std::vector<float>> rows(members);
  for (size_t p = 0; p < members; ++p) {
    for (const int64_t slot : sent_[p]) {
      rows[p].insert(rows[p].end(), gradient.begin() + slot * h, gradient.begin() + (slot + 1) * h);
    }
  }
  std::vector<int64_t> counts;
  for (size_t p = 0; p < members; ++p) counts.push_back(received_[p] * h);
  if (members > 1) rows = exchange(expert_, rows, counts);
  std::vector<std::vector<float>> answers(members);
  for (size_t p = 0; p < members; ++p) answers[p].resize(static_cast<size_t>(received_[p] * h));
  for (size_t e = 0; e < work_.size(); ++e) {
    const Work& work = work_[e];
    const int64_t n = static_cast<int64_t>(work.items.size());
    const int64_t expert = static_cast<int64_t>(e);
    Values dy;
    for (const Work::Item& item : work.items) {
      const float* row = rows[static_cast<size_t>(item.source)].data() + item.place * h;
      dy.insert(dy.end(), row, row + h);
    }
    const Values da = linear_backward(dy, n, weights.w2 + expert * h * f, h, f);
    Values d1(da.size()), d3(da.size());
    for (size_t i = 0; i < da.size(); ++i) {
      d1[i] = da[i] * work.h3[i] * silu_gradient(work.h1[i]);
      d3[i] = da[i] * silu(work.h1[i]);
    }
    for (int64_t i = 0; i < n; ++i) {
      const LeafIndex leaf = work.items[static_cast<size_t>(i)].leaf;
      const float* x = work.x.data() + i * h;
      outer_product(d1.data() + i * f, f, x, h, sink(1, expert, leaf));
      outer_product(dy.data() + i * h, h, work.active.data() + i * f, f, sink(2, expert, leaf));
      outer_product(d3.data() + i * f, f, x, h, sink(3, expert, leaf));
    }
    const Values dx1 = linear_backward(d1, n, weights.w1 + expert * f * h, f, h);
    const Values dx3 = linear_backward(d3, n, weights.w3 + expert * f * h, f, h);
    for (int64_t i = 0; i < n; ++i) {
      const Work::Item& item = work.items[static_cast<size_t>(i)];
      for (int64_t c = 0; c < h; ++c) {
        const size_t at = static_cast<size_t>(i * h + c);
        answers[static_cast<size_t>(item.source)][static_cast<size_t>(item.place * h + c)] =
            dx1[at] + dx3[at];
      }
    }
  }
  return bring_back(std::move(answers));
}

}  // namespace isoshard::reference
