// See ulysses_layout.h.
#include "reference/ulysses_layout.h"

#include <algorithm>

#include "core/error.h"
#include "core/mutant.h"

namespace isoshard::reference {
namespace {

// Where (b, token, head) of a tensor with that many tokens and heads begins.
int64_t place(const UlyssesSizes& s, int64_t tokens, int64_t heads, int64_t b, int64_t token,
              int64_t head) {
  const int64_t row = (s.batch_dim_idx == 0) != mutant("ulysses_batch_axis") ? b * tokens + token
                                                                             : token * s.batch + b;
  return (row * heads + head) * s.size;
}

void check(const UlyssesSizes& s, const std::vector<Values>& tensors,
           const std::vector<int64_t>& counts) {
  const auto refuse = [](const std::string& what, const std::string& expected,
                         const std::string& found) {
    throw Error(
        ErrorInfo{.code = ErrorCode::kUsage, .what = what, .expected = expected, .found = found});
  };
  if (s.batch_dim_idx != 0 && s.batch_dim_idx != 1) {
    refuse("batch_dim_idx is none (DeepSpeed: AssertionError).", "0 or 1",
           std::to_string(s.batch_dim_idx));
  }
  if (tensors.size() != counts.size()) {
    refuse("There are other tensors than ranks.", std::to_string(counts.size()),
           std::to_string(tensors.size()));
  }
  for (size_t rank = 0; rank < tensors.size(); ++rank) {
    if (static_cast<int64_t>(tensors[rank].size()) == counts[rank] ||
        mutant("ulysses_sizes_unchecked"))
      continue;
    refuse("A rank's tensor has another size.", std::to_string(counts[rank]) + " elements",
           std::to_string(tensors[rank].size()));
  }
}

// The whole, [B, S, H, D] in the layout's order.
template <typename Visit>
void every_row(const UlyssesSizes& s, const Visit& visit) {
  const std::vector<Span> spans = head_spans(s.heads, s.ranks);
  const int64_t length = s.tokens * s.ranks;
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t g = 0; g < length; ++g) {
      for (size_t owner = 0; owner < spans.size(); ++owner) {
        for (int64_t head = spans[owner].begin; head < spans[owner].end; ++head) {
          visit(static_cast<size_t>(g / s.tokens),
                place(s, s.tokens, s.heads, b, g % s.tokens, head), owner,
                place(s, length, spans[owner].size(), b, g,
                      mutant("ulysses_head_order") ? spans[owner].end - 1 - head
                                                   : head - spans[owner].begin));
        }
      }
    }
  }
}

std::vector<int64_t> token_counts(const UlyssesSizes& s) {
  return std::vector<int64_t>(static_cast<size_t>(s.ranks), s.batch * s.tokens * s.heads * s.size);
}

std::vector<int64_t> head_counts(const UlyssesSizes& s) {
  std::vector<int64_t> counts;
  for (const Span& span : head_spans(s.heads, s.ranks)) {
    counts.push_back(s.batch * s.tokens * s.ranks * span.size() * s.size);
  }
  return counts;
}

std::vector<Values> empty(const std::vector<int64_t>& counts) {
  std::vector<Values> tensors;
  for (const int64_t count : counts) tensors.emplace_back(static_cast<size_t>(count));
  return tensors;
}

}  // namespace

std::vector<Span> head_spans(int64_t heads, int ranks) {
  std::vector<Span> spans;
  for (int rank = 0; rank < ranks; ++rank) spans.push_back(even_share(heads, ranks, rank));
  return spans;
}

std::vector<Values> scatter_heads(const UlyssesSizes& s, const std::vector<Values>& tensors) {
  check(s, tensors, token_counts(s));
  std::vector<Values> result = empty(head_counts(s));
  every_row(s, [&](size_t rank, int64_t from, size_t owner, int64_t to) {
    std::copy_n(tensors[rank].begin() + from, s.size, result[owner].begin() + to);
  });
  return result;
}

std::vector<Values> scatter_sequence(const UlyssesSizes& s, const std::vector<Values>& tensors) {
  check(s, tensors, head_counts(s));
  std::vector<Values> result = empty(token_counts(s));
  every_row(s, [&](size_t rank, int64_t to, size_t owner, int64_t from) {
    std::copy_n(tensors[owner].begin() + from, s.size, result[rank].begin() + to);
  });
  return result;
}

}  // namespace isoshard::reference
