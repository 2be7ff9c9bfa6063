// See team.h.
#include "reshard/team.h"

#include <algorithm>
#include <limits>
#include <string>

#include "core/error.h"
#include "core/mutant.h"

namespace isoshard::reshard {

// Each rank gets a part of the words of all, XORs them, and all get all parts.
void xor_over(Communicator& team, std::vector<uint64_t>* words) {
  const auto n = static_cast<size_t>(team.size()), me = static_cast<size_t>(team.rank());
  const size_t count = words->size();
  const auto begin = [&](size_t p) { return count * p / n; };
  const auto part = [&](size_t p) {
    return std::span<uint64_t>(*words).subspan(begin(p), begin(p + 1) - begin(p));
  };
  const size_t own = part(me).size();
  std::vector<uint64_t> theirs(own * n);
  const auto view = [](std::span<uint64_t> items) {
    return Buffer{DType::kUInt64, reinterpret_cast<std::byte*>(items.data()),
                  static_cast<int64_t>(items.size())};
  };
  std::vector<ConstBuffer> source;
  std::vector<Buffer> target;
  for (size_t p = 0; p < n; ++p) {
    const Buffer sent = view(part(p));
    source.push_back({sent.dtype, sent.data, sent.count});
    target.push_back(view(std::span(theirs).subspan(own * p, own)));
  }
  team.all_to_all(source, target);
  for (size_t i = 0; i < own; ++i) {
    uint64_t word = 0;
    for (size_t p = 0; p < n; ++p) word ^= theirs[own * p + i];
    part(me)[i] = word;
  }
  for (size_t p = 0; p < n; ++p) target[p] = view(part(p));
  team.all_gather({target[me].dtype, target[me].data, target[me].count}, target);
}

void sum_over(Communicator& team, std::vector<int64_t>* numbers) {
  team.all_reduce(buffer(std::span<int64_t>(*numbers)), Reduction::kSum);
}

void broadcast_text(Communicator& team, std::string* text) {
  auto size = static_cast<int64_t>(text->size());
  team.broadcast(buffer(std::span<int64_t>(&size, 1)), 0);
  text->resize(static_cast<size_t>(size));
  team.broadcast({DType::kUInt8, reinterpret_cast<std::byte*>(text->data()), size}, 0);
}

void agree(Communicator& team, const std::exception_ptr& failure) {
  constexpr int64_t kNone = std::numeric_limits<int64_t>::min();
  int64_t first = failure ? -static_cast<int64_t>(team.rank()) : kNone;
  team.all_reduce(buffer(std::span<int64_t>(&first, 1)), Reduction::kMax);
  if (failure) std::rethrow_exception(failure);
  if (first == kNone || mutant("team_failure_unheard")) return;
  const std::string rank = "rank " + std::to_string(-first);
  throw Error(ErrorInfo{.code = ErrorCode::kInterrupted,
                        .what = "Another rank could not go on: " + rank + ".",
                        .found = rank + " says why",
                        .next = "look at what " + rank + " prints"});
}

}  // namespace isoshard::reshard
