// Emits each node once and refers to it by memo slot afterwards, as the C pickler does.
#include "checkpoint/format/pickle_writer.h"

#include <bit>
#include <cstdint>

#include "core/check.h"

namespace isoshard::checkpoint {
namespace {

class Emitter {
 public:
  explicit Emitter(const Pickle& pickle) : pickle_(pickle) {}

  std::string run() {
    out_ = "\x80\x02";
    emit(pickle_.root);
    out_ += '.';
    return std::move(out_);
  }

 private:
  void little_endian(uint64_t value, int count) {
    for (int i = 0; i < count; ++i) out_ += static_cast<char>((value >> (8 * i)) & 0xFF);
  }

  bool recall(NodeId node) {
    const auto found = memo_.find(node);
    if (found == memo_.end()) return false;
    out_ += found->second < 256 ? 'h' : 'j';
    little_endian(found->second, found->second < 256 ? 1 : 4);
    return true;
  }
  void remember(NodeId node) {
    const auto slot = static_cast<uint32_t>(memo_.size());
    CHECK(memo_.emplace(node, slot).second, "a node was emitted twice");
    out_ += slot < 256 ? 'q' : 'r';
    little_endian(slot, slot < 256 ? 1 : 4);
  }

  void integer(int64_t value) {
    if (value >= 0 && value < 256) {
      out_ += 'K';
      little_endian(static_cast<uint64_t>(value), 1);
    } else if (value >= 0 && value < 65536) {
      out_ += 'M';
      little_endian(static_cast<uint64_t>(value), 2);
    } else if (value >= INT32_MIN && value <= INT32_MAX) {
      out_ += 'J';
      little_endian(static_cast<uint32_t>(value), 4);
    } else {
      int count = 8;  // the shortest two's complement form
      while (count > 1 &&
             (value >> (8 * (count - 1) - 1) == 0 || value >> (8 * (count - 1) - 1) == -1)) {
        --count;
      }
      out_ += '\x8a';
      little_endian(static_cast<uint64_t>(count), 1);
      little_endian(static_cast<uint64_t>(value), count);
    }
  }

  void batches(const std::vector<NodeId>& items, size_t step, char one, char many) {
    constexpr size_t kBatch = 1000;
    for (size_t begin = 0; begin < items.size(); begin += kBatch * step) {
      const size_t end = std::min(items.size(), begin + kBatch * step);
      const bool single = end - begin == step;
      if (!single) out_ += '(';
      for (size_t i = begin; i < end; ++i) emit(items[i]);
      out_ += single ? one : many;
    }
  }

  void tuple(NodeId node) {
    const std::vector<NodeId>& items = pickle_.items(node);
    if (items.empty()) {
      out_ += ')';
      return;
    }
    if (items.size() > 3) out_ += '(';
    for (NodeId item : items) emit(item);
    out_ += items.size() > 3 ? 't' : static_cast<char>(0x84 + items.size());
    remember(node);
  }

  void object(NodeId node) {
    const ObjectParts& parts = pickle_.parts(node);
    emit(parts.callable);
    emit(parts.args);
    out_ += parts.newobj ? '\x81' : 'R';
    remember(node);
    batches(parts.appended, 1, 'a', 'e');
    batches(parts.set, 2, 's', 'u');
    if (parts.state != kNoNode) {
      emit(parts.state);
      out_ += 'b';
    }
  }

  void emit(NodeId node);

  const Pickle& pickle_;
  std::string out_;
  std::unordered_map<NodeId, uint32_t> memo_;
};

void Emitter::emit(NodeId node) {
  if (recall(node)) return;
  switch (pickle_.kind(node)) {
    case Kind::kNone:
      out_ += 'N';
      return;
    case Kind::kBool:
      out_ += pickle_.integer_value(node) ? '\x88' : '\x89';
      return;
    case Kind::kInt:
      return integer(pickle_.integer_value(node));
    case Kind::kBigInt: {
      const std::string& digits = pickle_.text(node);
      out_ += digits.size() < 256 ? '\x8a' : '\x8b';
      little_endian(digits.size(), digits.size() < 256 ? 1 : 4);
      out_ += digits;
      return;
    }
    case Kind::kFloat:
      out_ += 'G';
      little_endian(__builtin_bswap64(std::bit_cast<uint64_t>(pickle_.real_value(node))), 8);
      return;
    case Kind::kString: {
      const std::string& text = pickle_.text(node);
      out_ += 'X';
      little_endian(text.size(), 4);
      out_ += text;
      return remember(node);
    }
    case Kind::kGlobal:
      out_ += 'c' + pickle_.module(node) + '\n' + pickle_.attribute(node) + '\n';
      return remember(node);
    case Kind::kTuple:
      return tuple(node);
    case Kind::kList:
      out_ += ']';
      remember(node);
      return batches(pickle_.items(node), 1, 'a', 'e');
    case Kind::kDict:
      out_ += '}';
      remember(node);
      return batches(pickle_.items(node), 2, 's', 'u');
    case Kind::kObject:
      return object(node);
    case Kind::kPersistent:
      emit(pickle_.persistent_id(node));
      out_ += 'Q';
      return;
  }
}

}  // namespace

std::string write_pickle(const Pickle& pickle) { return Emitter(pickle).run(); }

}  // namespace isoshard::checkpoint
