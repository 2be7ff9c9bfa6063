// Facts about pickles: real ones survive a round trip, and everything odd is refused.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <climits>
#include <cmath>
#include <filesystem>
#include <limits>

#include "checkpoint/format/hostile_globals.h"
#include "checkpoint/format/pickle_reader.h"
#include "checkpoint/format/pickle_writer.h"
#include "checkpoint/format/torch_file.h"
#include "checkpoint/posix_storage.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

using namespace std::string_literals;

const std::string kProto = "\x80\x02";

Pickle read(const std::string& bytes, const PickleLimits& limits = {}) {
  return read_pickle(bytes, "file.pt", limits);
}

ErrorInfo refusal(const std::string& bytes, const PickleLimits& limits = {}) {
  try {
    read(bytes, limits);
  } catch (const Error& error) {
    EXPECT_EQ(error.info().file, "file.pt");
    return error.info();
  }
  ADD_FAILURE() << "accepted " << testing::PrintToString(bytes);
  return {};
}

ErrorCode code_of(const std::string& bytes, const PickleLimits& limits = {}) {
  return refusal(bytes, limits).code;
}

void expect_text(const std::string& text, const std::string& part) {
  EXPECT_NE(text.find(part), std::string::npos) << text;
}

// A text that tells two graphs apart, sharing included: a node that is met again is only numbered.
// What no pickle can share (numbers, persistent ids and the empty tuple) is printed each time.
class Printer {
 public:
  explicit Printer(const Pickle& pickle) : pickle_(pickle) {}
  std::string print() {
    visit(pickle_.root);
    return std::move(out_);
  }

 private:
  void visit(NodeId node) {
    if (node == kNoNode) {
      out_ += "-;";
      return;
    }
    if (is_shareable(node)) {
      const auto [found, fresh] = numbers_.emplace(node, numbers_.size());
      if (!fresh) {
        out_ += "@" + std::to_string(found->second) + ";";
        return;
      }
    }
    out_ += name(pickle_.kind(node)) + " "s;
    switch (pickle_.kind(node)) {
      case Kind::kNone:
        break;
      case Kind::kBool:
      case Kind::kInt:
        out_ += std::to_string(pickle_.integer_value(node));
        break;
      case Kind::kFloat:
        out_ += std::to_string(std::bit_cast<uint64_t>(pickle_.real_value(node)));
        break;
      case Kind::kBigInt:
      case Kind::kString:
        out_ += quote(pickle_.text(node));
        break;
      case Kind::kGlobal:
        out_ += pickle_.module(node) + " " + pickle_.attribute(node);
        break;
      case Kind::kTuple:
      case Kind::kList:
      case Kind::kDict:
        visit_all(pickle_.items(node));
        break;
      case Kind::kPersistent:
        visit(pickle_.persistent_id(node));
        break;
      case Kind::kObject:
        visit_object(pickle_.parts(node));
        break;
    }
    out_ += ";";
  }
  bool is_shareable(NodeId node) const {
    const Kind kind = pickle_.kind(node);
    if (kind == Kind::kTuple) return !pickle_.items(node).empty();
    return kind >= Kind::kString && kind != Kind::kPersistent;
  }
  void visit_all(const std::vector<NodeId>& nodes) {
    out_ += "[";
    for (NodeId node : nodes) visit(node);
    out_ += "]";
  }
  void visit_object(const ObjectParts& parts) {
    out_ += parts.newobj ? "new " : "call ";
    visit(parts.callable);
    visit(parts.args);
    visit_all(parts.appended);
    visit_all(parts.set);
    visit(parts.state);
  }

  const Pickle& pickle_;
  std::unordered_map<NodeId, size_t> numbers_;
  std::string out_;
};

std::string print(const Pickle& pickle) { return Printer(pickle).print(); }

std::string written(Pickle pickle, NodeId root) {
  pickle.root = root;
  return write_pickle(pickle);
}

