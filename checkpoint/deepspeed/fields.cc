// See fields.h.
#include "checkpoint/deepspeed/fields.h"

#include <algorithm>
#include <bit>
#include <unordered_map>

#include "core/error.h"
#include "core/utf8.h"

namespace isoshard::checkpoint {

void Fields::fail(const std::string& what, const std::string& entry, const std::string& expected,
                  const std::string& found) const {
  throw Error(ErrorInfo{.code = ErrorCode::kCorrupt,
                        .what = what,
                        .file = document_.path(),
                        .entry = entry,
                        .expected = expected,
                        .found = found,
                        .next = "compare with the other ranks' files, or use another checkpoint"});
}

NodeId Fields::need(NodeId mapping, const std::string& key) const {
  const NodeId node = mapping == kNoNode ? kNoNode : pickle_.find(mapping, key);
  if (node == kNoNode)
    fail("A key that DeepSpeed always writes is missing.", quote(key), "present", "absent");
  return node;
}

NodeId Fields::maybe(NodeId mapping, const std::string& key) const {
  const NodeId node = mapping == kNoNode ? kNoNode : pickle_.find(mapping, key);
  return node == kNoNode || pickle_.is_none(node) ? kNoNode : node;
}

int64_t Fields::integer(NodeId node, const std::string& what) const {
  if (node == kNoNode || pickle_.kind(node) != Kind::kInt) {
    fail("A value has the wrong type.", what, "int",
         node == kNoNode ? "absent" : name(pickle_.kind(node)));
  }
  return pickle_.integer_value(node);
}

std::string Fields::text(NodeId node, const std::string& what) const {
  if (node == kNoNode || pickle_.kind(node) != Kind::kString) {
    fail("A value has the wrong type.", what, "str",
         node == kNoNode ? "absent" : name(pickle_.kind(node)));
  }
  return pickle_.text(node);
}

int64_t Fields::stage(NodeId node) const {
  if (node != kNoNode && pickle_.kind(node) == Kind::kObject) {
    const std::vector<NodeId>& args = pickle_.items(pickle_.parts(node).args);
    if (args.size() != 1)
      fail("The ZeRO stage has no number.", "zero_stage", "1 argument",
           std::to_string(args.size()));
    node = args[0];
  }
  const int64_t value = integer(node, "zero_stage");
  if (value < 0 || value > 3)
    fail("There is no such ZeRO stage.", "zero_stage", "0 to 3", std::to_string(value));
  return value;
}

bool Fields::truth(NodeId mapping, const std::string& key) const {
  const NodeId node = maybe(mapping, key);
  return node != kNoNode && pickle_.kind(node) == Kind::kBool && pickle_.integer_value(node) != 0;
}

const std::vector<NodeId>& Fields::list(NodeId node, const std::string& what) const {
  if (node == kNoNode ||
      (pickle_.kind(node) != Kind::kList && pickle_.kind(node) != Kind::kTuple)) {
    fail("A value has the wrong type.", what, "list",
         node == kNoNode ? "absent" : name(pickle_.kind(node)));
  }
  return pickle_.items(node);
}

Shape Fields::shape(NodeId node, const std::string& what) const {
  if (node != kNoNode && pickle_.kind(node) == Kind::kObject) {
    const std::vector<NodeId>& args = pickle_.items(pickle_.parts(node).args);
    if (args.size() == 1) node = args[0];
  }
  Shape result;
  for (NodeId item : list(node, what)) result.push_back(integer(item, what));
  if (!checked_numel(result)) {
    fail("A tensor's shape is negative or too large.", what, "sizes whose product is at most 2^58",
         to_string(result));
  }
  return result;
}

TensorView Fields::tensor(NodeId node, const std::string& what) const {
  const std::optional<TensorView> view = document_.tensor(node);
  if (!view) {
    fail("A value has the wrong type.", what, "tensor",
         node == kNoNode ? "absent" : name(pickle_.kind(node)));
  }
  return *view;
}

TensorView Fields::flat_tensor(NodeId node, const std::string& what) const {
  TensorView view = tensor(node, what);
  if (view.shape.size() != 1 || !view.is_contiguous()) {
    fail("A partition is not a flat tensor.", what, "one dimension", to_string(view.shape));
  }
  return view;
}

std::vector<std::pair<std::string, NodeId>> Fields::named(NodeId mapping,
                                                          const std::string& what) const {
  if (!pickle_.is_mapping(mapping))
    fail("A value has the wrong type.", what, "dict", name(pickle_.kind(mapping)));
  std::vector<std::pair<std::string, NodeId>> result;
  const std::vector<NodeId>& entries = pickle_.entries(mapping);
  for (size_t i = 0; i + 1 < entries.size(); i += 2) {
    const std::string key = text(entries[i], what + " key");
    const std::string why = why_unsafe_name(key);
    if (!why.empty()) {
      throw Error(ErrorInfo{
          .code = ErrorCode::kHostile,
          .what = "A tensor name cannot be a file name: " + why + ".",
          .file = document_.path(),
          .entry = what + " " + quote(key),
          .next = "find out who wrote this file; training code does not make such names"});
    }
    result.emplace_back(key, entries[i + 1]);
  }
  return result;
}

NodeId Fields::state_of(NodeId object) const {
  if (object == kNoNode || pickle_.kind(object) != Kind::kObject) return kNoNode;
  return pickle_.parts(object).state;
}

namespace {

// A pickle may name one list many times over: what is looked at is counted.
class ValueComparison {
 public:
  ValueComparison(const Pickle& a, const Pickle& b) : a_(a), b_(b) {}

