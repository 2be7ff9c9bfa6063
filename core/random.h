// The only source of randomness: SplitMix64 keyed by a visible seed. Values may also be keyed by
// logical coordinates, so that they never depend on rank or order.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace isoshard {

// One well-mixed word from a word (Steele, Lea, Flood 2014, "Fast splittable generators").
constexpr uint64_t mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

// The word that belongs to a list of coordinates under a seed.
constexpr uint64_t keyed_random(uint64_t seed, std::initializer_list<uint64_t> coordinates) {
  uint64_t word = mix(seed);
  for (uint64_t coordinate : coordinates) word = mix(word ^ coordinate);
  return word;
}

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() { return mix(state_++); }
  // Uniform in [0, bound); bound > 0. The bias of the modulo is below 2^-32 for bounds used here.
  int64_t below(int64_t bound) {
    return static_cast<int64_t>(next() % static_cast<uint64_t>(bound));
  }
  int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }

 private:
  uint64_t state_;
};

}  // namespace isoshard
