// See contraction.h.
#include "reference/contraction.h"

#include "core/check.h"

namespace isoshard::reference {
void outer_product(const float* a, int64_t rows, const float* b, int64_t columns, float* out) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) out[i * columns + j] = a[i] * b[j];
  }
}

Values transposed(Matrix m) {
  Values out(static_cast<size_t>(m.rows * m.columns));
  for (int64_t i = 0; i < m.rows; ++i) {
    for (int64_t j = 0; j < m.columns; ++j) {
      out[static_cast<size_t>(j * m.rows + i)] = m.values[i * m.columns + j];
    }
  }
  return out;
}

Values contract(Matrix a, Matrix b) {
  CHECK(a.rows == b.rows, "the summed axes differ");
  Values out(static_cast<size_t>(a.columns * b.columns));
  if (out.empty()) return out;
  TreeSum sum(out.size());
  for (int64_t k = 0; k < a.rows; ++k) {
    outer_product(a.values + k * a.columns, a.columns, b.values + k * b.columns, b.columns,
                  sum.push_leaf(static_cast<LeafIndex>(k)));
  }
  sum.finish(out);
  return out;
}

Values contract_over(Communicator& group, std::span<const Span> spans, Matrix a, Matrix b) {
  if (group.size() == 1) return contract(a, b);
  CHECK(a.rows == b.rows && static_cast<int>(spans.size()) == group.size(), "spans of the group");
  const size_t width = static_cast<size_t>(a.columns * b.columns);
  const auto owned = [&](int member) {
    const Span& span = spans[static_cast<size_t>(member)];
    return std::vector<LeafRange>{
        {static_cast<LeafIndex>(span.begin), static_cast<LeafIndex>(span.end)}};
  };
  PartialSum sum(frontier(owned(group.rank())), width);
  const int64_t first = spans[static_cast<size_t>(group.rank())].begin;
  for (int64_t k = 0; k < a.rows; ++k) {
    outer_product(a.values + k * a.columns, a.columns, b.values + k * b.columns, b.columns,
                  sum.push_leaf(static_cast<LeafIndex>(first + k)));
  }
  const Partial mine = sum.finish();
  std::vector<Values> received(spans.size());
  std::vector<Buffer> targets;
  std::vector<std::vector<TreeNode>> nodes;
  for (int member = 0; member < group.size(); ++member) {
    nodes.push_back(frontier(owned(member)));
    Values& values = received[static_cast<size_t>(member)];
    values.resize(nodes.back().size() * width);
    targets.push_back(buffer(std::span(values)));
  }
  group.all_gather(const_buffer(std::span<const float>(mine.values)), targets);
  PartialCombiner combiner(width);
  for (size_t member = 0; member < nodes.size(); ++member) {
    for (size_t k = 0; k < nodes[member].size(); ++k) {
      combiner.add(nodes[member][k], received[member].data() + k * width);
    }
  }
  Values out(width);
  combiner.finish(out);
  return out;
}

namespace {

// The tree over leaves 0, 1, …, n − 1, all of them there: a binary counter of finished nodes.
template <typename Leaf>
float dense_tree(size_t n, const Leaf& leaf) {
  float nodes[64];
  int depth = 0;
  for (size_t k = 0; k < n; ++k) {
    nodes[depth++] = leaf(k);
    for (size_t rest = k + 1; (rest & 1) == 0; rest >>= 1) {
      nodes[depth - 2] += nodes[depth - 1];
      --depth;
    }
  }
  for (; depth > 1; --depth) nodes[depth - 2] += nodes[depth - 1];
  return n == 0 ? 0.0f : nodes[0];
}

}  // namespace

float tree_total(std::span<const float> values) {
  return dense_tree(values.size(), [&](size_t k) { return values[k]; });
}

float tree_dot(std::span<const float> a, std::span<const float> b) {
  CHECK(a.size() == b.size(), "vectors of two lengths");
  return dense_tree(a.size(), [&](size_t k) { return a[k] * b[k]; });
}

}  // namespace isoshard::reference