TEST(Pickle, EveryRealPickleHasTheSameGraphAfterARoundTrip) {
  namespace fs = std::filesystem;
  PosixStorage storage;
  int files = 0;
  for (const auto& entry :
       fs::recursive_directory_iterator(fs::path(ISOSHARD_TRACES) / "deepspeed")) {
    if (!entry.is_regular_file() || entry.path().extension() != ".pt") continue;
    const TorchFile file(storage, entry.path().string());
    const std::string bytes = write_pickle(file.pickle());
    const Pickle again = read(bytes);
    ASSERT_EQ(print(again), print(file.pickle())) << entry.path();
    ASSERT_EQ(write_pickle(again), bytes) << entry.path();
    ++files;
  }
  EXPECT_GT(files, 100) << "traces are missing";
}

TEST(Pickle, ACopiedGraphPrintsAsTheOriginal) {
  Pickle original;
  const NodeId shared = original.list({original.integer(5), original.big_integer("123456789")});
  original.root = original.dict(
      {original.string("a"), shared, original.string("b"), original.tuple({shared, shared}),
       original.string("c"), original.reduce("m", "f", {original.persistent(shared)}),
       original.string("d"), original.ordered_dict({original.real(0.5), original.none()})});
  Pickle copy;
  std::unordered_map<NodeId, NodeId> copied;
  copy.root = copy.copy_from(original, original.root, copied, [](NodeId) { return kNoNode; });
  EXPECT_EQ(print(copy), print(original));
}

TEST(Pickle, SharedObjectsStayShared) {
  Pickle pickle;
  const NodeId shared = pickle.list({pickle.integer(1)});
  const Pickle again = read(written(pickle, pickle.tuple({shared, shared})));
  const std::vector<NodeId>& items = again.items(again.root);
  EXPECT_EQ(items[0], items[1]);
}

struct IntegerRow {
  int64_t value;
  std::string bytes;  // what Python 3's pickle.dumps(value, 2) has between PROTO and STOP
};

const IntegerRow kIntegers[] = {
    {0, "K\x00"s},
    {255, "K\xff"s},
    {256, "M\x00\x01"s},
    {65535, "M\xff\xff"s},
    {65536, "J\x00\x00\x01\x00"s},
    {-1, "J\xff\xff\xff\xff"s},
    {INT32_MAX, "J\xff\xff\xff\x7f"s},
    {INT32_MIN, "J\x00\x00\x00\x80"s},
    {2147483648, "\x8a\x05\x00\x00\x00\x80\x00"s},
    {-2147483649, "\x8a\x05\xff\xff\xff\x7f\xff"s},
    {549755813887, "\x8a\x05\xff\xff\xff\xff\x7f"s},
    {549755813888, "\x8a\x06\x00\x00\x00\x00\x80\x00"s},
    {-549755813888, "\x8a\x05\x00\x00\x00\x00\x80"s},
    {140737488355328, "\x8a\x07\x00\x00\x00\x00\x00\x80\x00"s},
    {-140737488355329, "\x8a\x07\xff\xff\xff\xff\xff\x7f\xff"s},
    {36028797018963967, "\x8a\x07\xff\xff\xff\xff\xff\xff\x7f"s},
    {36028797018963968, "\x8a\x08\x00\x00\x00\x00\x00\x00\x80\x00"s},
    {-36028797018963968, "\x8a\x07\x00\x00\x00\x00\x00\x00\x80"s},
    {INT64_MAX, "\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f"s},
    {INT64_MIN, "\x8a\x08\x00\x00\x00\x00\x00\x00\x00\x80"s},
};

TEST(PickleInteger, BytesAreThoseOfPython) {
  for (const IntegerRow& row : kIntegers) {
    Pickle pickle;
    EXPECT_EQ(written(pickle, pickle.integer(row.value)), kProto + row.bytes + ".") << row.value;
  }
}

