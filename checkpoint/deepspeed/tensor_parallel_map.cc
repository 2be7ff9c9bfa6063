// Affine maps as files hold them: plain dictionaries, lists and ints (0.19.8).
#include <algorithm>
#include <charconv>

#include "checkpoint/deepspeed/tensor_parallel.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

constexpr int64_t kMapVersion = 1;

// A rank as an int, or as a string of one.
int64_t rank_of(const Fields& fields, NodeId key) {
  if (fields.pickle().kind(key) != Kind::kString) return fields.integer(key, "affine_map rank");
  const std::string& text = fields.pickle().text(key);
  int64_t rank = -1;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), rank);
  if (error != std::errc() || end != text.data() + text.size())
    fields.fail("A rank is not a number.", "affine_map", "a number", quote(text));
  return rank;
}

// [offset, strides].
int64_t read_address(const Fields& fields, NodeId node, const char* key, Shape* strides) {
  const std::vector<NodeId>& address = fields.list(node, key);
  if (address.size() != 2)
    fields.fail("An address in a map is malformed.", key, "[offset, strides]",
                std::to_string(address.size()) + " items");
  for (NodeId stride : fields.list(address[1], key))
    strides->push_back(fields.integer(stride, key));
  return fields.integer(address[0], key);
}

}  // namespace

void TensorParallelInfo::read_maps() {
  const NodeId node = fields_.maybe(info_, "affine_map");
  if (node == kNoNode) return;
  const int64_t version = fields_.integer(fields_.need(node, "version"), "affine_map version");
  if (version != kMapVersion) {
    throw Error(ErrorInfo{.code = ErrorCode::kUnsupported,
                          .what = "The affine maps have a version that is not known here "
                                  "(DeepSpeed 0.19.8: RuntimeError).",
                          .file = fields_.document().path(),
                          .entry = "universal_checkpoint_info affine_map version",
                          .expected = std::to_string(kMapVersion),
                          .found = std::to_string(version)});
  }
  const NodeId params = fields_.need(node, "params");
  if (!fields_.pickle().is_mapping(params))
    fields_.fail("A value has the wrong type.", "affine_map params", "dict", "another");
  const std::vector<NodeId>& entries = fields_.pickle().entries(params);
  for (size_t i = 0; i + 1 < entries.size(); i += 2) {
    maps_.add(fields_.text(entries[i], "affine_map params"), fields_.document().path());
    map_nodes_.push_back(entries[i + 1]);
  }
}

MapPiece TensorParallelInfo::read_piece(NodeId node, const std::string& name) const {
  const std::string what = "affine_map " + quote(name);
  const NodeId scale = fields_.maybe(node, "scale");
  const bool is_one = scale == kNoNode || (fields_.pickle().kind(scale) == Kind::kFloat &&
                                           fields_.pickle().real_value(scale) == 1.0);
  if (!is_one) {
    throw Error(ErrorInfo{.code = ErrorCode::kUnsupported,
                          .what = "A scaled piece of a map is not supported (DeepSpeed: "
                                  "NotImplementedError for the moments).",
                          .file = fields_.document().path(),
                          .entry = what});
  }
  MapPiece piece{.shape = fields_.shape(fields_.need(node, "shape"), what), .locations = {}};
  piece.source_offset =
      read_address(fields_, fields_.need(node, "source"), "source", &piece.source_stride);
  piece.dest_offset = read_address(fields_, fields_.need(node, "dest"), "dest", &piece.dest_stride);
  for (NodeId rank : fields_.list(fields_.need(node, "locations"), "locations")) {
    const int64_t number = fields_.integer(rank, "locations");
    if (number < 0 || number > 1'000'000)
      fields_.fail("A rank in a map is impossible.", what, "a rank", std::to_string(number));
    piece.locations.push_back(static_cast<int>(number));
  }
  return piece;
}

AffineMap TensorParallelInfo::read_map(NodeId node, const std::string& name) const {
  const std::string what = "affine_map " + quote(name);
  AffineMap map;
  map.logical_shape = fields_.shape(fields_.need(node, "logical_shape"), what);
  const NodeId ranks = fields_.need(node, "ranks");
  if (!fields_.pickle().is_mapping(ranks))
    fields_.fail("A value has the wrong type.", what, "dict", "another");
  const std::vector<NodeId>& entries = fields_.pickle().entries(ranks);
  map.ranks.resize(entries.size() / 2);
  std::vector<bool> seen(map.ranks.size(), false);
  for (size_t i = 0; i + 1 < entries.size(); i += 2) {
    const int64_t rank = rank_of(fields_, entries[i]);
    if (rank < 0 || rank >= static_cast<int64_t>(seen.size()) || seen[static_cast<size_t>(rank)])
      fields_.fail("A map names a rank twice, or leaves one out.", what,
                   "ranks 0 to " + std::to_string(seen.size() - 1), std::to_string(rank));
    seen[static_cast<size_t>(rank)] = true;
    RankMap& part = map.ranks[static_cast<size_t>(rank)];
    part.shard_shape = fields_.shape(fields_.need(entries[i + 1], "shard_shape"), what);
    for (NodeId piece : fields_.list(fields_.need(entries[i + 1], "pieces"), what))
      part.pieces.push_back(read_piece(piece, name));
  }
  return map;
}

}  // namespace isoshard::checkpoint
