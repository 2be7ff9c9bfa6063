// See rank_reader.h.
#include "engine/rank_reader.h"

#include "checkpoint/format/crc.h"
#include "core/cast.h"
#include "core/error.h"

namespace isoshard::engine {

using Json = nlohmann::ordered_json;
using checkpoint::Fields;
using checkpoint::NodeId;
using checkpoint::TensorView;

Json json_of(const checkpoint::Pickle& pickle, NodeId node, int depth, int64_t* left) {
  using checkpoint::Kind;
  if (--*left < 0 || depth > 64) {
    throw Error(ErrorInfo{.code = ErrorCode::kLimit,
                          .what = "The client state is too large or nested too deep.",
                          .expected = "up to 100000 values, 64 levels deep"});
  }
  switch (pickle.kind(node)) {
    case Kind::kNone:
      return nullptr;
    case Kind::kBool:
      return pickle.integer_value(node) != 0;
    case Kind::kInt:
      return pickle.integer_value(node);
    case Kind::kFloat:
      return pickle.real_value(node);
    case Kind::kString:
      *left -= static_cast<int64_t>(pickle.text(node).size()) / 64;  // a long text is many values
      return pickle.text(node);
    case Kind::kTuple:
    case Kind::kList: {
      Json list = Json::array();
      for (const NodeId item : pickle.items(node)) {
        list.push_back(json_of(pickle, item, depth + 1, left));
      }
      return list;
    }
    case Kind::kDict: {
      const std::vector<NodeId>& entries = pickle.items(node);
      Json::object_t object;
      object.reserve(entries.size() / 2);
      for (size_t i = 0; i + 1 < entries.size(); i += 2) {
        const Json key = json_of(pickle, entries[i], depth + 1, left);
        const std::string text = key.is_string()
                                     ? key.get<std::string>()
                                     : key.dump(-1, ' ', false, Json::error_handler_t::replace);
        object[text] = json_of(pickle, entries[i + 1], depth + 1, left);
      }
      return Json(std::move(object));
    }
    default:
      break;
  }
  return "<" + std::string(checkpoint::name(pickle.kind(node))) + ">";
}

std::vector<float> RankReader::values(NodeId node, int64_t count, const std::string& what) {
  const TensorView view = fields_.tensor(node, what);
  const int64_t found = numel(view.shape);
  if (found != count || !view.is_contiguous()) {
    throw Error(ErrorInfo{.code = ErrorCode::kMismatch,
                          .what = "A tensor of the checkpoint has another size than this run's.",
                          .file = file_.path(),
                          .entry = what,
                          .expected = std::to_string(count) + " elements",
                          .found = std::to_string(found),
                          .next = "load it into the topology it was saved by, or reshard it"});
  }
  if (!is_floating(view.dtype) || !can_cast(view.dtype, DType::kFloat32)) {
    fields_.fail("A tensor of the checkpoint has a dtype that no state has.", what,
                 "float32, bfloat16 or float16", isoshard::name(view.dtype));
  }
  std::vector<float> result(static_cast<size_t>(count));
  if (count == 0) return result;
  if (checked_.insert(view.storage).second) check_record(file_, file_.record(view.storage));
  const int64_t item = item_size_bytes(view.dtype);
  std::vector<std::byte> bytes(static_cast<size_t>(count * item));
  file_.file().read_at(file_.data_offset(view), bytes);
  cast(view.dtype, bytes, DType::kFloat32, std::as_writable_bytes(std::span(result)));
  return result;
}

void check_record(const checkpoint::TorchFile& file, const checkpoint::ZipRecord& record) {
  std::vector<std::byte> bytes(static_cast<size_t>(record.size_bytes));
  file.file().read_at(record.data_offset, bytes);
  if (checkpoint::crc32_of(bytes) == record.crc32) return;
  throw Error(ErrorInfo{.code = ErrorCode::kCorrupt,
                        .what = "A record does not have the CRC that its archive says.",
                        .file = file.path(),
                        .entry = record.name,
                        .next = "take another checkpoint; isoshard verify tells what is damaged"});
}

const std::vector<NodeId>& entries_of(const Fields& fields, NodeId node, const std::string& what) {
  if (fields.pickle().kind(node) == checkpoint::Kind::kDict) return fields.pickle().items(node);
  fields.fail("An entry of the checkpoint is no dict.", what, "a dict",
              checkpoint::name(fields.pickle().kind(node)));
}

NodeId item_of(const Fields& fields, NodeId list, size_t number, const std::string& what) {
  const std::vector<NodeId>& items = fields.list(list, what);
  if (number < items.size()) return items[number];
  fields.fail("A list of the checkpoint is too short.", what,
              "an item for each of this run's groups and parameters",
              std::to_string(items.size()) + " items");
}

}  // namespace isoshard::engine
