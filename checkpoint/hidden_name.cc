// See hidden_name.h.
#include "checkpoint/hidden_name.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <fstream>

#include "core/mutant.h"
#include "core/random.h"
#include "core/utf8.h"

namespace isoshard::checkpoint {
namespace {

constexpr size_t kNonceDigits = 32;
constexpr size_t kNameBytes = 255 - 1 - 10 - kNonceDigits;  // what a hidden name has for the final

// What a hidden name says of the final one.
std::string shown_part(std::string name) {
  for (const char* pattern : {"zero_pp_rank_", "mp_rank_", "layer_"}) {
    if (name.find(pattern) != std::string::npos && !mutant("hidden_name_like_deepspeeds"))
      std::replace(name.begin(), name.end(), '_', '-');
  }
  size_t length = 0;
  while (length < name.size()) {
    const size_t next = length + decode_utf8(name, length).length;
    if (next > kNameBytes && !mutant("hidden_name_too_long")) break;
    length = next;
  }
  return name.substr(0, length);
}

uint64_t since_epoch(auto now) { return static_cast<uint64_t>(now.time_since_epoch().count()); }

std::string hex(uint64_t number) {
  char digits[17];
  std::snprintf(digits, sizeof digits, "%016llx", static_cast<unsigned long long>(number));
  return digits;
}

// Of the kernel that runs, since it was started; empty where it does not say.
std::string this_system() {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string text;
  std::getline(file, text);
  if (text.empty()) return "";
  uint64_t sum = text.size();
  for (char c : text) sum = keyed_random(sum, {static_cast<unsigned char>(c)});
  return hex(sum);
}

}  // namespace

SplitPath split_path(const std::string& path) {
  const size_t end = path.find_last_not_of('/');
  if (end == std::string::npos) return {.parent = path.empty() ? "." : "/", .name = ""};
  const size_t slash = path.find_last_of('/', end);
  if (slash == std::string::npos) return {.parent = ".", .name = path.substr(0, end + 1)};
  const size_t last = path.find_last_not_of('/', slash);
  return {.parent = last == std::string::npos ? "/" : path.substr(0, last + 1),
          .name = path.substr(slash + 1, end - slash)};
}

std::string join_path(const std::string& folder, const std::string& name) {
  return folder == "/" ? "/" + name : folder + "/" + name;
}

// The one use of a clock.
std::string nonce() {
  static std::atomic<uint64_t> calls{0};
  const uint64_t wall = since_epoch(std::chrono::system_clock::now());
  const uint64_t steady = since_epoch(std::chrono::steady_clock::now());
  const auto process = static_cast<uint64_t>(::getpid());
  const uint64_t call = calls.fetch_add(1);
  std::string system = this_system();
  if (system.empty()) system = hex(keyed_random(steady, {call, process, wall}));
  return hex(keyed_random(wall, {process, call, steady})) + system;
}

std::string hidden_name(const std::string& name) {
  return "." + shown_part(name) + kStagingMark + nonce();
}

bool is_hidden_name_of(const std::string& name, const std::string& hidden) {
  const std::string begin = "." + shown_part(name) + kStagingMark;
  return hidden.size() == begin.size() + kNonceDigits && hidden.starts_with(begin) &&
         ends_in_nonce(hidden, kStagingMark);
}

bool ends_in_nonce(const std::string& name, const std::string& mark) {
  if (name.size() < mark.size() + kNonceDigits) return false;
  const size_t digits_at = name.size() - kNonceDigits;
  return name.compare(digits_at - mark.size(), mark.size(), mark) == 0 &&
         name.find_first_not_of("0123456789abcdef", digits_at) == std::string::npos;
}

bool is_mark_and_nonce(const std::string& name, const std::string& mark) {
  return name.size() == mark.size() + kNonceDigits && ends_in_nonce(name, mark);
}

bool made_on_this_machine(const std::string& name) {
  const std::string system = this_system();
  return !system.empty() && name.ends_with(system);
}

}  // namespace isoshard::checkpoint
