// The arena behind Pickle: 16 bytes a node, texts and children in pools of their own.
#include "checkpoint/format/pickle.h"

#include <bit>

#include "core/check.h"

namespace isoshard::checkpoint {
namespace {

// What one thing takes in memory: its place in a growing vector, in maps, and on the heap.
constexpr int64_t kNodeBytes = 32;
constexpr int64_t kListBytes = 48;
constexpr int64_t kObjectBytes = 96;
constexpr int64_t kTextBytes = 160;  // and the text itself twice

}  // namespace

const char* name(Kind kind) {
  constexpr const char* kNames[] = {"None",  "bool", "int",  "int",    "float",  "str",
                                    "tuple", "list", "dict", "global", "object", "persistent id"};
  return kNames[static_cast<int>(kind)];
}

const Pickle::Node& Pickle::at(NodeId node) const {
  CHECK(node < nodes_.size(), "node id out of range");
  return nodes_[node];
}

NodeId Pickle::add(Kind kind, int64_t value, uint32_t index) {
  nodes_.push_back({kind, index, value});
  memory_bytes_ += kNodeBytes;
  return static_cast<NodeId>(nodes_.size() - 1);
}

uint32_t Pickle::intern(const std::string& text) {
  const auto [found, fresh] = interned_.emplace(text, static_cast<uint32_t>(texts_.size()));
  if (fresh) {
    texts_.push_back(text);
    memory_bytes_ += kTextBytes + 2 * static_cast<int64_t>(text.size());
  }
  return found->second;
}

NodeId Pickle::big_integer(std::string little_endian_bytes) {
  return add(Kind::kBigInt, 0, intern(little_endian_bytes));
}

NodeId Pickle::real(double value) { return add(Kind::kFloat, std::bit_cast<int64_t>(value), 0); }

NodeId Pickle::string(const std::string& text) {
  const uint32_t index = intern(text);
  const uint64_t key = (static_cast<uint64_t>(index) << 32) | 0xFFFFFFFFu;
  const auto [found, fresh] = shared_nodes_.emplace(key, 0);
  if (fresh) found->second = add(Kind::kString, 0, index);
  return found->second;
}

NodeId Pickle::global(const std::string& module, const std::string& attribute) {
  const uint32_t first = intern(module);
  const uint32_t second = intern(attribute);
  const uint64_t key = (static_cast<uint64_t>(first) << 32) | second;
  const auto [found, fresh] = shared_nodes_.emplace(key, 0);
  if (fresh) found->second = add(Kind::kGlobal, second, first);
  return found->second;
}

NodeId Pickle::container(Kind kind, std::vector<NodeId> items) {
  memory_bytes_ += kListBytes + static_cast<int64_t>(items.size() * sizeof(NodeId));
  lists_.push_back(std::move(items));
  return add(kind, 0, static_cast<uint32_t>(lists_.size() - 1));
}

NodeId Pickle::object(ObjectParts parts) {
  memory_bytes_ += kObjectBytes;
  objects_.push_back(std::move(parts));
  return add(Kind::kObject, 0, static_cast<uint32_t>(objects_.size() - 1));
}

NodeId Pickle::reduce(const std::string& module, const std::string& attribute,
                      std::vector<NodeId> args) {
  ObjectParts parts;
  parts.callable = global(module, attribute);
  parts.args = tuple(std::move(args));
  return object(std::move(parts));
}

NodeId Pickle::ordered_dict(std::vector<NodeId> keys_and_values) {
  const NodeId node = reduce("collections", "OrderedDict", {});
  mutable_parts(node).set = std::move(keys_and_values);
  return node;
}

int64_t Pickle::integer_value(NodeId node) const {
  CHECK(kind(node) == Kind::kInt || kind(node) == Kind::kBool, name(kind(node)));
  return at(node).value;
}

double Pickle::real_value(NodeId node) const {
  CHECK(kind(node) == Kind::kFloat, name(kind(node)));
  return std::bit_cast<double>(at(node).value);
}

const std::string& Pickle::text(NodeId node) const {
  CHECK(kind(node) == Kind::kString || kind(node) == Kind::kBigInt, name(kind(node)));
  return texts_[at(node).index];
}

bool Pickle::is_string(NodeId node, const char* expected) const {
  return kind(node) == Kind::kString && text(node) == expected;
}

const std::string& Pickle::module(NodeId node) const {
  CHECK(kind(node) == Kind::kGlobal, name(kind(node)));
  return texts_[at(node).index];
}

const std::string& Pickle::attribute(NodeId node) const {
  CHECK(kind(node) == Kind::kGlobal, name(kind(node)));
  return texts_[static_cast<size_t>(at(node).value)];
}

bool Pickle::is_global(NodeId node, const char* expected_module,
                       const char* expected_attribute) const {
  return node != kNoNode && kind(node) == Kind::kGlobal && module(node) == expected_module &&
         attribute(node) == expected_attribute;
}

const std::vector<NodeId>& Pickle::items(NodeId node) const {
  const Kind k = kind(node);
  CHECK(k == Kind::kTuple || k == Kind::kList || k == Kind::kDict, name(k));
  return lists_[at(node).index];
}

std::vector<NodeId>& Pickle::mutable_items(NodeId node) {
  return const_cast<std::vector<NodeId>&>(items(node));
}

const ObjectParts& Pickle::parts(NodeId node) const {
  CHECK(kind(node) == Kind::kObject, name(kind(node)));
  return objects_[at(node).index];
}

ObjectParts& Pickle::mutable_parts(NodeId node) { return const_cast<ObjectParts&>(parts(node)); }

NodeId Pickle::persistent_id(NodeId node) const {
  CHECK(kind(node) == Kind::kPersistent, name(kind(node)));
  return at(node).index;
}

const std::vector<NodeId>& Pickle::entries(NodeId node) const {
  static const std::vector<NodeId> kEmpty;
  if (node == kNoNode) return kEmpty;
  if (kind(node) == Kind::kDict) return items(node);
  return is_mapping(node) ? parts(node).set : kEmpty;
}

bool Pickle::is_mapping(NodeId node) const {
  if (node == kNoNode) return false;
  if (kind(node) == Kind::kDict) return true;
  return kind(node) == Kind::kObject &&
         (is_global(parts(node).callable, "collections", "OrderedDict") ||
          is_global(parts(node).callable, "collections", "defaultdict"));
}

NodeId Pickle::find(NodeId mapping, const std::string& key) const {
  const std::vector<NodeId>& list = entries(mapping);
  for (size_t i = 0; i + 1 < list.size(); i += 2) {
    if (kind(list[i]) == Kind::kString && text(list[i]) == key) return list[i + 1];
  }
  return kNoNode;
}

}  // namespace isoshard::checkpoint