TEST(PickleInteger, EveryBoundaryIsReadBack) {
  std::vector<int64_t> values = {INT64_MIN, INT64_MAX};
  for (int bit = 0; bit < 63; ++bit) {
    const int64_t power = int64_t{1} << bit;
    for (int64_t value : {power - 1, power, power + 1}) {
      values.push_back(value);
      values.push_back(-value);
    }
  }
  for (int64_t value : values) {
    Pickle pickle;
    const Pickle again = read(written(pickle, pickle.integer(value)));
    ASSERT_EQ(again.kind(again.root), Kind::kInt) << value;
    ASSERT_EQ(again.integer_value(again.root), value);
  }
}

TEST(PickleInteger, WhatNeedsMoreThanEightBytesKeepsItsBytes) {
  for (const std::string& digits :
       {"\x00\x00\x00\x00\x00\x00\x00\x80\x00"s, "\xff\xff\xff\xff\xff\xff\xff\x7f\xff"s,
        std::string(255, '\x11'), std::string(256, '\x11'), std::string(1024, '\x22')}) {
    Pickle pickle;
    const Pickle again = read(written(pickle, pickle.big_integer(digits)));
    ASSERT_EQ(again.kind(again.root), Kind::kBigInt);
    EXPECT_EQ(again.text(again.root), digits);
  }
}

TEST(PickleInteger, AnEmptyLongIsZeroAndShortOnesCarryTheirSign) {
  const auto value = [](const std::string& bytes) {
    const Pickle pickle = read(kProto + bytes + ".");
    return pickle.integer_value(pickle.root);
  };
  EXPECT_EQ(value("\x8a\x00"s), 0);
  EXPECT_EQ(value("\x8a\x01\x80"s), -128);
  EXPECT_EQ(value("\x8a\x02\x80\x00"s), 128);
  EXPECT_EQ(value("\x8b\x01\x00\x00\x00\xff"s), -1);
  EXPECT_EQ(value("J\x00\x00\x00\x80"s), INT32_MIN);
}

TEST(PickleInteger, MoreThan1024BytesAreALimit) {
  const auto longer = "\x8b\x01\x04\x00\x00"s + std::string(1025, '\x01');
  EXPECT_EQ(code_of(kProto + longer + "."), ErrorCode::kLimit);
  EXPECT_EQ(code_of(kProto + "\x8b\xff\xff\xff\xff."s), ErrorCode::kLimit);
}

TEST(PickleFloat, EveryBitIsKept) {
  const double values[] = {0.0,
                           -0.0,
                           0.1,
                           1e308,
                           std::numeric_limits<double>::denorm_min(),
                           -std::numeric_limits<double>::infinity(),
                           std::bit_cast<double>(0x7FF0000000000001ull)};
  for (double value : values) {
    Pickle pickle;
    const Pickle again = read(written(pickle, pickle.real(value)));
    EXPECT_EQ(std::bit_cast<uint64_t>(again.real_value(again.root)),
              std::bit_cast<uint64_t>(value));
  }
}

TEST(PickleFloat, BytesAreBigEndian) {
  Pickle pickle;
  EXPECT_EQ(written(pickle, pickle.real(1.0)), kProto + "G\x3f\xf0\x00\x00\x00\x00\x00\x00."s);
}

TEST(PickleContainer, EverySizeAroundABatchIsReadBack) {
  for (size_t size : {0u, 1u, 2u, 3u, 4u, 255u, 256u, 257u, 999u, 1000u, 1001u, 2000u, 2001u}) {
    Pickle pickle;
    std::vector<NodeId> items, entries;
    for (size_t i = 0; i < size; ++i) {
      items.push_back(pickle.integer(static_cast<int64_t>(i)));
      entries.push_back(pickle.string("k" + std::to_string(i)));
      entries.push_back(pickle.integer(static_cast<int64_t>(i)));
    }
    pickle.root = pickle.tuple({pickle.list(items), pickle.dict(entries), pickle.tuple(items),
                                pickle.ordered_dict(entries)});
    const Pickle again = read(write_pickle(pickle));
    ASSERT_EQ(print(again), print(pickle)) << size;
  }
}

