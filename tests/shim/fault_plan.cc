// See fault_plan.h.
#include "tests/shim/fault_plan.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <iterator>

namespace isoshard::shim {
namespace {

using Text = std::string_view;

constexpr std::array<const char*, 7> kDeeds = {"", "half", "one", "none", "flip", "lost", "aside"};

struct Known {
  int error;
  const char* name;
};
constexpr Known kErrors[] = {
    {EACCES, "EACCES"}, {EDQUOT, "EDQUOT"},   {EINTR, "EINTR"},   {EIO, "EIO"},
    {ELOOP, "ELOOP"},   {EMFILE, "EMFILE"},   {ENOENT, "ENOENT"}, {ENAMETOOLONG, "ENAMETOOLONG"},
    {ENOSPC, "ENOSPC"}, {ENOTDIR, "ENOTDIR"}, {EPERM, "EPERM"},   {EROFS, "EROFS"},
    {ESTALE, "ESTALE"}, {ENOMEM, "ENOMEM"},   {EXDEV, "EXDEV"},   {ENFILE, "ENFILE"},
};

[[noreturn]] void refuse(Text text) {
  std::fprintf(stderr, "fault_shim: not understood: %.*s\n", static_cast<int>(text.size()),
               text.data());
  std::_Exit(3);
}

Text next_word(Text* text, char end) {
  const Text word = text->substr(0, text->find(end));
  text->remove_prefix(std::min(text->size(), word.size() + 1));
  return word;
}

Call call_named(Text name) {
  const auto* found = std::find(kCallNames.begin(), kCallNames.end(), name);
  if (found == kCallNames.end()) refuse(name);
  return static_cast<Call>(found - kCallNames.begin());
}

Fault parse(Text text) {
  Fault fault{.call = call_named(next_word(&text, ':'))};
  const Text when = next_word(&text, ':');
  for (const char c : when.substr(0, when.find('+'))) fault.first = 10 * fault.first + (c - '0');
  fault.last = when.ends_with('+') ? INT64_MAX : fault.first;
  if (fault.first < 1) refuse(when);
  const Text what = next_word(&text, '@');
  if (!text.empty()) fault.told_by = call_named(text);
  const auto* deed = std::find(kDeeds.begin() + 1, kDeeds.end(), what);
  if (deed != kDeeds.end()) {
    fault.deed = static_cast<Deed>(deed - kDeeds.begin());
    return fault;
  }
  const auto* known = std::find_if(std::begin(kErrors), std::end(kErrors),
                                   [&](const Known& each) { return each.name == what; });
  if (known == std::end(kErrors)) refuse(what);
  fault.error = known->error;
  return fault;
}

}  // namespace

FaultPlan parse_faults(std::string_view text) {
  FaultPlan plan;
  for (Fault& fault : plan) {
    if (!text.empty()) fault = parse(next_word(&text, ','));
  }
  if (!text.empty()) refuse(text);
  return plan;
}

}  // namespace isoshard::shim
