// See explain.h. Cheap questions come first, the search for runs last.
#include "reshard/explain.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <optional>

#include "checkpoint/cancel.h"
#include "core/cast.h"
#include "reshard/run_cover.h"
#include "reshard/window_index.h"

namespace isoshard::reshard {
namespace {

constexpr int64_t kMaxTranspose = 16 << 20;  // elements; both tensors are held in memory
constexpr size_t kShownRuns = 8;

// Calls visit(bytes) for pieces of the tensor, until it returns false; true if it never did.
template <typename Visit>
bool all_pieces(const TensorValues& values, const Visit& visit) {
  const int64_t size = values.size_elements(), step = 1 << 16;
  for (int64_t begin = 0; begin < size; begin += step) {
    checkpoint::throw_if_cancelled();
    const int64_t count = std::min(step, size - begin);
    if (!visit(begin, read_elements(values, begin, count))) return false;
  }
  return true;
}

bool is_all_zero(const TensorValues& values) {
  return all_pieces(values, [](int64_t, const std::vector<std::byte>& bytes) {
    return std::all_of(bytes.begin(), bytes.end(), [](std::byte b) { return b == std::byte{0}; });
  });
}

// "the same tensor with bit 14 flipped in 2 elements", when one bit makes all the difference.
std::string flipped_bit(const TensorValues& found, const TensorValues& own) {
  const auto item = static_cast<size_t>(item_size_bytes(found.dtype));
  if (item > sizeof(uint64_t)) return "";
  uint64_t mask = 0;
  int64_t flips = 0;
  const bool one_bit = all_pieces(found, [&](int64_t begin, const std::vector<std::byte>& bytes) {
    const std::vector<std::byte> other =
        read_elements(own, begin, static_cast<int64_t>(bytes.size() / item));
    for (size_t at = 0; at < bytes.size(); at += item) {
      uint64_t x = 0, y = 0;
      std::memcpy(&x, bytes.data() + at, item);
      std::memcpy(&y, other.data() + at, item);
      if (x == y) continue;
      if (std::popcount(x ^ y) != 1 || (mask != 0 && mask != (x ^ y))) return false;
      mask = x ^ y;
      ++flips;
    }
    return true;
  });
  if (!one_bit || flips == 0) return "";
  return "the same tensor with bit " + std::to_string(std::countr_zero(mask)) + " flipped in " +
         (flips == 1 ? "one element" : std::to_string(flips) + " elements");
}

std::string casts(const TensorValues& found, const TensorValues& own) {
  if (own.dtype != found.dtype && can_cast(own.dtype, found.dtype) &&
      same_values(cast_values(own, found.dtype), found)) {
    return std::string("the same tensor cast to ") + name(found.dtype);
  }
  for (const DType narrow : {DType::kBFloat16, DType::kFloat16}) {
    const bool possible = is_floating(own.dtype) && narrow != own.dtype &&
                          can_cast(own.dtype, narrow) && can_cast(narrow, found.dtype);
    if (!possible) continue;
    if (!same_values(cast_values(cast_values(own, narrow), found.dtype), found)) continue;
    return std::string("the same tensor cast to ") + name(narrow) + " and back";
  }
  return "";
}

// Rows and columns exchanged: `found` holds what transposing `rows` × `columns` values gives.
bool is_transpose(const TensorValues& found, const TensorValues& own, int64_t rows) {
  const auto item = static_cast<size_t>(item_size_bytes(own.dtype));
  const int64_t columns = own.size_elements() / rows;
  const std::vector<std::byte> x = read_elements(own, 0, own.size_elements());
  const std::vector<std::byte> y = read_elements(found, 0, own.size_elements());
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      const auto at = static_cast<size_t>(row * columns + column) * item;
      const auto other = static_cast<size_t>(column * rows + row) * item;
      if (std::memcmp(x.data() + at, y.data() + other, item) != 0) return false;
    }
  }
  return true;
}

