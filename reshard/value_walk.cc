// See value_walk.h.
#include "reshard/value_walk.h"

#include <bit>
#include <charconv>
#include <cmath>

#include "checkpoint/cancel.h"
#include "checkpoint/format/crc.h"
#include "core/error.h"
#include "reshard/tensor_values.h"

namespace isoshard::reshard {
namespace {

using checkpoint::Kind;
using checkpoint::kNoNode;
using checkpoint::NodeId;
using checkpoint::Pickle;

constexpr int64_t kMostRecordBytes = 1 << 20;
constexpr int kDeepest = 100;
constexpr size_t kMostText = 200;

std::string real_text(double value) {
  char buffer[64];
  const std::to_chars_result end = std::to_chars(buffer, buffer + sizeof buffer, value);
  std::string text(buffer, end.ptr);
  if (std::isnan(value)) text += " 0x" + checkpoint::hex16(std::bit_cast<uint64_t>(value));
  const bool whole = text.find_first_not_of("-0123456789") == std::string::npos;
  return whole ? text + ".0" : text;
}

// Of other keys the kind alone is known, and several may be of one kind.
bool has_a_text(Kind kind) {
  switch (kind) {
    case Kind::kNone:
    case Kind::kBool:
    case Kind::kInt:
    case Kind::kFloat:
    case Kind::kString:
    case Kind::kBigInt:
    case Kind::kGlobal:
      return true;
    default:
      return false;
  }
}

}  // namespace

std::string shortened(const std::string& text) {
  if (text.size() <= kMostText) return text;
  size_t end = kMostText;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) --end;
  return text.substr(0, end) + "… sha256 " + checkpoint::sha256_hex(text).substr(0, 16);
}

void ValueWalk::spend(int64_t values, size_t bytes, const Place& place) {
  checkpoint::throw_if_cancelled();
  budget_.values -= values;
  budget_.bytes -= static_cast<int64_t>(bytes);
  if (budget_.values < 0 || budget_.bytes < 0) limit(place);
}

void ValueWalk::limit(const Place& place) const {
  const WalkBudget whole;
  throw Error(ErrorInfo{.code = ErrorCode::kLimit,
                        .what = "A limit against resource bombs was reached: values.",
                        .file = document_.path(),
                        .entry = shortened(place.path),
                        .expected = "at most " + std::to_string(whole.values) +
                                    " values, their paths and "
                                    "texts of " +
                                    std::to_string(whole.bytes) + " bytes, " +
                                    std::to_string(kDeepest) + " deep",
                        .next = "find out who wrote this file; a checkpoint needs less"});
}

void ValueWalk::walk(NodeId node, const std::string& path, bool steps_only) {
  steps_only_ = steps_only;
  visit(node, {.path = path});
}

std::string ValueWalk::plain_text(NodeId node) {
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

// Taken once for each storage, however many views it has.
bool ValueWalk::crc_holds(int storage) {
  const auto known = budget_.crc_holds.find(storage);
  if (known != budget_.crc_holds.end()) return known->second;
  const checkpoint::ZipRecord& record = document_.record(storage);
  std::vector<std::byte> whole(static_cast<size_t>(record.size_bytes));
  document_.file().read_at(record.data_offset, whole);
  return budget_.crc_holds[storage] = checkpoint::crc32_of(whole) == record.crc32;
}

std::string ValueWalk::tensor_text(const checkpoint::TensorView& view) {
  const int64_t item = item_size_bytes(view.dtype);
  std::vector<std::byte> element(static_cast<size_t>(item));
  document_.file().read_at(document_.data_offset(view), element);
  std::string text = element_text(view.dtype, element) + " " + name(view.dtype);
  if (text.find("nan") != std::string::npos) text += " " + element_bits(element);
  if (document_.record(view.storage).size_bytes > kMostRecordBytes) return text;
  if (!crc_holds(view.storage)) text += " (its record does not fit its CRC)";
  return text;
}

// How much of the file a text is made of; it is hashed or quoted each time.
size_t ValueWalk::bytes_of(NodeId node) const {
  const Pickle& pickle = document_.pickle();
  const Kind kind = pickle.kind(node);
  return kind == Kind::kString || kind == Kind::kBigInt ? pickle.text(node).size() : 0;
}

void ValueWalk::visit_mapping(const std::vector<NodeId>& entries, const Place& place) {
  const Pickle& pickle = document_.pickle();
  for (size_t i = 0; i + 1 < entries.size(); i += 2) {
    const NodeId key = entries[i];
    if (pickle.kind(key) != Kind::kString) {
      spend(0, bytes_of(key), place);
      const std::string number = has_a_text(pickle.kind(key)) ? "" : " #" + std::to_string(i / 2);
      visit(entries[i + 1],
            {.path = place.path + "[" + plain_text(key) + number + "]", .depth = place.depth + 1});
      continue;
    }
    const std::string& text = pickle.text(key);
    spend(0, text.size(), place);
    if (skipped_.contains(text) && (text != "params" || !pickle.is_mapping(entries[i + 1]))) {
      spend(1, 0, place);
      continue;
    }
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
  // Each part has names of its own, or an element of one would hide that of another; what there is
  // once in nearly every object, its entries or else its attributes, has the plain ones.
  const std::string& path = place.path;
  if (parts.args != kNoNode) visit(parts.args, {path + "(args)", false, inside.depth});
  visit_list(parts.appended, {path + "(items)", false, inside.depth});
  visit_mapping(parts.set, inside);
  if (parts.state == kNoNode) return;
  if (!parts.set.empty()) inside.path += "(state)";
  visit(parts.state, inside);
}

void ValueWalk::visit(NodeId node, const Place& place) {
  if (place.depth > kDeepest) limit(place);
  spend(1, place.path.size() + bytes_of(node), place);
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
