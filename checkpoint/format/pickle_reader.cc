// A pickle machine with a typed stack. Opcode values are those of Python's pickletools.
#include "checkpoint/format/pickle_reader.h"

#include <algorithm>
#include <bit>
#include <compare>
#include <cstdio>

#include "core/error.h"
#include "core/mutant.h"
#include "core/utf8.h"

namespace isoshard::checkpoint {
namespace {

class Machine {
 public:
  Machine(const std::string& bytes, const std::string& file, const PickleLimits& limits)
      : bytes_(bytes), file_(file), limits_(limits) {}

  Pickle run() {
    if (static_cast<int64_t>(bytes_.size()) > limits_.stream_bytes &&
        !mutant("pickle_size_unlimited")) {
      limit("pickle size", limits_.stream_bytes);
    }
    while (!stopped_) step();
    if (cursor_ != bytes_.size() && !mutant("pickle_trailing_bytes"))
      refuse("bytes follow the STOP opcode");
    if (stack_.empty() || (stack_.size() != 1 && !mutant("pickle_stack_leftover")) ||
        !marks_.empty())
      refuse("the stack does not hold one value at STOP");
    result_.root = stack_.back();
    check_graph();
    return std::move(result_);
  }

 private:
  [[noreturn]] void refuse(const std::string& why, ErrorCode code = ErrorCode::kCorrupt) const {
    throw Error(
        ErrorInfo{.code = code,
                  .what = "The pickle is not one that a training program writes: " + why + ".",
                  .file = file_,
                  .entry = "data.pkl, byte " + std::to_string(opcode_at_),
                  .next = "restore the file from another copy"});
  }
  [[noreturn]] void limit(const std::string& what, int64_t value) const {
    throw Error(ErrorInfo{.code = ErrorCode::kLimit,
                          .what = "A limit against resource bombs was reached: " + what + ".",
                          .file = file_,
                          .entry = "data.pkl, byte " + std::to_string(opcode_at_),
                          .expected = "at most " + std::to_string(value),
                          .next = "do not trust this file; real checkpoints stay far below"});
  }

  uint64_t little_endian(size_t count) {
    need(count);
    uint64_t value = 0;
    for (size_t i = 0; i < count; ++i) {
      value |= static_cast<uint64_t>(static_cast<unsigned char>(bytes_[cursor_ + i])) << (8 * i);
    }
    cursor_ += count;
    return value;
  }
  void need(size_t count) const {
    if (bytes_.size() - cursor_ < count) refuse("it ends in the middle of an opcode");
  }
  std::string take(size_t count) {
    need(count);
    std::string text = bytes_.substr(cursor_, count);
    cursor_ += count;
    return text;
  }
  std::string line() {
    const size_t end = bytes_.find('\n', cursor_);
    if (end == std::string::npos || end - cursor_ > 4096) refuse("a global has no end of line");
    std::string text = bytes_.substr(cursor_, end - cursor_);
    cursor_ = end + 1;
    return text;
  }

  void push(NodeId node) {
    stack_.push_back(node);
    check_memory();
  }
  void check_memory() const {
    const size_t numbers = stack_.size() + memo_.size() + items_added_;
    if (static_cast<int64_t>(bytes_.size() + 2 * numbers * sizeof(NodeId)) +
            result_.memory_bytes() >
        limits_.memory_bytes) {
      limit("memory for its objects", limits_.memory_bytes);
    }
  }
  size_t floor() const {
    return marks_.empty() || mutant("pickle_mark_ignored") ? 0 : marks_.back();
  }
  NodeId pop() {
    if (stack_.size() <= floor()) refuse("the stack is empty");
    const NodeId node = stack_.back();
    stack_.pop_back();
    return node;
  }
  NodeId top() const {
    if (stack_.size() <= floor()) refuse("the stack is empty");
    return stack_.back();
  }
  std::vector<NodeId> pop_to_mark() {
    if (marks_.empty()) refuse("there is no mark");
    std::vector<NodeId> items(stack_.begin() + static_cast<std::ptrdiff_t>(marks_.back()),
                              stack_.end());
    stack_.resize(marks_.back());
    marks_.pop_back();
    return items;
  }

