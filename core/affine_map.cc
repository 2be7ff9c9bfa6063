// See affine_map.h.
#include "core/affine_map.h"

#include <algorithm>
#include <numeric>

#include "core/check.h"
#include "core/mutant.h"

namespace isoshard {
namespace {

constexpr int64_t kMostRuns = 100'000'000;

// Sum of (extent − 1) · stride, so that offset + it is the last element; false on overflow.
bool last_element(const Shape& shape, int64_t offset, const Shape& stride, int64_t* last) {
  *last = offset;
  for (size_t i = 0; i < shape.size(); ++i) {
    int64_t reach = 0;
    if (__builtin_mul_overflow(shape[i] - 1, stride[i], &reach)) return false;
    if (__builtin_add_overflow(*last, reach, last)) return false;
  }
  return true;
}

// Products of the sizes behind each axis: unlike torch's strides, 0 where one of them is 0.
Shape row_major(const Shape& shape) {
  Shape stride(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) stride[i - 1] = stride[i] * shape[i];
  return stride;
}

std::string check_piece(const MapPiece& piece, int64_t whole, int64_t shard) {
  if (piece.source_stride.size() != piece.shape.size() ||
      piece.dest_stride.size() != piece.shape.size())
    return "a piece has other numbers of extents and strides";
  const std::optional<int64_t> count = checked_numel(piece.shape);
  if (!count) return "a piece has an impossible shape " + to_string(piece.shape);
  if (*count == 0) return "";
  for (size_t i = 0; i < piece.shape.size(); ++i) {
    if (piece.source_stride[i] < 0 || piece.dest_stride[i] < 0) return "a stride is negative";
  }
  int64_t source = 0, dest = 0;
  const bool fits = piece.source_offset >= 0 && piece.dest_offset >= 0 &&
                    last_element(piece.shape, piece.source_offset, piece.source_stride, &source) &&
                    last_element(piece.shape, piece.dest_offset, piece.dest_stride, &dest) &&
                    (source < whole || mutant("affine_bounds_dropped")) && dest < shard &&
                    *count <= shard;
  return fits ? "" : "a piece " + to_string(piece.shape) + " leaves its tensor";
}

// How many axes, from the first, are walked run by run, and the length of a run.
std::pair<size_t, int64_t> run_length(const MapPiece& piece) {
  int64_t run = 1;
  size_t outer = piece.shape.size();
  while (outer > 0) {
    const size_t i = outer - 1;
    const bool joined = piece.source_stride[i] == run && piece.dest_stride[i] == run;
    if (piece.shape[i] != 1 && !joined) break;
    run *= piece.shape[i];
    outer = i;
  }
  return {outer, run};
}

// Whether the first rank that a piece names holds the same block.
bool first_has_it(const AffineMap& map, const MapPiece& piece) {
  const RankMap& first = map.ranks[static_cast<size_t>(piece.locations.front())];
  return std::any_of(first.pieces.begin(), first.pieces.end(), [&](const MapPiece& other) {
    return other.shape == piece.shape && other.source_offset == piece.source_offset &&
           other.source_stride == piece.source_stride && other.locations == piece.locations;
  });
}

// Whether the ranges [first, first + second) tile [0, total), in any order.
bool tile(std::vector<std::pair<int64_t, int64_t>> ranges, int64_t total) {
  std::sort(ranges.begin(), ranges.end());
  int64_t next = 0;
  for (const auto& [begin, count] : ranges) {
    if (begin != next && !mutant("affine_hole_allowed")) return false;
    next += count;
  }
  return next == total;
}

}  // namespace

std::vector<MapRun> piece_runs(const MapPiece& piece) {
  if (numel(piece.shape) == 0) return {};
  const auto [outer, run] = run_length(piece);
  std::vector<MapRun> result;
  std::vector<int64_t> index(outer, 0);
  for (;;) {
    MapRun next{piece.source_offset, piece.dest_offset, run};
    for (size_t i = 0; i < outer; ++i) {
      next.source += index[i] * piece.source_stride[i];
      next.dest += index[i] * piece.dest_stride[i];
    }
    result.push_back(next);
    size_t i = outer;
    while (i > 0 && ++index[i - 1] == piece.shape[i - 1]) index[--i] = 0;
    if (i == 0) return result;
  }
}

std::vector<MapRun> shard_runs(const RankMap& rank) {
  std::vector<MapRun> result;
  for (const MapPiece& piece : rank.pieces) {
    const std::vector<MapRun> runs = piece_runs(piece);
    result.insert(result.end(), runs.begin(), runs.end());
  }
  std::sort(result.begin(), result.end(),
            [](const MapRun& a, const MapRun& b) { return a.dest < b.dest; });
  size_t last = 0;  // of the joined runs
  for (size_t i = 1; i < result.size(); ++i) {
    MapRun& before = result[last];
    if (before.source + before.count == result[i].source &&
        (before.dest + before.count == result[i].dest || mutant("affine_join_ignores_target")))
      before.count += result[i].count;
    else
      result[++last] = result[i];
  }
  if (!result.empty()) result.resize(last + 1);
  return result;
}

AffineMap replicated_map(const Shape& shape, int ranks) {
  MapPiece piece{.shape = shape,
                 .source_stride = row_major(shape),
                 .dest_stride = row_major(shape),
                 .locations = {}};
  for (int rank = 0; rank < ranks; ++rank) piece.locations.push_back(rank);
  AffineMap map{shape, {}};
  for (int rank = 0; rank < ranks; ++rank) map.ranks.push_back({shape, {piece}});
  return map;
}

AffineMap split_map(const Shape& shape, size_t dim, const Widths& widths) {
  CHECK(dim < shape.size() && !widths.empty(), "a split needs an axis and widths");
  AffineMap map{shape, {}};
  const Shape stride = row_major(shape);
  for (size_t rank = 0; rank < widths[0].size(); ++rank) {
    RankMap part;
    part.shard_shape = shape;
    part.shard_shape[dim] = 0;
    for (const std::vector<int64_t>& sub : widths) part.shard_shape[dim] += sub[rank];
    const Shape dest_stride = row_major(part.shard_shape);
    int64_t sub_begin = 0, dest = 0;
    for (const std::vector<int64_t>& sub : widths) {
      int64_t begin = sub_begin;
      for (size_t t = 0; t < sub.size(); ++t) {
        if (t < rank) begin += sub[t];
        sub_begin += sub[t];
      }
      MapPiece piece{.shape = shape,
                     .source_offset = begin * stride[mutant("affine_wrong_axis") ? 0 : dim],
                     .source_stride = stride,
                     .dest_offset = dest * dest_stride[dim],
                     .dest_stride = dest_stride,
                     .locations = {static_cast<int>(rank)}};
      piece.shape[dim] = sub[rank];
      dest += sub[rank];
      part.pieces.push_back(std::move(piece));
    }
    map.ranks.push_back(std::move(part));
  }
  return map;
}

int64_t total_width(const std::vector<int64_t>& sub) {
  return std::accumulate(sub.begin(), sub.end(), int64_t{0});
}

std::string widths_text(const Widths& widths) {
  std::string text;
  for (const std::vector<int64_t>& sub : widths)
    text += (text.empty() ? "" : ", ") + to_string(sub);
  return text;
}

bool is_replicated(const AffineMap& map) {
  return std::all_of(map.ranks.begin(), map.ranks.end(), [&](const RankMap& rank) {
    const MapPiece* piece = rank.pieces.size() == 1 ? rank.pieces.data() : nullptr;
    return piece != nullptr && rank.shard_shape == map.logical_shape &&
           piece->shape == map.logical_shape && piece->source_stride == piece->dest_stride &&
           piece->locations.size() == map.ranks.size();
  });
}

std::string why_impossible(const AffineMap& map) {
  const std::optional<int64_t> whole = checked_numel(map.logical_shape);
  if (!whole) return "an impossible shape " + to_string(map.logical_shape);
  std::vector<std::pair<int64_t, int64_t>> sources;
  int64_t runs = 0;
  for (size_t rank = 0; rank < map.ranks.size(); ++rank) {
    const std::string where = "rank " + std::to_string(rank) + ": ";
    const RankMap& part = map.ranks[rank];
    const std::optional<int64_t> shard = checked_numel(part.shard_shape);
    if (!shard) return where + "an impossible shard shape " + to_string(part.shard_shape);
    int64_t held = 0;
    for (const MapPiece& piece : part.pieces) {
      if (const std::string why = check_piece(piece, *whole, *shard); !why.empty())
        return where + why;
      held += numel(piece.shape);
      runs += numel(piece.shape) / std::max<int64_t>(run_length(piece).second, 1);
      if (runs > kMostRuns) return where + "it is cut into too many runs to be a tensor's split";
      if (held > *shard) return where + "its pieces hold more than the shard";
      const std::vector<int>& at = piece.locations;
      if (at.empty() || !std::is_sorted(at.begin(), at.end()) || at.front() < 0 ||
          static_cast<size_t>(at.back()) >= map.ranks.size() ||
          !(mutant("affine_extra_location") ||
            std::binary_search(at.begin(), at.end(), static_cast<int>(rank))))
        return where + "a piece does not name the ranks that hold it";
      if (!first_has_it(map, piece)) return where + "a replica is not on the rank that it names";
    }
    std::vector<std::pair<int64_t, int64_t>> dests;
    for (const MapPiece& piece : part.pieces) {
      for (const MapRun& run : piece_runs(piece)) {
        dests.emplace_back(run.dest, run.count);
        if (piece.locations.front() == static_cast<int>(rank) || mutant("affine_replica_twice"))
          sources.emplace_back(run.source, run.count);
      }
    }
    if (!tile(std::move(dests), *shard)) return where + "its pieces leave a hole or overlap";
  }
  return tile(std::move(sources), *whole)
             ? ""
             : "the ranks' pieces leave a hole in the whole or overlap";
}

}  // namespace isoshard