TEST(PickleContainer, MemoSlotsBeyondAByteAreWrittenWide) {
  Pickle pickle;
  std::vector<NodeId> items;
  for (int i = 0; i < 300; ++i) items.push_back(pickle.string(std::to_string(i)));
  for (int i = 0; i < 300; ++i) items.push_back(pickle.string(std::to_string(i)));
  const Pickle again = read(written(pickle, pickle.list(items)));
  const std::vector<NodeId>& list = again.items(again.root);
  for (size_t i = 0; i < 300; ++i) ASSERT_EQ(list[i], list[i + 300]);
}

TEST(PickleText, BytesThatAreNotUtf8AndEmptyTextsAreKept) {
  for (const std::string& text : {""s, "\xff\x00\x80"s, "\xce\xb1"s, std::string(70000, 'x')}) {
    Pickle pickle;
    const Pickle again = read(written(pickle, pickle.string(text)));
    EXPECT_EQ(again.text(again.root), text);
  }
}

TEST(PickleObject, CallsConstructionsAndStatesAreKept) {
  Pickle pickle;
  ObjectParts parts;
  parts.newobj = true;
  parts.callable = pickle.global("m", "C");
  parts.args = pickle.tuple({pickle.integer(1)});
  parts.appended = {pickle.integer(2), pickle.none()};
  parts.set = {pickle.string("k"), pickle.boolean(true)};
  parts.state = pickle.dict({pickle.string("x"), pickle.boolean(false)});
  const NodeId object = pickle.object(parts);
  const NodeId storage = pickle.persistent(pickle.tuple({pickle.string("storage")}));
  pickle.root = pickle.list({object, pickle.reduce("a.b", "f", {object}), storage});
  EXPECT_EQ(print(read(write_pickle(pickle))), print(pickle));
}

TEST(PickleMachine, OnlyTheOpcodesOfTorchAreKnown) {
  const std::string known =
      "\x80.(qrhjt\x85\x86\x87"
      "aesuR\x81"
      "bQN\x88\x89KMJ\x8a\x8bGX}])c"s;
  for (int opcode = 0; opcode < 256; ++opcode) {
    if (known.find(static_cast<char>(opcode)) != std::string::npos) continue;
    const ErrorInfo info = refusal(kProto + static_cast<char>(opcode) + std::string(16, '\0'));
    EXPECT_EQ(info.code, ErrorCode::kCorrupt) << opcode;
    expect_text(info.what, "opcode 0x");
    EXPECT_EQ(info.entry, "data.pkl, byte 2");
  }
}

TEST(PickleMachine, ProtocolsOtherThanTwoAreRefused) {
  for (char protocol : "\x00\x01\x03\x04\x05"s) {
    EXPECT_EQ(code_of("\x80"s + protocol + "N."), ErrorCode::kCorrupt);
  }
  EXPECT_EQ(code_of(kProto + kProto + "N."), ErrorCode::kCorrupt);
}

TEST(PickleMachine, EveryTruncationIsRefused) {
  Pickle pickle;
  const NodeId leaf =
      pickle.reduce("m", "f",
                    {pickle.real(0.5), pickle.integer(1 << 20), pickle.integer(INT64_MAX),
                     pickle.string("abc"), pickle.string("d")});
  const std::string whole = written(pickle, pickle.dict({pickle.string("k"), leaf}));
  read(whole);
  for (size_t size = 0; size < whole.size(); ++size) {
    EXPECT_EQ(code_of(whole.substr(0, size)), ErrorCode::kCorrupt) << size;
  }
}

