// Communicator: the only way from one rank to another, as one member of one group sees it. Verbs
// and their meaning are NCCL's; buffers lie on the host. Every call says what it sends and what it
// expects to receive, so that an implementation can compare both ends.
//
// All members call the same verbs in the same order. What does not agree (verb, dtype, counts,
// root) is an Error(kMismatch) that names both call sites; an implementation that cannot tell may
// wait for ever, the simulated one does not.
//
// Reductions of integers, and kMax of numbers, do not depend on any order (that of NaN does, and
// which of two zeros is taken). A kSum of floats is added in rank
// order, here and now: bits that must not depend on the ranks go by core/canonical_sum.h instead.
//
// In place: all_reduce and broadcast by nature; all_gather where target[rank()] is the source;
// reduce_scatter where target is source[rank()]; all_to_all where each target[p] is source[p].
// Buffers that overlap otherwise are the caller's mistake.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include "core/dtype.h"

namespace isoshard {

using CallSite = std::source_location;

enum class Verb {
  kAllReduce,
  kReduceScatter,
  kAllGather,
  kAllToAll,
  kBroadcast,
  kSend,
  kReceive,
  kBarrier,
};
const char* name(Verb verb);  // "all_reduce", …

enum class Reduction { kSum, kMax };

// `count` elements at `data`.
struct ConstBuffer {
  DType dtype = DType::kFloat32;
  const std::byte* data = nullptr;
  int64_t count = 0;
  int64_t size_bytes() const { return count * item_size_bytes(dtype); }
};
struct Buffer {
  DType dtype = DType::kFloat32;
  std::byte* data = nullptr;
  int64_t count = 0;
  int64_t size_bytes() const { return count * item_size_bytes(dtype); }
};

template <typename T>
constexpr DType dtype_of() {
  if constexpr (std::is_same_v<T, double>) return DType::kFloat64;
  if constexpr (std::is_same_v<T, float>) return DType::kFloat32;
  if constexpr (std::is_same_v<T, int64_t>) return DType::kInt64;
  if constexpr (std::is_same_v<T, uint16_t>) return DType::kUInt16;
  if constexpr (std::is_same_v<T, uint8_t>) return DType::kUInt8;
  if constexpr (std::is_same_v<T, int32_t>) return DType::kInt32;
}
template <typename T>
ConstBuffer const_buffer(std::span<const T> items) {
  return {dtype_of<T>(), reinterpret_cast<const std::byte*>(items.data()),
          static_cast<int64_t>(items.size())};
}
template <typename T>
Buffer buffer(std::span<T> items) {
  return {dtype_of<T>(), reinterpret_cast<std::byte*>(items.data()),
          static_cast<int64_t>(items.size())};
}

class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual const std::string& group() const = 0;  // as it is printed: "dp.sp 0,2,4"
  virtual int rank() const = 0;                  // in the group
  virtual int size() const = 0;

  // Element by element over all ranks, in place.
  virtual void all_reduce(Buffer values, Reduction reduction,
                          CallSite site = CallSite::current()) = 0;
  // source[p] is this rank's contribution to rank p, target the sum of what is for this rank.
  virtual void reduce_scatter(std::span<const ConstBuffer> source, Buffer target,
                              Reduction reduction, CallSite site = CallSite::current()) = 0;
  // target[p] receives rank p's source.
  virtual void all_gather(ConstBuffer source, std::span<const Buffer> target,
                          CallSite site = CallSite::current()) = 0;
  // source[p] goes to rank p, target[p] comes from rank p.
  virtual void all_to_all(std::span<const ConstBuffer> source, std::span<const Buffer> target,
                          CallSite site = CallSite::current()) = 0;
  virtual void broadcast(Buffer values, int root, CallSite site = CallSite::current()) = 0;
  // Returns when the other side has the values.
  virtual void send(ConstBuffer source, int to, CallSite site = CallSite::current()) = 0;
  virtual void receive(Buffer target, int from, CallSite site = CallSite::current()) = 0;
  virtual void barrier(CallSite site = CallSite::current()) = 0;
};

// all_to_all of vectors; `counts` says how many elements come from each rank.
template <typename T>
std::vector<std::vector<T>> exchange(Communicator& group, const std::vector<std::vector<T>>& source,
                                     const std::vector<int64_t>& counts,
                                     CallSite site = CallSite::current()) {
  std::vector<std::vector<T>> target(counts.size());
  std::vector<ConstBuffer> send;
  std::vector<Buffer> receive;
  for (size_t p = 0; p < counts.size(); ++p) {
    target[p].resize(static_cast<size_t>(counts[p]));
    send.push_back(const_buffer(std::span<const T>(source[p])));
    receive.push_back(buffer(std::span<T>(target[p])));
  }
  group.all_to_all(send, receive, site);
  return target;
}

}  // namespace isoshard