  bool same(NodeId x, NodeId y) {
    if (++looked_ > kMost) return false;
    if (&a_ == &b_ && x == y) return true;
    if (a_.is_mapping(x) && b_.is_mapping(y)) return same_mapping(x, y);
    if (a_.kind(x) != b_.kind(y)) return false;
    switch (a_.kind(x)) {
      case Kind::kBool:
      case Kind::kInt:
        return a_.integer_value(x) == b_.integer_value(y);
      case Kind::kFloat:
        return std::bit_cast<uint64_t>(a_.real_value(x)) ==
               std::bit_cast<uint64_t>(b_.real_value(y));
      case Kind::kString:
      case Kind::kBigInt:
        return a_.text(x) == b_.text(y);
      case Kind::kTuple:
      case Kind::kList:
        return std::ranges::equal(a_.items(x), b_.items(y),
                                  [&](NodeId one, NodeId other) { return same(one, other); });
      default:
        return true;
    }
  }

 private:
  static constexpr int64_t kMost = 20'000'000;

  // Keys in any order; those that are no text in the same.
  bool same_mapping(NodeId x, NodeId y) {
    const std::vector<NodeId>&entries = a_.entries(x), &others = b_.entries(y);
    if (entries.size() != others.size()) return false;
    std::unordered_map<std::string, size_t> places;
    for (size_t i = 0; i + 1 < others.size(); i += 2) {
      if (b_.kind(others[i]) == Kind::kString) places.emplace(b_.text(others[i]), i);
    }
    for (size_t i = 0; i + 1 < entries.size(); i += 2) {
      size_t place = i;
      if (a_.kind(entries[i]) == Kind::kString) {
        const auto found = places.find(a_.text(entries[i]));
        if (found == places.end()) return false;
        place = found->second;
      } else if (!same(entries[i], others[i])) {
        return false;
      }
      if (!same(entries[i + 1], others[place + 1])) return false;
    }
    return true;
  }

  const Pickle &a_, &b_;
  int64_t looked_ = 0;
};

}  // namespace

bool same_value(const Fields& a, NodeId x, const Fields& b, NodeId y) {
  return ValueComparison(a.pickle(), b.pickle()).same(x, y);
}

}  // namespace isoshard::checkpoint