TEST(PickleMachine, BytesAfterStopAreRefused) {
  EXPECT_EQ(code_of(kProto + "N.N"), ErrorCode::kCorrupt);
  EXPECT_EQ(code_of(kProto + "N.\0"s), ErrorCode::kCorrupt);
}

TEST(PickleMachine, TheStackMustHoldOneValueAtTheEnd) {
  for (const char* body : {".", "NN.", "(.", "(N.", "N(."}) {
    EXPECT_EQ(code_of(kProto + body), ErrorCode::kCorrupt) << body;
  }
}

TEST(PickleMachine, ValuesBelowAMarkAreOutOfReach) {
  for (const char* body :
       {"](a.", "N(\x85.", "](Na.", "N(Nq\x00Nq\x05.", "t.", "]e.", "}u.", "](Nata."}) {
    EXPECT_EQ(code_of(kProto + body), ErrorCode::kCorrupt) << body;
  }
}

TEST(PickleMachine, MemoSlotsAreNumberedOneByOneAndWrittenOnce) {
  EXPECT_EQ(code_of(kProto + "Nq\x01."s), ErrorCode::kCorrupt);
  EXPECT_EQ(code_of(kProto + "Nq\x00q\x00."s), ErrorCode::kCorrupt);
  EXPECT_EQ(code_of(kProto + "Nr\xff\xff\xff\xff."s), ErrorCode::kCorrupt);
  EXPECT_EQ(code_of(kProto + "h\x00."s), ErrorCode::kCorrupt);
  EXPECT_EQ(code_of(kProto + "j\x00\x00\x00\x80."s), ErrorCode::kCorrupt);
  EXPECT_EQ(code_of(kProto + "q\x00N."s), ErrorCode::kCorrupt);
  const Pickle pickle = read(kProto + "]q\x00h\x00j\x00\x00\x00\x00\x87q\x01."s);
  EXPECT_EQ(pickle.items(pickle.root).size(), 3u);
}

TEST(PickleMachine, ItemsGoIntoContainersOnly) {
  for (const std::string& body : {"NNa."s, "N(NNe."s, ")Na."s, "]NNs."s, "](NNu."s, "K\x01NNs."s,
                                  "}Na."s, "](b."s, "]Nb."s, "}(Nu."s, "}(NNNu."s}) {
    EXPECT_EQ(code_of(kProto + body), ErrorCode::kCorrupt) << body;
  }
}

TEST(PickleMachine, OnlyGlobalsAreCalled) {
  EXPECT_EQ(code_of(kProto + "N)R."), ErrorCode::kHostile);
  EXPECT_EQ(code_of(kProto + "cm\nf\n)R)R."), ErrorCode::kHostile);
  EXPECT_EQ(code_of(kProto + "X\x01\x00\x00\x00"
                             "f)\x81."s),
            ErrorCode::kHostile);
  EXPECT_EQ(code_of(kProto + "cm\nf\n]R."), ErrorCode::kCorrupt);
  EXPECT_EQ(code_of(kProto + "cm\nf\n)RNbNb."), ErrorCode::kCorrupt);
}

TEST(PickleMachine, GlobalsHavePossibleNames) {
  for (const std::string& body :
       {"c\nf\n."s, "cm\n\n."s, "cm\x1b[2J\nf\n."s, "c/etc\nf\n."s, "cm\n\xff\n."s, "c..\nf\n."s}) {
    EXPECT_EQ(code_of(kProto + body), ErrorCode::kHostile) << body;
  }
  EXPECT_EQ(code_of(kProto + "cm\nf"), ErrorCode::kCorrupt);
  EXPECT_EQ(code_of(kProto + "c" + std::string(5000, 'm') + "\nf\n."), ErrorCode::kCorrupt);
}