  void text(size_t count) {
    if (static_cast<int64_t>(count) > limits_.text_bytes && !mutant("pickle_text_unlimited"))
      limit("string bytes", limits_.text_bytes);
    push(result_.string(take(count)));
  }
  void big_integer(size_t count) {
    if (static_cast<int64_t>(count) > limits_.integer_bytes) {
      limit("integer bytes", limits_.integer_bytes);
    }
    const std::string digits = take(count);
    if (count > 8) return push(result_.big_integer(digits));
    uint64_t value = 0;
    for (size_t i = 0; i < count; ++i) {
      value |= static_cast<uint64_t>(static_cast<unsigned char>(digits[i])) << (8 * i);
    }
    if (count > 0 && count < 8 && (digits.back() & 0x80) && !mutant("pickle_sign_lost"))
      value |= ~0ull << (8 * count);
    push(result_.integer(static_cast<int64_t>(value)));
  }
  void put(uint64_t index) {
    const NodeId node = top();
    if (index != memo_.size() && !mutant("pickle_memo_overwritten"))
      refuse("memo slots are not numbered one by one");
    memo_.push_back(node);
    check_memory();
  }
  void get(uint64_t index) {
    if (index >= memo_.size()) refuse("it reads a memo slot that was never written");
    push(memo_[index]);
  }
  void append(std::vector<NodeId> items) {
    const NodeId target = top();
    items_added_ += items.size();
    if (result_.kind(target) == Kind::kList) {
      std::vector<NodeId>& list = result_.mutable_items(target);
      list.insert(list.end(), items.begin(), items.end());
    } else if (result_.kind(target) == Kind::kObject) {
      std::vector<NodeId>& list = result_.mutable_parts(target).appended;
      list.insert(list.end(), items.begin(), items.end());
    } else {
      refuse(std::string("APPEND on a ") + name(result_.kind(target)));
    }
  }
  void set_items(std::vector<NodeId> items) {
    if (items.size() % 2 != 0) refuse("SETITEMS with a key and no value");
    const NodeId target = top();
    items_added_ += items.size();
    if (result_.kind(target) == Kind::kDict) {
      std::vector<NodeId>& list = result_.mutable_items(target);
      list.insert(list.end(), items.begin(), items.end());
    } else if (result_.kind(target) == Kind::kObject) {
      std::vector<NodeId>& list = result_.mutable_parts(target).set;
      list.insert(list.end(), items.begin(), items.end());
    } else {
      refuse(std::string("SETITEM on a ") + name(result_.kind(target)));
    }
  }
  void build_object(bool newobj) {
    ObjectParts parts;
    parts.newobj = newobj;
    parts.args = pop();
    parts.callable = pop();
    if (result_.kind(parts.args) != Kind::kTuple) refuse("arguments are not a tuple");
    if (result_.kind(parts.callable) != Kind::kGlobal && !mutant("pickle_calls_anything")) {
      refuse("something that is not a global is called", ErrorCode::kHostile);
    }
    push(result_.object(std::move(parts)));
  }
  void build_state() {
    const NodeId state = pop();
    const NodeId target = top();
    if (result_.kind(target) != Kind::kObject) refuse("BUILD on a plain value");
    if (result_.parts(target).state != kNoNode) refuse("BUILD twice on one object");
    result_.mutable_parts(target).state = state;
  }
  void tuple_of(size_t count) {
    std::vector<NodeId> items(count);
    for (size_t i = count; i-- > 0;) items[i] = pop();
    push(result_.tuple(std::move(items)));
  }

  void step();
  void step_value(unsigned char opcode);
  void check_graph();
  void check_keys(const std::vector<NodeId>& entries);

