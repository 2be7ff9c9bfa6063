// A pickle as data: an arena of nodes that nothing ever executes. Shared objects are shared nodes,
// so a graph stays a graph; unknown globals are inert names. See docs/formats/torch_file.md.
#pragma once

#include <cstdint>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace isoshard::checkpoint {

using NodeId = uint32_t;
constexpr NodeId kNoNode = 0xFFFFFFFFu;

enum class Kind : uint8_t {
  kNone,
  kBool,
  kInt,
  kBigInt,
  kFloat,
  kString,
  kTuple,
  kList,
  kDict,
  kGlobal,
  kObject,
  kPersistent,
};

const char* name(Kind kind);

// What REDUCE or NEWOBJ builds, and what is then put into it. `args` is a tuple node.
struct ObjectParts {
  bool newobj = false;  // NEWOBJ (cls.__new__) rather than REDUCE (a call)
  NodeId callable = kNoNode;
  NodeId args = kNoNode;
  std::vector<NodeId> appended;  // APPEND(S)
  std::vector<NodeId> set;       // SETITEM(S): key, value, key, value, …
  NodeId state = kNoNode;        // BUILD
};

class Pickle {
 public:
  NodeId root = kNoNode;

  // Building. Strings and globals are interned: equal text gives the same node.
  NodeId none() { return add(Kind::kNone, 0, 0); }
  NodeId boolean(bool value) { return add(Kind::kBool, value ? 1 : 0, 0); }
  NodeId integer(int64_t value) { return add(Kind::kInt, value, 0); }
  NodeId big_integer(std::string little_endian_bytes);  // two's complement, as LONG1 holds it
  NodeId real(double value);
  NodeId string(const std::string& text);
  NodeId global(const std::string& module, const std::string& attribute);
  NodeId tuple(std::vector<NodeId> items) { return container(Kind::kTuple, std::move(items)); }
  NodeId list(std::vector<NodeId> items) { return container(Kind::kList, std::move(items)); }
  NodeId dict(std::vector<NodeId> keys_and_values) {
    return container(Kind::kDict, std::move(keys_and_values));
  }
  NodeId object(ObjectParts parts);
  NodeId persistent(NodeId id) { return add(Kind::kPersistent, 0, id); }
  NodeId ordered_dict(std::vector<NodeId> keys_and_values);
  NodeId reduce(const std::string& module, const std::string& attribute, std::vector<NodeId> args);

  // Reading.
  size_t size() const { return nodes_.size(); }
  int64_t memory_bytes() const { return memory_bytes_; }  // estimated, without what is put in later
  Kind kind(NodeId node) const { return at(node).kind; }
  bool is_none(NodeId node) const { return kind(node) == Kind::kNone; }
  int64_t integer_value(NodeId node) const;    // kInt or kBool
  double real_value(NodeId node) const;        // kFloat
  const std::string& text(NodeId node) const;  // kString, kBigInt
  bool is_string(NodeId node, const char* text) const;
  const std::string& module(NodeId node) const;     // kGlobal
  const std::string& attribute(NodeId node) const;  // kGlobal
  bool is_global(NodeId node, const char* module, const char* attribute) const;
  const std::vector<NodeId>& items(NodeId node) const;  // kTuple, kList, kDict (alternating)
  std::vector<NodeId>& mutable_items(NodeId node);
  const ObjectParts& parts(NodeId node) const;
  ObjectParts& mutable_parts(NodeId node);
  NodeId persistent_id(NodeId node) const;

  // Key, value, key, value, … of a dict or of an OrderedDict (and its kin); empty otherwise.
  const std::vector<NodeId>& entries(NodeId node) const;
  bool is_mapping(NodeId node) const;
  // The value of a string key, or kNoNode.
  NodeId find(NodeId mapping, const std::string& key) const;

  // A copy of another pickle's subgraph; shared nodes stay shared. `replace` may answer for a node
  // with its own copy (kNoNode: go on copying).
  template <typename Replace>
  NodeId copy_from(const Pickle& other, NodeId node, std::unordered_map<NodeId, NodeId>& copied,
                   const Replace& replace);

 private:
  struct Node {
    Kind kind;
    uint32_t index;  // into texts_, lists_ or objects_, or a NodeId
    int64_t value;   // integer, bits of a double, or the second text
  };

  const Node& at(NodeId node) const;
  NodeId add(Kind kind, int64_t value, uint32_t index);
  NodeId container(Kind kind, std::vector<NodeId> items);
  uint32_t intern(const std::string& text);

  std::vector<Node> nodes_;
  std::vector<std::string> texts_;
  std::vector<std::vector<NodeId>> lists_;
  std::vector<ObjectParts> objects_;
  std::unordered_map<std::string, uint32_t> interned_;
  std::unordered_map<uint64_t, NodeId> shared_nodes_;  // (kind, text, second text) → node
  int64_t memory_bytes_ = 0;
};

template <typename Replace>
NodeId Pickle::copy_from(const Pickle& other, NodeId node,
                         std::unordered_map<NodeId, NodeId>& copied, const Replace& replace) {
  if (node == kNoNode) return kNoNode;
  if (const auto found = copied.find(node); found != copied.end()) return found->second;
  NodeId result = replace(node);
  const auto all = [&](const std::vector<NodeId>& nodes) {
    std::vector<NodeId> list;
    list.reserve(nodes.size());
    for (NodeId child : nodes) list.push_back(copy_from(other, child, copied, replace));
    return list;
  };
  if (result == kNoNode) {
    switch (other.kind(node)) {
      case Kind::kNone:
        result = none();
        break;
      case Kind::kBool:
        result = boolean(other.integer_value(node) != 0);
        break;
      case Kind::kInt:
        result = integer(other.integer_value(node));
        break;
      case Kind::kBigInt:
        result = big_integer(other.text(node));
        break;
      case Kind::kFloat:
        result = real(other.real_value(node));
        break;
      case Kind::kString:
        result = string(other.text(node));
        break;
      case Kind::kGlobal:
        result = global(other.module(node), other.attribute(node));
        break;
      case Kind::kTuple:
        result = tuple(all(other.items(node)));
        break;
      case Kind::kList:
        result = list(all(other.items(node)));
        break;
      case Kind::kDict:
        result = dict(all(other.items(node)));
        break;
      case Kind::kPersistent:
        result = persistent(copy_from(other, other.persistent_id(node), copied, replace));
        break;
      case Kind::kObject: {
        const ObjectParts& from = other.parts(node);
        ObjectParts parts;
        parts.newobj = from.newobj;
        parts.callable = copy_from(other, from.callable, copied, replace);
        parts.args = copy_from(other, from.args, copied, replace);
        parts.appended = all(from.appended);
        parts.set = all(from.set);
        parts.state = copy_from(other, from.state, copied, replace);
        result = object(std::move(parts));
        break;
      }
    }
  }
  copied.emplace(node, result);
  return result;
}

}  // namespace isoshard::checkpoint