std::string transposed(const TensorValues& found, const TensorValues& own) {
  const int64_t size = own.size_elements();
  const bool matrix = own.shape.size() == 2 && own.dtype == found.dtype && size > 0 &&
                      found.size_elements() == size && size <= kMaxTranspose;
  if (!matrix) return "";
  if (is_transpose(found, own, own.shape[0])) return "the transpose of the same tensor";
  if (is_transpose(found, own, own.shape[1])) {
    return "the same tensor, its bytes taken as those of its transpose";
  }
  return "";
}

std::string range_text(const Run& run) {
  return "[" + std::to_string(run.begin) + ":" + std::to_string(run.begin + run.count) + "]";
}

}  // namespace

bool same_values(const TensorValues& a, const TensorValues& b) {
  const int64_t size = a.size_elements();
  return a.dtype == b.dtype && size == b.size_elements() && common_run({a, 0}, {b, 0}) == size;
}

Explainer::Explainer(std::vector<TensorValues> originals) : originals_(std::move(originals)) {}
Explainer::~Explainer() = default;

int Explainer::find(const std::string& name, const std::string& state) const {
  for (size_t i = 0; i < originals_.size(); ++i) {
    if (originals_[i].name == name && originals_[i].state == state) return static_cast<int>(i);
  }
  return -1;
}

std::string Explainer::explain(const TensorValues& found) {
  if (found.size_elements() == 0) return kNoExplanation;
  if (is_all_zero(found)) return "zeros";
  const int own = find(found.name, found.state);
  if (own >= 0) {
    const std::string text = explain_by_own(found, originals_[static_cast<size_t>(own)]);
    if (!text.empty()) return text;
  }
  const std::string text = is_floating(found.dtype) ? explain_by_runs(found, own) : "";
  return text.empty() ? kNoExplanation : text;
}

std::string Explainer::explain_by_own(const TensorValues& found, const TensorValues& own) const {
  if (own.size_elements() == found.size_elements()) {
    if (own.dtype == found.dtype) {
      if (std::string text = flipped_bit(found, own); !text.empty()) return text;
    }
    if (std::string text = casts(found, own); !text.empty()) return text;
  }
  for (const TensorValues& other : originals_) {
    if (other.name != own.name || other.state == own.state) continue;
    if (same_values(other, found)) return "the " + other.state + " of the same parameter";
  }
  return transposed(found, own);
}

std::string Explainer::explain_by_runs(const TensorValues& found, int own) {
  std::unique_ptr<WindowIndex>& index = indices_[found.dtype];
  if (!index) index = std::make_unique<WindowIndex>(originals_, found.dtype);
  const std::optional<std::vector<Run>> runs = cover_with_runs(originals_, *index, found, own);
  if (!runs) return "";
  std::string text;
  int64_t at = 0;
  for (size_t i = 0; i < runs->size(); ++i) {
    const Run& run = (*runs)[i];
    const bool shown = i < kShownRuns;
    if (shown && i > 0) text += " + ";
    if (run.tensor < 0) {
      const std::string value = element_text(found.dtype, read_elements(found, at, 1));
      const bool padding = i > 0 && i + 1 == runs->size() && value == "0";
      if (shown) text += std::to_string(run.count) + " times " + value;
      if (shown && padding) text += " (as padding has)";
    } else if (shown) {
      const TensorValues& values = originals_[static_cast<size_t>(run.tensor)];
      if (values.state != found.state) text += values.state + " of ";
      text += plain_name(values.name) + range_text(run);
    }
    at += run.count;
  }
  if (runs->size() > kShownRuns) {
    text += " + further runs, " + std::to_string(runs->size()) + " in all";
  }
  const Run& first = runs->front();
  if (own >= 0 && first.tensor == own && first.begin != 0) {
    return "the same tensor shifted by " + std::to_string(first.begin) + ": " + text;
  }
  return text;
}

}  // namespace isoshard::reshard
