// See life_faults.h.
#include "properties/life_faults.h"

#include <algorithm>
#include <sstream>
#include <utility>
#include <vector>

#include "core/error.h"

namespace isoshard::properties {

using sim::Fault;
using sim::FaultKind;

const char* const kFaultWords = "death,disk,drop,slow,late,duplicate,read";

FaultMenu parse_faults(const std::string& text) {
  FaultMenu menu;
  const std::pair<const char*, bool*> entries[] = {
      {"death", &menu.death}, {"disk", &menu.disk},      {"drop", &menu.drop},
      {"slow", &menu.slow},   {"late", &menu.late},      {"duplicate", &menu.duplicate},
      {"read", &menu.read},   {"corrupt", &menu.corrupt}};
  std::istringstream words(text);
  for (std::string word; std::getline(words, word, ',');) {
    bool known = false;
    for (const auto& [name, chosen] : entries) {
      if (word != name && (word != "all" || chosen == &menu.corrupt)) continue;
      *chosen = known = true;
    }
    if (known) continue;
    throw Error(
        ErrorInfo{.code = ErrorCode::kUsage,
                  .what = "There is no such fault.",
                  .entry = quote(word),
                  .expected = std::string("all, or some of ") + kFaultWords + "; or corrupt",
                  .next = "correct --faults"});
  }
  return menu;
}

Fault draw_fault(const Draw& draw, const FaultMenu& menu) {
  std::vector<Fault> kinds;
  const auto add = [&](bool wanted, std::initializer_list<FaultKind> list, bool reads = false) {
    if (!wanted) return;
    for (const FaultKind kind : list) kinds.push_back({.kind = kind, .of_reads = reads});
  };
  add(menu.death, {FaultKind::kDieBefore, FaultKind::kDieInside, FaultKind::kDieAfter});
  add(menu.disk, {FaultKind::kDiskFull, FaultKind::kQuota, FaultKind::kReadOnly,
                  FaultKind::kNoPermission, FaultKind::kStaleHandle});
  add(menu.drop, {FaultKind::kDrop});
  add(menu.slow, {FaultKind::kSlow});
  add(menu.late, {FaultKind::kDelay, FaultKind::kReorder});
  add(menu.duplicate, {FaultKind::kDuplicate});
  add(menu.read,
      {FaultKind::kIoError, FaultKind::kStaleHandle, FaultKind::kDieBefore, FaultKind::kDieInside,
       FaultKind::kDieAfter},
      true);
  add(menu.corrupt, {FaultKind::kCorrupt});
  // Any operation is as likely, or the early ones are: a load, a first step, a save of a few. A
  // rank reads less often than it calls.
  const bool early = draw(0, 1) == 0;
  const int64_t power = early ? draw(0, 8) : 0;
  Fault fault = kinds[static_cast<size_t>(draw(0, static_cast<int64_t>(kinds.size()) - 1))];
  const int64_t most = fault.of_reads ? 200 : 800;
  fault.rank = static_cast<int>(draw(0, 7));
  fault.operation = draw(0, early ? std::min(most, int64_t{4} << power) : most);
  if (fault.kind == FaultKind::kDelay) fault.choice = static_cast<uint64_t>(draw(0, 64));
  // A low bit, so that a count of elements stays one that memory has room for.
  if (fault.kind == FaultKind::kCorrupt) fault.choice = static_cast<uint64_t>(draw(0, 15));
  return fault;
}

std::string text_of(const Fault& fault) {
  return std::string(sim::name(fault.kind)) + (fault.of_reads ? " at read " : " at operation ") +
         std::to_string(fault.operation) + " of rank " + std::to_string(fault.rank) +
         (fault.kind == FaultKind::kCorrupt ? ", bit " + std::to_string(fault.choice) : "") +
         (fault.kind == FaultKind::kDelay ? ", by " + std::to_string(fault.choice) + " turns"
                                          : "") +
         ", modulo the ranks";
}

}  // namespace isoshard::properties