  const std::string& bytes_;
  const std::string& file_;
  const PickleLimits& limits_;
  Pickle result_;
  std::vector<NodeId> stack_;
  std::vector<size_t> marks_;
  std::vector<NodeId> memo_;
  size_t items_added_ = 0;  // by APPEND(S) and SETITEM(S)
  size_t cursor_ = 0;
  size_t opcode_at_ = 0;
  bool stopped_ = false;
};

// Opcodes that shape the stack; step_value() has those that push a plain value.
void Machine::step() {
  opcode_at_ = cursor_;
  const auto opcode = static_cast<unsigned char>(little_endian(1));
  switch (opcode) {
    case 0x80:  // PROTO
      if (opcode_at_ != 0 || (little_endian(1) != 2 && !mutant("pickle_any_protocol")))
        refuse("the protocol is not 2");
      return;
    case '.':
      stopped_ = true;
      return;
    case '(':
      marks_.push_back(stack_.size());
      if (marks_.size() > 10000 && !mutant("pickle_marks_unlimited")) limit("marks", 10000);
      return;
    case 'q':
      return put(little_endian(1));
    case 'r':
      return put(little_endian(4));
    case 'h':
      return get(little_endian(1));
    case 'j':
      return get(little_endian(4));
    case 't': {
      std::vector<NodeId> items = pop_to_mark();
      return push(result_.tuple(std::move(items)));
    }
    case 0x85:
      return tuple_of(1);
    case 0x86:
      return tuple_of(2);
    case 0x87:
      return tuple_of(3);
    case 'a':
      return append({pop()});
    case 'e': {
      std::vector<NodeId> items = pop_to_mark();
      return append(std::move(items));
    }
    case 's': {
      const NodeId value = pop();
      const NodeId key = pop();
      return set_items({key, value});
    }
    case 'u': {
      std::vector<NodeId> items = pop_to_mark();
      return set_items(std::move(items));
    }
    case 'R':
      return build_object(false);
    case 0x81:
      return build_object(true);
    case 'b':
      return build_state();
    case 'Q':
      return push(result_.persistent(pop()));
    default:
      return step_value(opcode);
  }
}

void Machine::step_value(unsigned char opcode) {
  switch (opcode) {
    case 'N':
      return push(result_.none());
    case 0x88:
      return push(result_.boolean(true));
    case 0x89:
      return push(result_.boolean(false));
    case 'K':
      return push(result_.integer(static_cast<int64_t>(little_endian(1))));
    case 'M':
      return push(result_.integer(static_cast<int64_t>(little_endian(2))));
    case 'J':
      return push(result_.integer(static_cast<int32_t>(little_endian(4))));
    case 0x8a:
      return big_integer(little_endian(1));
    case 0x8b:
      return big_integer(little_endian(4));
    case 'G': {
      const uint64_t bits =
          mutant("pickle_float_reversed") ? little_endian(8) : __builtin_bswap64(little_endian(8));
      return push(result_.real(std::bit_cast<double>(bits)));
    }
    case 'X':
      return text(little_endian(4));
    case '}':
      return push(result_.dict({}));
    case ']':
      return push(result_.list({}));
    case ')':
      return push(result_.tuple({}));
    case 'c': {
      const std::string module = line();
      const std::string attribute = line();
      if (!mutant("pickle_global_unchecked") &&
          (!why_unsafe_name(module).empty() || !why_unsafe_name(attribute).empty())) {
        refuse("a global has an impossible name", ErrorCode::kHostile);
      }
      return push(result_.global(module, attribute));
    }
    default:
      break;
  }
  char hex[8];
  std::snprintf(hex, sizeof hex, "0x%02x", opcode);
  refuse("opcode " + std::string(hex) + " is not one that torch writes under protocol 2");
}

// Depth-first without recursion: cycles, nesting and dictionary keys.
void Machine::check_graph() {
  enum : uint8_t { kNew, kOpen, kDone };
  std::vector<uint8_t> colour(result_.size(), kNew);
  std::vector<uint32_t> height(result_.size(), 0);
  std::vector<NodeId> path = {result_.root};
  const auto children = [this](NodeId node) {
    std::vector<NodeId> list;
    const Kind kind = result_.kind(node);
    if (kind == Kind::kTuple || kind == Kind::kList || kind == Kind::kDict)
      return result_.items(node);
    if (kind == Kind::kPersistent) return std::vector<NodeId>{result_.persistent_id(node)};
    if (kind != Kind::kObject) return list;
    const ObjectParts& parts = result_.parts(node);
    list = parts.appended;
    list.insert(list.end(), parts.set.begin(), parts.set.end());
    list.push_back(parts.args);
    if (parts.state != kNoNode) list.push_back(parts.state);
    return list;
  };
  while (!path.empty()) {
    const NodeId node = path.back();
    if (colour[node] == kDone) {
      path.pop_back();
      continue;
    }
    const bool leaving = colour[node] == kOpen;
    colour[node] = leaving ? kDone : kOpen;
    for (NodeId child : children(node)) {
      if (!leaving && colour[child] == kOpen && !mutant("pickle_cycle_allowed"))
        refuse("an object contains itself");
      if (!leaving && colour[child] == kNew) path.push_back(child);
      if (leaving) height[node] = std::max(height[node], height[child] + 1);
    }
    if (!leaving) continue;
    if (height[node] > static_cast<uint32_t>(limits_.nesting) &&
        !mutant("pickle_nesting_unlimited"))
      limit("nesting", limits_.nesting);
    check_keys(result_.entries(node));
    path.pop_back();
  }
}

// Equal strings are one node, so that numbers stand for all keys that can be compared.
void Machine::check_keys(const std::vector<NodeId>& entries) {
  struct Key {
    bool is_text;
    int64_t value;  // a string's node, or the integer
    auto operator<=>(const Key&) const = default;
  };
  std::vector<Key> keys;
  keys.reserve(entries.size() / 2);
  for (size_t i = 0; i + 1 < entries.size(); i += 2) {
    const NodeId key = entries[i];
    const Kind kind = result_.kind(key);
    if ((kind == Kind::kList || kind == Kind::kDict) && !mutant("pickle_unhashable_key"))
      refuse("a dictionary key is not hashable");
    if (kind == Kind::kString) keys.push_back({true, static_cast<int64_t>(key)});
    if (kind == Kind::kInt || kind == Kind::kBool) {
      keys.push_back({false, result_.integer_value(key)});
    }
  }
  std::sort(keys.begin(), keys.end());
  const auto twice = std::adjacent_find(keys.begin(), keys.end());
  if (twice == keys.end() || mutant("pickle_key_twice")) return;
  refuse("a dictionary has the key " +
         quote(twice->is_text ? result_.text(static_cast<NodeId>(twice->value))
                              : std::to_string(twice->value)) +
         " twice");
}

}  // namespace

Pickle read_pickle(const std::string& bytes, const std::string& file, const PickleLimits& limits) {
  return Machine(bytes, file, limits).run();
}

}  // namespace isoshard::checkpoint
