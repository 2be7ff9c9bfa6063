// See attention.h.
#include "reference/attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/check.h"
#include "core/exact_math.h"
#include "core/mutant.h"

namespace isoshard::reference {
namespace {

// Number of the document that each token belongs to.
std::vector<int> documents(const HeadInputs& in) {
  std::vector<int> result(static_cast<size_t>(in.length), 0);
  if (in.positions.empty()) return result;
  CHECK(in.positions.size() == result.size(), "a position for each token");
  int document = 0;
  for (size_t i = 0; i < result.size(); ++i) {
    if (i > 0 && in.positions[i] == 0 && !mutant("attention_across_documents")) ++document;
    result[i] = document;
  }
  return result;
}

// Keys [begin, end) that query i sees.
Span seen_by(const std::vector<int>& document, int64_t i, bool causal) {
  Span span{i, i + 1};
  const int64_t length = static_cast<int64_t>(document.size());
  const int own = document[static_cast<size_t>(i)];
  while (span.begin > 0 && document[static_cast<size_t>(span.begin - 1)] == own) --span.begin;
  while ((!causal || mutant("attention_sees_ahead")) && span.end < length &&
         document[static_cast<size_t>(span.end)] == own)
    ++span.end;
  return span;
}

float scale_of(int64_t size) {
  return mutant("attention_unscaled") ? 1.0f : 1.0f / std::sqrt(static_cast<float>(size));
}

std::span<const float> row(const float* matrix, int64_t i, int64_t size) {
  return {matrix + i * size, static_cast<size_t>(size)};
}

}  // namespace

HeadOutputs attention_forward(const HeadInputs& in) {
  const int64_t s = in.length, d = in.size;
  HeadOutputs out{Values(static_cast<size_t>(s * d)), Values(static_cast<size_t>(s * s), 0.0f)};
  const std::vector<int> document = documents(in);
  const float scale = scale_of(d);
  TreeSum sum(static_cast<size_t>(d) + 1);  // p_ij v_j, and p_ij
  Values root(static_cast<size_t>(d) + 1);
  for (int64_t i = 0; i < s; ++i) {
    const Span seen = seen_by(document, i, in.causal);
    float* p = out.probabilities.data() + i * s;
    float most = -std::numeric_limits<float>::infinity();
    for (int64_t j = seen.begin; j < seen.end; ++j) {
      p[j] = tree_dot(row(in.query, i, d), row(in.key, j, d)) * scale;
      most = std::max(most, p[j]);
    }
    for (int64_t j = seen.begin; j < seen.end; ++j) {
      p[j] = static_cast<float>(exact::exp(static_cast<double>(p[j] - most)));
      float* leaf = sum.push_leaf(static_cast<LeafIndex>(j));
      for (int64_t c = 0; c < d; ++c) leaf[c] = p[j] * in.value[j * d + c];
      leaf[d] = p[j];
    }
    sum.finish(root);
    for (int64_t c = 0; c < d; ++c) {
      out.context[static_cast<size_t>(i * d + c)] =
          root[static_cast<size_t>(c)] / root[static_cast<size_t>(d)];
    }
    for (int64_t j = seen.begin; j < seen.end; ++j) p[j] = p[j] / root[static_cast<size_t>(d)];
  }
  return out;
}

HeadGradients attention_backward(const HeadInputs& in, const HeadOutputs& out,
                                 const float* context_gradient) {
  const int64_t s = in.length, d = in.size;
  const size_t numel = static_cast<size_t>(s * d);
  HeadGradients result{Values(numel), Values(numel), Values(numel)};
  const std::vector<int> document = documents(in);
  const float scale = scale_of(d);
  Values ds(static_cast<size_t>(s * s), 0.0f);
  TreeSum sum(static_cast<size_t>(d));
  for (int64_t i = 0; i < s; ++i) {
    const Span seen = seen_by(document, i, in.causal);
    const float delta = tree_dot(row(context_gradient, i, d), row(out.context.data(), i, d));
    for (int64_t j = seen.begin; j < seen.end; ++j) {
      const float dp = tree_dot(row(context_gradient, i, d), row(in.value, j, d));
      float& cell = ds[static_cast<size_t>(i * s + j)];
      cell = out.probabilities[static_cast<size_t>(i * s + j)] * (dp - delta);
      float* leaf = sum.push_leaf(static_cast<LeafIndex>(j));
      for (int64_t c = 0; c < d; ++c) leaf[c] = cell * in.key[j * d + c];
    }
    const std::span<float> dq(result.query.data() + i * d, static_cast<size_t>(d));
    sum.finish(dq);
    for (float& value : dq) value *= scale;
  }
  TreeSum pair(2 * static_cast<size_t>(d));  // dk_j, dv_j
  Values root(2 * static_cast<size_t>(d));
  for (int64_t j = 0; j < s; ++j) {
    for (int64_t i = 0; i < s; ++i) {
      const Span seen = seen_by(document, i, in.causal);
      if (j < seen.begin || j >= seen.end) continue;
      float* leaf = pair.push_leaf(static_cast<LeafIndex>(i));
      const float p = out.probabilities[static_cast<size_t>(i * s + j)];
      for (int64_t c = 0; c < d; ++c) {
        leaf[c] = ds[static_cast<size_t>(i * s + j)] * in.query[i * d + c];
        leaf[d + c] = p * context_gradient[i * d + c];
      }
    }
    pair.finish(root);
    for (int64_t c = 0; c < d; ++c) {
      result.key[static_cast<size_t>(j * d + c)] = root[static_cast<size_t>(c)] * scale;
      result.value[static_cast<size_t>(j * d + c)] = root[static_cast<size_t>(d + c)];
    }
  }
  return result;
}

Rotation::Rotation(int64_t head_size, int64_t positions, double theta) : half_(head_size / 2) {
  for (int64_t position = 0; position < positions; ++position) {
    for (int64_t c = 0; c < half_; ++c) {
      const double frequency = exact::exp(-exact::log(theta) * (2.0 * static_cast<double>(c)) /
                                          static_cast<double>(head_size));
      const auto [sine, cosine] = exact::sine_cosine(static_cast<double>(position) * frequency);
      sines_.push_back(static_cast<float>(sine));
      cosines_.push_back(static_cast<float>(cosine));
    }
  }
}

void Rotation::apply(float* head, int64_t position, bool backward) const {
  for (int64_t c = 0; c < half_; ++c) {
    const size_t at = static_cast<size_t>(position * half_ + c);
    const float s = backward ? -sines_[at] : sines_[at], k = cosines_[at];
    const float a = head[c], b = head[c + half_];
    head[c] = a * k - b * s;
    head[c + half_] = b * k + a * s;
  }
}

}  // namespace isoshard::reference
