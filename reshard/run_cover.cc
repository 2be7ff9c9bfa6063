// See run_cover.h.
#include "reshard/run_cover.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <tuple>

#include "checkpoint/cancel.h"

namespace isoshard::reshard {
namespace {

constexpr size_t kMaxRuns = 64;
constexpr int64_t kMaxSkip = 1 << 20;     // of repeated values before a telling window
constexpr int64_t kMaxScan = 16'000'000;  // elements read in search of a tensor below the window

class RunCover {
 public:
  RunCover(const std::vector<TensorValues>& originals, const WindowIndex& index,
           const TensorValues& found, int own)
      : originals_(originals),
        index_(index),
        found_(found),
        own_(own),
        item_(item_size_bytes(found.dtype)),
        size_(found.size_elements()),
        cursor_(found, 1 << 16) {}

  std::optional<std::vector<Run>> run() {
    if (size_ == 0) return std::nullopt;
    if (size_ < WindowIndex::kWindow) return cover_tiny();
    for (int64_t at = 0; at < size_;) {
      if (runs_.size() == kMaxRuns) return std::nullopt;
      const Run best = longest_at(at);
      if (best.count == 0) return std::nullopt;
      runs_.push_back(best);
      at += best.count;
    }
    return runs_;
  }

 private:
  const TensorValues& original(int tensor) const { return originals_[static_cast<size_t>(tensor)]; }
  int count() const { return static_cast<int>(originals_.size()); }
  bool comparable(int tensor) const {
    return tensor >= 0 && tensor < count() && original(tensor).dtype == found_.dtype;
  }

  // The original that the flat buffer holds behind the last run, or −1.
  int continuation() const {
    if (runs_.empty() || runs_.back().tensor < 0) return -1;
    const Run& last = runs_.back();
    const TensorValues& values = original(last.tensor);
    const int next = last.tensor + 1;
    if (last.begin + last.count != values.size_elements() || !comparable(next)) return -1;
    return original(next).state == values.state ? next : -1;
  }

  // A run shorter than a window counts only where its place speaks for it: a whole tensor, or the
  // beginning of one at the very end of `found`.
  bool telling(const Run& run, int64_t at) const {
    if (run.count >= WindowIndex::kWindow) return true;
    return run.count > 0 && run.begin == 0 &&
           (run.count == original(run.tensor).size_elements() || at + run.count == size_);
  }

  // Keeps the better of two: longer, then in place, then following on, then of the same state.
  void consider(Occurrence place, int64_t at, Run* best) const {
    if (!comparable(place.tensor) || place.begin < 0) return;
    const Run run{place.tensor, place.begin,
                  common_run({original(place.tensor), place.begin}, {found_, at})};
    if (telling(run, at) && rank(run, at) > rank(*best, at)) *best = run;
  }
  std::tuple<int64_t, bool, bool, bool> rank(const Run& run, int64_t at) const {
    if (run.tensor < 0) return {run.count, false, false, false};
    return {run.count, run.tensor == own_ && run.begin == at,
            run.tensor == continuation() && run.begin == 0,
            original(run.tensor).state == found_.state};
  }

  Run longest_at(int64_t at) {
    Run best;
    if (own_ >= 0 && at < original(own_).size_elements()) consider({own_, at}, at, &best);
    consider({continuation(), 0}, at, &best);
    probe(at, &best);
    if (best.count == 0) try_heads(at, &best);
    if (best.count == 0 && at == 0) try_tails(&best);
    const Run constant{-1, 0, constant_run(at)};
    const bool zeros = is_zero(at);
    if (constant.count > best.count && (zeros || constant.count >= WindowIndex::kWindow)) {
      best = constant;
    }
    return best;
  }

  // Windows of `found` from `at` on, as many as lie between two indexed ones.
  void probe(int64_t at, Run* best) {
    std::set<Occurrence> tried;
    int64_t left = index_.stride();
    for (int64_t window = at; window + WindowIndex::kWindow <= size_ && left > 0; ++window) {
      if (window - at > kMaxSkip) return;
      const std::span<const std::byte> bytes = cursor_.at(window, WindowIndex::kWindow);
      if (is_constant(bytes, item_)) continue;
      --left;
      const int64_t before = best->count;
      for (Occurrence place : index_.find(bytes)) {
        place.begin -= window - at;
        if (tried.insert(place).second) consider(place, at, best);
      }
      if (best->count > before && best->count > window - at) return;
    }
  }

