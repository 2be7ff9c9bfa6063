// See split_rules.h.
#include "core/split_rules.h"

#include <algorithm>

#include "core/check.h"
#include "core/mutant.h"

namespace isoshard {
namespace {

bool contains(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

// Layers whose axis is not made of heads, by their names.
bool is_headless(const std::string& layer) {
  if (layer == "lm_head" || layer == "embed_out") return true;
  for (const char* part : {"mlp", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}) {
    if (contains(layer, part)) return true;
  }
  return false;
}

// `units` units over the ranks, the first ranks taking one more.
std::vector<int64_t> share(int64_t units, int ranks) {
  std::vector<int64_t> result(static_cast<size_t>(ranks), units / ranks);
  for (int64_t t = 0; t < units % ranks; ++t)
    ++result[static_cast<size_t>(mutant("split_remainder_last") ? ranks - 1 - t : t)];
  return result;
}

}  // namespace

std::vector<int64_t> split_widths(const RemainderFirst& rule, int64_t total, int ranks,
                                  const std::string& layer) {
  CHECK(total >= 0 && ranks > 0 && rule.grain > 0 && rule.kv_heads >= 0, "an impossible split");
  const int64_t heads = rule.kv_heads;
  std::vector<int64_t> widths;
  if (heads > 0 && !mutant("split_heads_cut") && total % heads == 0 &&
      (mutant("split_headless_by_heads") || !is_headless(layer))) {
    widths = share(heads, ranks);
    for (int64_t& width : widths) width = total / heads * width;
  } else if (total >= rule.grain) {
    widths = share(total / rule.grain, ranks);
    for (int64_t& width : widths) width *= rule.grain;
    (mutant("split_grain_rest_first") ? widths.front() : widths.back()) += total % rule.grain;
  } else {
    widths = share(total, ranks);
  }
  return widths;
}

std::vector<int64_t> ceil_widths(int64_t total, int ranks) {
  CHECK(total >= 0 && ranks > 0, "an impossible split");
  const int64_t step = (total + (mutant("ceil_widths_floor") ? 0 : ranks - 1)) / ranks;
  std::vector<int64_t> widths;
  for (int64_t t = 0; t < ranks; ++t)
    widths.push_back(std::clamp<int64_t>(total - t * step, 0, step));
  return widths;
}

}  // namespace isoshard