TEST(PickleGraph, AnObjectThatContainsItselfIsRefused) {
  for (const std::string& body : {"]q\x00h\x00"
                                  "a."s,
                                  "}q\x00K\x01h\x00s."s,
                                  "]q\x00]q\x01h\x00"
                                  "aa."s,
                                  "](K\x01}q\x00K\x02h\x00se."s,
                                  "cm\nf\n)Rq\x00h\x00"
                                  "b."s,
                                  "cm\nf\n)Rq\x00h\x00"
                                  "a."s,
                                  "]q\x00h\x00Qa."s}) {
    const ErrorInfo info = refusal(kProto + body);
    EXPECT_EQ(info.code, ErrorCode::kCorrupt) << body;
    expect_text(info.what, "contains itself");
  }
}

TEST(PickleGraph, SharingWithoutACycleIsFine) {
  // Doubling thirty times is a billion paths and thirty nodes.
  std::string body = "]q\x00"s;
  for (int i = 0; i < 30; ++i) {
    body += "h"s + static_cast<char>(i) + "\x86q"s + static_cast<char>(i + 1);
  }
  const Pickle pickle = read(kProto + body + ".");
  EXPECT_EQ(pickle.size(), 31u);
  EXPECT_EQ(read(write_pickle(pickle)).size(), 31u);
}

std::string nested(int depth) {
  return kProto + std::string(static_cast<size_t>(depth), ']') +
         std::string(static_cast<size_t>(depth - 1), 'a') + ".";
}

TEST(PickleGraph, NestingHasALimitAt1000) {
  const Pickle pickle = read(nested(1001));  // a list that has 1,000 levels below it
  EXPECT_EQ(print(read(write_pickle(pickle))), print(pickle));
  EXPECT_EQ(code_of(nested(1002)), ErrorCode::kLimit);
  EXPECT_EQ(code_of(nested(200000)), ErrorCode::kLimit);
  EXPECT_EQ(code_of(nested(6), {.nesting = 4}), ErrorCode::kLimit);
}

TEST(PickleGraph, NestingThatIsBuiltBackwardsThroughTheMemoIsSeenToo) {
  // Each list goes into the next one after both were made.
  std::string body = "(]q\x00"s;
  for (int i = 1; i <= 1500; ++i) {
    const auto slot = [](int n) {
      return std::string{static_cast<char>(n & 0xFF), static_cast<char>(n >> 8), 0, 0};
    };
    body += "]r" + slot(i) + "j" + slot(i - 1) + "a";
  }
  EXPECT_EQ(code_of(kProto + body + "t."), ErrorCode::kLimit);
}

TEST(PickleGraph, ADictionaryHasEachKeyOnce) {
  for (const std::string& body :
       {"}(X\x01\x00\x00\x00"
        "aNX\x01\x00\x00\x00"
        "aNu."s,
        "}(K\x01NK\x01Nu."s, "}(K\x01N\x88Nu."s, "}K\x05Ns\x8a\x01\x05Ns."s,
        "ccollections\nOrderedDict\n)R(K\x01NK\x01Nu."s}) {
    const ErrorInfo info = refusal(kProto + body);
    EXPECT_EQ(info.code, ErrorCode::kCorrupt) << body;
    expect_text(info.what, "twice");
  }
  read(kProto +
       "}(X\x01\x00\x00\x00"
       "1NK\x01Nu."s);
}

TEST(PickleGraph, ADictionaryKeyIsHashable) {
  EXPECT_EQ(code_of(kProto + "}]Ns."), ErrorCode::kCorrupt);
  EXPECT_EQ(code_of(kProto + "}}Ns."), ErrorCode::kCorrupt);
}