  void try_heads(int64_t at, Run* best) {
    const std::vector<std::byte> first = read_elements(found_, at, 1);
    for (int tensor = 0; tensor < count(); ++tensor) {
      const std::span<const std::byte> head = index_.head(tensor);
      if (head.size() < first.size() || !std::equal(first.begin(), first.end(), head.begin())) {
        continue;
      }
      consider({tensor, 0}, at, best);
    }
  }

  // `found` begins with the last one to three elements of a tensor, then goes on with the next one.
  void try_tails(Run* best) {
    for (int64_t few = WindowIndex::kWindow - 1; few > 0 && best->count == 0; --few) {
      const auto bytes = static_cast<size_t>(few * item_);
      const std::vector<std::byte> first = read_elements(found_, 0, few);
      for (int tensor = 0; tensor + 1 < count() && best->count == 0; ++tensor) {
        const std::span<const std::byte> tail = index_.tail(tensor);
        if (tail.size() < bytes || !comparable(tensor + 1)) continue;
        if (!std::equal(first.begin(), first.end(), tail.end() - static_cast<ptrdiff_t>(bytes))) {
          continue;
        }
        const TensorValues& next = original(tensor + 1);
        const int64_t more = common_run({next, 0}, {found_, few});
        const bool goes_on = more >= std::min(next.size_elements(), WindowIndex::kWindow);
        if (goes_on) *best = {tensor, original(tensor).size_elements() - few, few};
      }
    }
  }

  bool is_zero(int64_t at) {
    const std::span<const std::byte> first = cursor_.at(at, 1);
    return std::all_of(first.begin(), first.end(), [](std::byte b) { return b == std::byte{0}; });
  }

  int64_t constant_run(int64_t at) {
    const std::vector<std::byte> first = read_elements(found_, at, 1);
    for (int64_t end = at + 1; end < size_; ++end) {
      const std::span<const std::byte> next = cursor_.at(end, 1);
      if (!std::equal(first.begin(), first.end(), next.begin())) return end - at;
    }
    return size_ - at;
  }

  // Fewer elements than a window: the one place in the originals of the same state that holds them,
  // if there is just one, otherwise that of all originals.
  std::optional<std::vector<Run>> cover_tiny() {
    int64_t total = 0;
    for (int tensor = 0; tensor < count(); ++tensor) total += original(tensor).size_elements();
    if (total > kMaxScan) return std::nullopt;
    for (const bool same_state : {true, false}) {
      std::vector<Occurrence> places;
      for (int tensor = 0; tensor < count() && places.size() < 2; ++tensor) {
        const bool wanted = !same_state || original(tensor).state == found_.state;
        if (wanted && comparable(tensor)) scan(tensor, &places);
      }
      if (places.size() == 1) return {{Run{places[0].tensor, places[0].begin, size_}}};
      if (!places.empty()) return std::nullopt;
    }
    return std::nullopt;
  }

  void scan(int tensor, std::vector<Occurrence>* places) const {
    const std::vector<std::byte> wanted = read_elements(found_, 0, size_);
    ElementCursor cursor(original(tensor), 1 << 16);
    for (int64_t at = 0; at + size_ <= original(tensor).size_elements(); ++at) {
      const std::span<const std::byte> bytes = cursor.at(at, size_);
      if (std::equal(wanted.begin(), wanted.end(), bytes.begin())) places->push_back({tensor, at});
    }
  }

  const std::vector<TensorValues>& originals_;
  const WindowIndex& index_;
  const TensorValues& found_;
  int own_;
  int64_t item_, size_;
  ElementCursor cursor_;
  std::vector<Run> runs_;
};

}  // namespace

int64_t common_run(const RunStart& a, const RunStart& b) {
  const auto item = static_cast<size_t>(item_size_bytes(a.values.dtype));
  const int64_t most =
      std::min(a.values.size_elements() - a.begin, b.values.size_elements() - b.begin);
  int64_t step = 64;
  for (int64_t done = 0; done < most; step = std::min<int64_t>(16 * step, 1 << 16)) {
    checkpoint::throw_if_cancelled();
    const int64_t count = std::min(step, most - done);
    const std::vector<std::byte> x = read_elements(a.values, a.begin + done, count);
    const std::vector<std::byte> y = read_elements(b.values, b.begin + done, count);
    const auto [end, other] = std::mismatch(x.begin(), x.end(), y.begin());
    if (end != x.end()) return done + (end - x.begin()) / static_cast<ptrdiff_t>(item);
    done += count;
  }
  return most;
}

std::optional<std::vector<Run>> cover_with_runs(const std::vector<TensorValues>& originals,
                                                const WindowIndex& index, const TensorValues& found,
                                                int own) {
  return RunCover(originals, index, found, own).run();
}

}  // namespace isoshard::reshard
