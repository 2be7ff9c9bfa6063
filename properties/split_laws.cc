// See laws.h: core/affine_map.h and core/split_rules.h against the reference, for small sizes.
#include <algorithm>

#include "core/affine_map.h"
#include "core/split_rules.h"
#include "properties/laws.h"

namespace isoshard::properties {
namespace {

using reference::Bits;
using reference::Cut;
using reference::CutRule;

struct Trial {
  CutRule rule;
  Shape shape;
  int ranks = 1;
};

Widths widths_of(const Trial& trial, Mutant mutant) {
  const RemainderFirst rule{.kv_heads = trial.rule.heads, .grain = trial.rule.grain};
  std::vector<int64_t> totals = trial.rule.parts;
  if (trial.rule.cut != Cut::kParts) totals = {trial.shape[trial.rule.cut == Cut::kRow ? 1 : 0]};
  Widths widths;
  for (int64_t total : totals) {
    widths.push_back(mutant == Mutant::kCeilWidths ? ceil_widths(total, trial.ranks)
                                                   : split_widths(rule, total, trial.ranks, ""));
  }
  return widths;
}

AffineMap map_of(const Trial& trial, Mutant mutant) {
  if (trial.rule.cut == Cut::kWhole) return replicated_map(trial.shape, trial.ranks);
  const bool row = (trial.rule.cut == Cut::kRow) !=
                   (mutant == Mutant::kColumnForRow && trial.shape.size() == 2 &&
                    trial.shape[0] == trial.shape[1]);
  return split_map(trial.shape, row ? 1 : 0, widths_of(trial, mutant));
}

std::string check(const Trial& trial, Mutant mutant) {
  const std::string what =
      to_string(trial.shape) + " cut " + std::to_string(static_cast<int>(trial.rule.cut)) +
      " over " + std::to_string(trial.ranks) + " ranks, heads " + std::to_string(trial.rule.heads) +
      ", grain " + std::to_string(trial.rule.grain);
  const AffineMap map = map_of(trial, mutant);
  if (const std::string why = why_impossible(map); !why.empty()) return what + ": " + why;
  Bits whole(static_cast<size_t>(numel(trial.shape)));
  for (size_t i = 0; i < whole.size(); ++i) whole[i] = static_cast<uint32_t>(i);
  for (int rank = 0; rank < trial.ranks; ++rank) {
    const RankMap& part = map.ranks[static_cast<size_t>(rank)];
    if (part.shard_shape != reference::shard_shape(trial.rule, trial.shape, rank, trial.ranks))
      return what + ": another shape on rank " + std::to_string(rank);
    Bits found(static_cast<size_t>(numel(part.shard_shape)), 0xFFFFFFFF);
    for (const MapRun& run : shard_runs(part)) {
      for (int64_t k = 0; k < run.count; ++k)
        found.at(static_cast<size_t>(run.dest + k)) = static_cast<uint32_t>(run.source + k);
    }
    if (found != reference::shard(trial.rule, trial.shape, whole, rank, trial.ranks))
      return what + ": other elements on rank " + std::to_string(rank);
  }
  return "";
}

}  // namespace

std::string heads_keep_their_ratio(Mutant mutant) {
  for (int64_t kv_heads = 1; kv_heads <= 16; ++kv_heads) {
    for (int64_t group = 1; group <= 8; ++group) {
      for (int64_t size : {1, 2, 4}) {
        for (int ranks = 1; ranks <= 16; ++ranks) {
          const RemainderFirst rule{.kv_heads = mutant == Mutant::kCutHeads ? 0 : kv_heads};
          const auto widths = [&](int64_t heads, const char* layer) {
            return split_widths(rule, heads * size, ranks, layer);
          };
          const std::vector<int64_t> q =
              widths(group * kv_heads, "model.layers.0.self_attn.q_proj");
          const std::vector<int64_t> k = widths(kv_heads, "model.layers.0.self_attn.k_proj");
          for (size_t rank = 0; rank < q.size(); ++rank) {
            if (q[rank] == group * k[rank] && k[rank] % size == 0) continue;
            return std::to_string(kv_heads) + " key-value heads of " + std::to_string(size) + ", " +
                   std::to_string(group) + " query heads each, over " + std::to_string(ranks) +
                   " ranks: rank " + std::to_string(rank) + " has " + std::to_string(q[rank]) +
                   " rows of queries and " + std::to_string(k[rank]) + " of keys";
          }
        }
      }
    }
  }
  return "";
}

std::string splits_are_the_reference(const SplitSizes& sizes, Mutant mutant) {
  const int64_t largest = sizes.rows;
  const std::vector<CutRule> rules = {{Cut::kWhole}, {Cut::kColumn}, {Cut::kRow}, {Cut::kParts}};
  for (int64_t rows = 0; rows <= largest; ++rows) {
    for (const Shape& shape :
         {Shape{rows}, Shape{rows, 3}, Shape{3, rows}, Shape{rows, 2, 2}, Shape{rows, rows}}) {
      for (CutRule rule : rules) {
        if (rule.cut == Cut::kRow && shape.size() < 2) continue;
        if (rule.cut == Cut::kParts) rule.parts = {shape[0] / 2, shape[0] / 3, 0};
        if (rule.cut == Cut::kParts) rule.parts[2] = shape[0] - shape[0] / 2 - shape[0] / 3;
        if (shape == Shape{rows, rows} && rows > sizes.square) continue;
        for (int ranks = 1; ranks <= sizes.ranks; ++ranks) {
          for (int64_t heads : {0, 1, 2, 3, 4}) {
            for (int64_t grain : {1, 2, 4}) {
              rule.heads = heads;
              rule.grain = grain;
              const std::string reason = check({rule, shape, ranks}, mutant);
              if (!reason.empty()) return reason;
            }
          }
        }
      }
    }
  }
  return "";
}

}  // namespace isoshard::properties
