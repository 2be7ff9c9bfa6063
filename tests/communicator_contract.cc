// See communicator_contract.h.
#include "tests/communicator_contract.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "core/check.h"
#include "core/random.h"

namespace isoshard::tests {
namespace {

constexpr DType kMoved[] = {
    DType::kFloat64, DType::kFloat32, DType::kFloat16,      DType::kBFloat16, DType::kInt64,
    DType::kInt32,   DType::kInt16,   DType::kInt8,         DType::kUInt8,    DType::kBool,
    DType::kUInt16,  DType::kUInt32,  DType::kFloat8E4M3FN, DType::kUInt64,   DType::kComplex128};

using Bytes = std::vector<std::byte>;

// Any bits, NaN payloads among them; a function of who sends what to whom.
Bytes bits(DType dtype, int64_t count, uint64_t from, uint64_t to, uint64_t round) {
  Bytes bytes(static_cast<size_t>(count * item_size_bytes(dtype)));
  for (size_t i = 0; i < bytes.size(); ++i) {
    const uint64_t word = mix(mix(mix(from) ^ to) ^ (round << 20) ^ i);
    bytes[i] = static_cast<std::byte>(word & 0xFF);
  }
  return bytes;
}

ConstBuffer view(const Bytes& bytes, DType dtype) {
  return {dtype, bytes.data(), static_cast<int64_t>(bytes.size()) / item_size_bytes(dtype)};
}
Buffer view(Bytes& bytes, DType dtype) {
  return {dtype, bytes.data(), static_cast<int64_t>(bytes.size()) / item_size_bytes(dtype)};
}

// How many elements go from one member to another: uneven, some none.
int64_t count_of(int from, int to, int round) {
  return (from * 3 + to * 5 + round) % 4 == 0 ? 0 : (from * 7 + to * 11 + round * 13) % 37;
}

void move_all_to_all(Communicator& group, DType dtype, int round, bool in_place) {
  std::vector<Bytes> source, target;
  std::vector<ConstBuffer> sends;
  std::vector<Buffer> receives;
  const int n = group.size(), me = group.rank();
  for (int p = 0; p < n; ++p) {
    const int64_t to = in_place ? 9 : count_of(me, p, round);
    const int64_t from = in_place ? 9 : count_of(p, me, round);
    source.push_back(bits(dtype, to, me, p, round));
    target.push_back(bits(dtype, from, 99, 99, 99));
  }
  for (int p = 0; p < n; ++p) {
    const auto i = static_cast<size_t>(p);
    sends.push_back(view(std::as_const(source[i]), dtype));
    receives.push_back(view(in_place ? source[i] : target[i], dtype));
  }
  group.all_to_all(sends, receives);
  for (int p = 0; p < n; ++p) {
    const auto i = static_cast<size_t>(p);
    const Bytes& found = in_place ? source[i] : target[i];
    const auto count = static_cast<int64_t>(found.size()) / item_size_bytes(dtype);
    CHECK(found == bits(dtype, count, p, me, round), "all_to_all brought other bits");
    if (!in_place) {
      CHECK(source[i] == bits(dtype, count_of(me, p, round), me, p, round),
            "all_to_all changed a source");
    }
  }
}

void every_move(Communicator& group, DType dtype, int round) {
  const int n = group.size(), me = group.rank();
  move_all_to_all(group, dtype, round, false);
  move_all_to_all(group, dtype, round, true);

  std::vector<Bytes> gathered;
  std::vector<Buffer> places;
  for (int p = 0; p < n; ++p) gathered.push_back(bits(dtype, count_of(p, 1, round), 99, 99, 99));
  for (Bytes& part : gathered) places.push_back(view(part, dtype));
  Bytes own = bits(dtype, count_of(me, 1, round), me, 1, round);
  const bool in_place = round % 2 == 1;
  if (in_place) gathered[static_cast<size_t>(me)] = own;
  group.all_gather(view(std::as_const(in_place ? gathered[static_cast<size_t>(me)] : own), dtype),
                   places);
  for (int p = 0; p < n; ++p) {
    CHECK(gathered[static_cast<size_t>(p)] == bits(dtype, count_of(p, 1, round), p, 1, round),
          "all_gather brought other bits");
  }

  for (int root = 0; root < n; ++root) {
    const int64_t count = root == 1 ? 0 : 21 + root;
    Bytes values = bits(dtype, count, me, 2, round);
    group.broadcast(view(values, dtype), root);
    CHECK(values == bits(dtype, count, root, 2, round), "broadcast brought other bits");
  }

  for (int step = 1; step < n; ++step) {  // a ring of messages, one member after the other
    const int to = (me + step) % n, from = (me + n - step) % n;
    const Bytes sent = bits(dtype, count_of(me, to, round), me, to, round);
    Bytes received = bits(dtype, count_of(from, me, round), 99, 99, 99);
    for (int phase = 0; phase < n; ++phase) {
      if (phase == me) group.send(view(sent, dtype), to);
      if (phase == from) group.receive(view(received, dtype), from);
    }
    CHECK(received == bits(dtype, count_of(from, me, round), from, me, round),
          "a message brought other bits");
  }
  group.barrier();
}

template <typename T>
T value_of(int rank, int64_t i) {
  return static_cast<T>((mix(static_cast<uint64_t>(rank) << 32 | static_cast<uint64_t>(i)) >> 40) %
                        1000) /
         static_cast<T>(std::is_integral_v<T> ? 1 : 7);
}

// By the definition: member after member, in the dtype.
template <typename T>
T reduced(int n, int64_t i, Reduction reduction) {
  T result = value_of<T>(0, i);
  for (int p = 1; p < n; ++p) {
    const T other = value_of<T>(p, i);
    result =
        reduction == Reduction::kMax ? std::max(result, other) : static_cast<T>(result + other);
  }
  return result;
}

template <typename T>
bool same_bits(T a, T b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

template <typename T>
void every_reduction(Communicator& group) {
  const int n = group.size(), me = group.rank();
  for (const Reduction reduction : {Reduction::kSum, Reduction::kMax}) {
    for (const int64_t count : {0, 1, 2, 3, 7, 64, 1001}) {
      std::vector<T> values;
      for (int64_t i = 0; i < count; ++i) values.push_back(value_of<T>(me, i));
      group.all_reduce(buffer(std::span<T>(values)), reduction);
      for (int64_t i = 0; i < count; ++i) {
        CHECK(same_bits(values[static_cast<size_t>(i)], reduced<T>(n, i, reduction)),
              "all_reduce gave other bits");
      }
    }
    for (const bool in_place : {false, true}) {
      std::vector<std::vector<T>> source;
      std::vector<ConstBuffer> shares;
      for (int p = 0; p < n; ++p) {
        std::vector<T> share;
        for (int64_t i = 0; i < (p * 5) % 8; ++i) share.push_back(value_of<T>(me, p * 100 + i));
        source.push_back(share);
      }
      for (const std::vector<T>& share : source)
        shares.push_back(const_buffer(std::span<const T>(share)));
      std::vector<T> own(source[static_cast<size_t>(me)].size());
      std::vector<T>& target = in_place ? source[static_cast<size_t>(me)] : own;
      group.reduce_scatter(shares, buffer(std::span<T>(target)), reduction);
      for (size_t i = 0; i < target.size(); ++i) {
        const T expected = reduced<T>(n, me * 100 + static_cast<int64_t>(i), reduction);
        CHECK(same_bits(target[i], expected), "reduce_scatter gave other bits");
      }
    }
  }
}

constexpr GroupKind kKinds[] = {GroupKind::kWorld,    GroupKind::kData,      GroupKind::kSequence,
                                GroupKind::kTensor,   GroupKind::kZero,      GroupKind::kExpert,
                                GroupKind::kPipeline, GroupKind::kExpertData};

// The sum of a group's ranks, by its members' numbers in the world.
void sum_of(ContractRank& rank, GroupKind kind) {
  Communicator& group = rank.group(kind);
  const std::vector<int> ranks = group_of(rank.topology, kind, rank.world.rank());
  CHECK(group.size() == static_cast<int>(ranks.size()), "a group has another number of members");
  CHECK(ranks[static_cast<size_t>(group.rank())] == rank.world.rank(), "another member");
  int64_t sum = rank.world.rank(), expected = 0;
  for (const int member : ranks) expected += member;
  group.all_reduce(buffer(std::span<int64_t>(&sum, 1)), Reduction::kSum);
  CHECK(sum == expected, "a group is of other ranks");
}

// Groups that overlap are used one after the other, and made when first used, by ranks that come
// to them in one order that the group's members share, in any order otherwise.
void groups_in_turn(ContractRank& rank) {
  for (int round = 0; round < 3; ++round) {
    for (const GroupKind kind : kKinds) sum_of(rank, kind);
  }
  every_move(rank.group(GroupKind::kData), DType::kFloat32, 3);
  every_move(rank.group(GroupKind::kSequence), DType::kInt16, 4);
}

void large_buffers(ContractRank& rank) {
  Communicator& world = rank.world;
  const int64_t count = (int64_t{1} << 20) + 3;
  Bytes values = bits(DType::kUInt8, count, world.rank(), 7, 0);
  world.broadcast(view(values, DType::kUInt8), world.size() - 1);
  CHECK(values == bits(DType::kUInt8, count, world.size() - 1, 7, 0), "a large buffer changed");
  std::vector<float> sum(100'003, static_cast<float>(world.rank() + 1));
  world.all_reduce(buffer(std::span<float>(sum)), Reduction::kSum);
  const auto n = static_cast<float>(world.size());
  CHECK(std::ranges::all_of(sum, [&](float x) { return x == n * (n + 1) / 2; }), "a wrong sum");
}

// Many calls in flight one behind the other, some ranks slower than others.
void many_calls(ContractRank& rank) {
  Communicator& world = rank.world;
  for (int64_t i = 0; i < 200; ++i) {
    int64_t value = i + world.rank();
    if ((i + world.rank()) % 5 == 0) sum_of(rank, GroupKind::kWorld);
    if ((i + world.rank()) % 5 != 0) sum_of(rank, GroupKind::kWorld);
    world.broadcast(buffer(std::span<int64_t>(&value, 1)), static_cast<int>(i) % world.size());
    CHECK(value == i + i % world.size(), "a call met another's values");
  }
}

template <typename T>
void reduce(Communicator& group, int64_t count, Reduction reduction) {
  std::vector<T> values(static_cast<size_t>(count));
  group.all_reduce(buffer(std::span<T>(values)), reduction);
}

template <typename T>
void gather(Communicator& group, int64_t own, int64_t others) {
  const std::vector<T> source(static_cast<size_t>(own));
  std::vector<std::vector<T>> target;
  std::vector<Buffer> places;
  for (int p = 0; p < group.size(); ++p) {
    target.emplace_back(static_cast<size_t>(p == group.rank() ? own : others));
  }
  for (std::vector<T>& part : target) places.push_back(buffer(std::span<T>(part)));
  group.all_gather(const_buffer(std::span<const T>(source)), places);
}

template <typename T>
void message(Communicator& world, int64_t count) {
  std::vector<T> values(static_cast<size_t>(count));
  if (world.rank() == 0) world.send(const_buffer(std::span<const T>(values)), 1);
  if (world.rank() == 1) world.receive(buffer(std::span<T>(values)), 0);
  if (world.rank() > 1) world.barrier();  // for the other two: it never comes
}

}  // namespace

std::vector<ContractCase> contract_cases() {
  std::vector<ContractCase> cases;
  for (size_t i = 0; i < std::size(kMoved); ++i) {
    const DType dtype = kMoved[i];
    cases.push_back({std::string("moves_") + name(dtype), [=](ContractRank& rank) {
                       every_move(rank.world, dtype, static_cast<int>(i));
                     }});
  }
  const auto reductions = [&](const char* name, void (*body)(Communicator&)) {
    cases.push_back(
        {std::string("reduces_") + name, [=](ContractRank& rank) { body(rank.world); }});
  };
  reductions("float64", every_reduction<double>);
  reductions("float32", every_reduction<float>);
  reductions("int64", every_reduction<int64_t>);
  reductions("int32", every_reduction<int32_t>);
  reductions("uint16", every_reduction<uint16_t>);
  reductions("uint8", every_reduction<uint8_t>);
  cases.push_back({"groups_in_turn", groups_in_turn});
  cases.push_back({"large_buffers", large_buffers});
  cases.push_back({"many_calls", many_calls});
  return cases;
}

std::vector<ContractCase> disagreements() {
  const auto last = [](ContractRank& rank) { return rank.world.rank() == rank.world.size() - 1; };
  return {
      {"verb",
       [=](ContractRank& rank) {
         last(rank) ? rank.world.barrier() : reduce<float>(rank.world, 1, Reduction::kSum);
       }},
      {"dtype",
       [=](ContractRank& rank) {
         last(rank) ? reduce<int64_t>(rank.world, 1, Reduction::kSum)
                    : reduce<float>(rank.world, 1, Reduction::kSum);
       }},
      {"count",
       [=](ContractRank& rank) { reduce<float>(rank.world, last(rank) ? 4 : 3, Reduction::kSum); }},
      {"reduction",
       [=](ContractRank& rank) {
         reduce<float>(rank.world, 3, last(rank) ? Reduction::kMax : Reduction::kSum);
       }},
      {"root",
       [=](ContractRank& rank) {
         float value = 0;
         rank.world.broadcast(buffer(std::span<float>(&value, 1)), last(rank) ? 0 : 1);
       }},
      {"one_count_of_several",
       [=](ContractRank& rank) { gather<float>(rank.world, 3, last(rank) ? 2 : 3); }},
      {"count_of_a_message",
       [=](ContractRank& rank) { message<float>(rank.world, rank.world.rank() == 0 ? 2 : 3); }},
      {"dtype_of_a_message",
       [=](ContractRank& rank) {
         rank.world.rank() == 0 ? message<float>(rank.world, 2) : message<int32_t>(rank.world, 2);
       }},
  };
}

std::vector<Topology> contract_topologies(int most_ranks) {
  std::vector<Topology> list = {
      {.data = 1},     {.data = 2},
      {.data = 3},     {.data = 2, .sequence = 2},
      {.data = 5},     {.data = 3, .tensor = 2},
      {.sequence = 7}, {.data = 2, .sequence = 2, .expert = 2, .pipeline = 2},
      {.data = 13},    {.data = 2, .sequence = 3, .tensor = 2, .expert = 4, .pipeline = 2},
  };
  std::erase_if(list, [=](const Topology& topology) { return topology.world() > most_ranks; });
  return list;
}

}  // namespace isoshard::tests