TEST(PickleLimit, SizesTextsNodesAndMarksHaveBudgets) {
  EXPECT_EQ(code_of(kProto + "N.", {.stream_bytes = 3}), ErrorCode::kLimit);
  EXPECT_EQ(code_of(kProto + "X\x05\x00\x00\x00"
                             "abcde."s,
                    {.text_bytes = 4}),
            ErrorCode::kLimit);
  EXPECT_EQ(code_of(kProto + "(NNNNNNNNNNt.", {.memory_bytes = 200}), ErrorCode::kLimit);
  EXPECT_EQ(code_of(kProto + std::string(10001, '(')), ErrorCode::kLimit);
  // The stack grows by a memo slot without a new node.
  std::string reads;
  for (int i = 0; i < 100; ++i) reads += "h\x00"s;
  EXPECT_EQ(code_of(kProto + "(Nq\x00"s + reads + "t.", {.memory_bytes = 1000}), ErrorCode::kLimit);
  EXPECT_EQ(read(kProto + "(Nq\x00"s + reads + "t.", {.memory_bytes = 2000}).size(), 2u);
}

TEST(PickleLimit, MillionsOfSmallObjectsAreRefusedBeforeTheyAreBuilt) {
  for (const char* object : {"}", "]", ")", "(t", "ca\nb\n)R"}) {
    std::string body = "(";
    for (int i = 0; i < 4'000'000; ++i) body += object;
    EXPECT_EQ(code_of(kProto + body + "t."), ErrorCode::kLimit) << object;
  }
}

