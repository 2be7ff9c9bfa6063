// See value_walk.h.
#include "reshard/value_walk.h"

#include <bit>
#include <charconv>
#include <cmath>

#include "checkpoint/format/crc.h"
#include "core/error.h"
#include "reshard/tensor_values.h"

namespace isoshard::reshard {
namespace {

using checkpoint::Kind;
using checkpoint::kNoNode;
using checkpoint::NodeId;
using checkpoint::Pickle;

constexpr int64_t kMostValues = 1'000'000, kMostRecordBytes = 1 << 20;
constexpr int kDeepest = 100;
constexpr size_t kMostText = 200;

std::string shortened(const std::string& text) {
  if (text.size() <= kMostText) return text;
  return text.substr(0, kMostText) + "… sha256 " + checkpoint::sha256_hex(text).substr(0, 16);
}

std::string real_text(double value) {
  char buffer[64];
  const std::to_chars_result end = std::to_chars(buffer, buffer + sizeof buffer, value);
  std::string text(buffer, end.ptr);
  if (std::isnan(value)) text += " 0x" + checkpoint::hex16(std::bit_cast<uint64_t>(value));
  const bool whole = text.find_first_not_of("-0123456789") == std::string::npos;
  return whole ? text + ".0" : text;
}

}  // namespace

void ValueWalk::walk(NodeId node, const std::string& path, bool steps_only) {
  steps_only_ = steps_only;
  visit(node, {.path = path});
}

std::string ValueWalk::plain_text(NodeId node) const {
  const Pickle& pickle = document_.pickle();
  switch (pickle.kind(node)) {
    case Kind::kNone:
      return "None";
    case Kind::kBool:
      return pickle.integer_value(node) != 0 ? "True" : "False";
    case Kind::kInt:
      return std::to_string(pickle.integer_value(node));
    case Kind::kFloat:
      return real_text(pickle.real_value(node));
    case Kind::kString:
      return shortened(quote(pickle.text(node)));
    case Kind::kBigInt:
      return "int " + checkpoint::sha256_hex(pickle.text(node)).substr(0, 16);
    case Kind::kGlobal:
      return quote(pickle.module(node) + "." + pickle.attribute(node));
    default:
      return name(pickle.kind(node));
  }
}

std::string ValueWalk::tensor_text(const checkpoint::TensorView& view) const {
  const int64_t item = item_size_bytes(view.dtype);
  std::vector<std::byte> element(static_cast<size_t>(item));
  document_.file().read_at(document_.data_offset(view), element);
  std::string text = element_text(view.dtype, element) + " " + name(view.dtype);
  if (text.find("nan") != std::string::npos) text += " " + element_bits(element);
  const checkpoint::ZipRecord& record = document_.record(view.storage);
  if (record.size_bytes > kMostRecordBytes) return text;
  std::vector<std::byte> whole(static_cast<size_t>(record.size_bytes));
  document_.file().read_at(record.data_offset, whole);
  if (checkpoint::crc32_of(whole) != record.crc32) text += " (its record does not fit its CRC)";
  return text;
}

void ValueWalk::visit_mapping(const std::vector<NodeId>& entries, const Place& place) {
  const Pickle& pickle = document_.pickle();
  for (size_t i = 0; i + 1 < entries.size(); i += 2) {
    const NodeId key = entries[i];
    if (pickle.kind(key) != Kind::kString) {
      visit(entries[i + 1],
            {.path = place.path + "[" + plain_text(key) + "]", .depth = place.depth + 1});
      continue;
    }
    const std::string& text = pickle.text(key);
    if (skipped_.contains(text) && (text != "params" || !pickle.is_mapping(entries[i + 1])))
      continue;
    visit(entries[i + 1], {.path = place.path + "." + shortened(plain_name(text)),
                           .step = text == "step",
                           .depth = place.depth + 1});
  }
}

void ValueWalk::visit_list(const std::vector<NodeId>& items, const Place& place) {
  for (size_t i = 0; i < items.size(); ++i) {
    visit(items[i], {.path = place.path + "[" + std::to_string(i) + "]", .depth = place.depth + 1});
  }
}

void ValueWalk::visit_object(NodeId node, const Place& place) {
  if (const std::optional<checkpoint::TensorView> view = document_.tensor(node)) {
    if (view->shape.empty() && (place.step || !steps_only_)) visit_(place.path, tensor_text(*view));
    return;
  }
  const checkpoint::ObjectParts& parts = document_.pickle().parts(node);
  Place inside = place;
  ++inside.depth;
  if (parts.args != kNoNode) visit(parts.args, inside);
  visit_list(parts.appended, inside);
  visit_mapping(parts.set, inside);
  if (parts.state != kNoNode) visit(parts.state, inside);
}

void ValueWalk::visit(NodeId node, const Place& place) {
  if (++visited_ > kMostValues || place.depth > kDeepest) {
    throw Error(ErrorInfo{.code = ErrorCode::kLimit,
                          .what = "A limit against resource bombs was reached: values.",
                          .file = document_.path(),
                          .entry = shortened(place.path),
                          .expected = "at most " + std::to_string(kMostValues) + " values, " +
                                      std::to_string(kDeepest) + " deep",
                          .next = "find out who wrote this file; a checkpoint needs less"});
  }
  const Pickle& pickle = document_.pickle();
  switch (pickle.kind(node)) {
    case Kind::kDict:
      return visit_mapping(pickle.items(node), place);
    case Kind::kList:
    case Kind::kTuple:
      return visit_list(pickle.items(node), place);
    case Kind::kObject:
      return visit_object(node, place);
    case Kind::kPersistent:
      return;
    default:
      visit_(place.path, plain_text(node));
  }
}

}  // namespace isoshard::reshard
