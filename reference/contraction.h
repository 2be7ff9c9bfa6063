// Products whose sums run in the canonical order: y = x·wᵀ and its gradients, whole or with the
// summed axis shared by ranks. All matrices are row-major float32.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/canonical_sum.h"
#include "core/communicator.h"
#include "reference/model.h"

namespace isoshard::reference {

using Values = std::vector<float>;

struct Matrix {
  const float* values = nullptr;
  int64_t rows = 0;
  int64_t columns = 0;
};

Values transposed(Matrix m);

// out[i, j] = a[i] · b[j].
void outer_product(const float* a, int64_t rows, const float* b, int64_t columns, float* out);

// out[i, j] = Σ_k a[k, i] · b[k, j], leaf k; a and b have as many rows. Tier B.
Values contract(Matrix a, Matrix b);

// The same where the rows of a and b are leaves spans[group.rank()] of a longer sum, whose other
// leaves lie on the other members. Every member gets the whole sum. One all_gather of the members'
// frontier nodes; none in a group of one.
Values contract_over(Communicator& group, std::span<const Span> spans, Matrix a, Matrix b);

// Σ_k values[k], leaf k.
float tree_total(std::span<const float> values);
// Σ_k a[k] · b[k], leaf k.
float tree_dot(std::span<const float> a, std::span<const float> b);

}  // namespace isoshard::reference