TEST(PickleLimit, KeysThatAreEqualAreFoundAmongMany) {
  std::string body = "}(";
  for (int32_t i = 0; i < 50'000; ++i) {
    body += "J" + std::string(reinterpret_cast<const char*>(&i), sizeof i) + "N";
  }
  EXPECT_EQ(read(kProto + body + "u.").size(), 100'001u);
  EXPECT_EQ(code_of(kProto + body + "K\x05Nu."s), ErrorCode::kCorrupt);
}

TEST(PickleLimit, ADeclaredLengthBeyondTheStreamAllocatesNothing) {
  EXPECT_EQ(code_of(kProto + "X\xff\xff\xff\x7f"s), ErrorCode::kLimit);
  EXPECT_EQ(code_of(kProto + "X\x00\x00\xff\x00"s), ErrorCode::kCorrupt);
}

TEST(PickleHostile, FunctionsThatRunProgramsAreNamed) {
  const auto found = [](const std::string& global) {
    return find_hostile_global(read(kProto + "c" + global + ".")).name;
  };
  EXPECT_EQ(found("os\nsystem\n"), "os system");
  EXPECT_EQ(found("posix\nsystem\n"), "posix system");
  EXPECT_EQ(found("subprocess\nPopen\n"), "subprocess Popen");
  EXPECT_EQ(found("builtins\neval\n"), "builtins eval");
  EXPECT_EQ(found("__builtin__\ngetattr\n"), "__builtin__ getattr");
  EXPECT_EQ(found("os.path\njoin\n"), "os.path join");
  EXPECT_EQ(found("torch.hub\nload\n"), "torch.hub load");
  EXPECT_EQ(found("torch\nload\n"), "torch load");
  EXPECT_EQ(found("torch.utils.cpp_extension\nload\n"), "torch.utils.cpp_extension load");
  EXPECT_EQ(found("builtins\ntype\n"), "");  // type(None)
  EXPECT_EQ(found("torch.serialization\n_get_layout\n"), "");
  EXPECT_EQ(found("torch.serialization\nload\n"), "torch.serialization load");
  EXPECT_EQ(found("numpy.load\nload\n"), "");
  EXPECT_EQ(found("osmosis\nsystem\n"), "");
  EXPECT_EQ(found("pathlib\nPosixPath\n"), "");
  EXPECT_EQ(found("pathlib\nPath.write_text\n"), "pathlib Path.write_text");
  EXPECT_EQ(found("uuid\nUUID\n"), "");
  EXPECT_EQ(found("copy_reg\n_reconstructor\n"), "");
  EXPECT_EQ(found("torch.utils.data.sampler\nRandomSampler\n"), "");
  EXPECT_EQ(found("argparse\nNamespace\n"), "");
  EXPECT_EQ(found("torch\nSize\n"), "");
  EXPECT_EQ(found("builtins\nValueError\n"), "");
  EXPECT_EQ(found("numpy.core.multiarray\nscalar\n"), "");
  EXPECT_EQ(found("_codecs\nencode\n"), "");
  EXPECT_EQ(found("torch._utils\n_rebuild_tensor_v2\n"), "");
  EXPECT_EQ(found("__builtin__\nset\n"), "");
  EXPECT_EQ(found("collections\nOrderedDict\n"), "");
  EXPECT_EQ(found("torch.storage\n_load_from_bytes\n"), "torch.storage _load_from_bytes");
  EXPECT_EQ(found("torch.storage\nUntypedStorage\n"), "");
}

TEST(PickleHostile, ValuesOfModulesThatStartProgramsAreNot) {
  const auto found = [](const std::string& global) {
    return find_hostile_global(read(kProto + "c" + global + ".")).name;
  };
  for (const char* global :
       {"os\n_Environ\n", "posix\nuname_result\n", "os\nstat_result\n",
        "subprocess\nCompletedProcess\n", "subprocess\nCalledProcessError\n",
        "socket\nAddressFamily\n", "types\nSimpleNamespace\n", "functools\npartial\n"})
    EXPECT_EQ(found(global), "") << global;
  EXPECT_EQ(found("types\nFunctionType\n"), "types FunctionType");
  EXPECT_EQ(found("functools\nreduce\n"), "functools reduce");
  EXPECT_EQ(found("socket\nsocket\n"), "socket socket");
}

TEST(PickleHostile, UsersModulesMayHaveTheNamesOfOldOnes) {
  const auto found = [](const std::string& global) {
    return find_hostile_global(read(kProto + "c" + global + ".")).name;
  };
  for (const char* global : {"commands\nTrain\n", "commands.train\nConfig\n", "pip\nPipeline\n",
                             "pip.model\nBlock\n", "code.model\nBlock\n", "code\nBook\n"})
    EXPECT_EQ(found(global), "") << global;
  EXPECT_EQ(found("commands\ngetoutput\n"), "commands getoutput");
  EXPECT_EQ(found("pip\nmain\n"), "pip main");
  EXPECT_EQ(found("pip\n_internal.main\n"), "pip _internal.main");
  EXPECT_EQ(found("pip._internal.cli.main\nmain\n"), "pip._internal.cli.main main");
  EXPECT_EQ(found("code\ninteract\n"), "code interact");
}

TEST(PickleHostile, ACallIsToldFromANameAlone) {
  const std::string system = "cos\nsystem\n", args = "X\x01\x00\x00\x00x\x85"s;
  EXPECT_FALSE(find_hostile_global(read(kProto + system + ".")).called);
  EXPECT_TRUE(find_hostile_global(read(kProto + system + args + "R.")).called);
  EXPECT_FALSE(find_hostile_global(read(kProto + system + args + "\x81.")).called);
  const HostileGlobal second =
      find_hostile_global(read(kProto + "]cos\npopen\na" + system + args + "Ra."));
  EXPECT_TRUE(second.called);
  EXPECT_EQ(second.name, "os system");
}

TEST(PickleFind, ValuesOfMappingsAreFoundByName) {
  Pickle pickle;
  const NodeId value = pickle.integer(7);
  const NodeId dict = pickle.dict({pickle.integer(1), pickle.none(), pickle.string("k"), value});
  EXPECT_EQ(pickle.find(dict, "k"), value);
  EXPECT_EQ(pickle.find(dict, "1"), kNoNode);
  EXPECT_EQ(pickle.find(pickle.ordered_dict({pickle.string("k"), value}), "k"), value);
  EXPECT_EQ(pickle.find(pickle.list({}), "k"), kNoNode);
  EXPECT_EQ(pickle.find(kNoNode, "k"), kNoNode);
}

}  // namespace
}  // namespace isoshard::checkpoint
