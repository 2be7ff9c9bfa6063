// See replicas.h: what is found, in words.
#include <map>

#include "core/error.h"
#include "reshard/replicas.h"
#include "reshard/report_text.h"
#include "reshard/tensor_values.h"

namespace isoshard::reshard {
namespace {

constexpr size_t kListed = 4;

std::string copy_text(const ReplicaDifference& difference, int number) {
  const ReplicaCopy& copy = difference.copies[static_cast<size_t>(number)];
  if (copy.place.empty()) return quote(copy.file);
  return copy.place + " (" + quote(copy.file) + ")";
}

std::string group_text(const ReplicaDifference& difference, const std::vector<int>& group) {
  std::string text;
  for (size_t i = 0; i < group.size() && i < kListed; ++i)
    text += (i == 0 ? "" : ", ") + copy_text(difference, group[i]);
  if (group.size() > kListed) text += " and " + std::to_string(group.size() - kListed) + " more";
  return text;
}

std::string contrast_text(const ReplicaDifference& difference, const CopyContrast& contrast) {
  std::string text = contrast.index.empty() ? "" : contrast.index + " ";
  text += contrast.found + " instead of " + contrast.expected;
  if (contrast.offset_bytes >= 0)
    text += " (" + quote(contrast.file) +
            (contrast.entry.empty() ? "" : " " + plain_name(contrast.entry)) + ", byte " +
            std::to_string(contrast.offset_bytes) + ")";
  if (contrast.total > 0) {
    text += "; " + std::to_string(contrast.differing) + " of " +
            count_of(static_cast<size_t>(contrast.total), "element") + " differ";
  }
  if (!contrast.how.empty()) text += ": " + contrast.how;
  if (difference.groups.size() > 2) text = copy_text(difference, contrast.copy) + " " + text;
  return text;
}

std::string who(const ReplicaDifference& d) {
  if (!d.majority) {
    return d.copies.size() == 2 ? "no majority, either may be wrong" : "no majority";
  }
  std::string text;
  for (size_t g = 1; g < d.groups.size(); ++g) {
    text += (g == 1 ? "" : "; ") + std::string(d.groups[g].size() == 1 ? "alone: " : "fewer: ") +
            group_text(d, d.groups[g]);
  }
  return text + "; " + std::to_string(d.groups[0].size()) + " alike: " + group_text(d, d.groups[0]);
}

const char* paragraph_of(ReplicaKind kind) {
  switch (kind) {
    case ReplicaKind::kTensor:
      return "Ranks differ in tensors that they hold alike";
    case ReplicaKind::kBuffer:
      return "Ranks differ in a buffer, and not as statistics of their own would";
    case ReplicaKind::kMaster:
      return "Masters do not round to the model's own copies";
    case ReplicaKind::kRestated:
      return "zero/<name>/fp32.pt differs from the model's own tensor";
    case ReplicaKind::kTied:
      return "Tied names hold different values";
    case ReplicaKind::kValue:
      return "Ranks differ in values that they all repeat";
    case ReplicaKind::kClientState:
      break;
  }
  return "Ranks were given different client state";
}

}  // namespace

const char* name(ReplicaKind kind) {
  switch (kind) {
    case ReplicaKind::kTensor:
      return "tensors of ranks";
    case ReplicaKind::kBuffer:
      return "buffers of ranks";
    case ReplicaKind::kMaster:
      return "masters";
    case ReplicaKind::kRestated:
      return "restated tensors";
    case ReplicaKind::kTied:
      return "tied names";
    case ReplicaKind::kValue:
      return "values of ranks";
    case ReplicaKind::kClientState:
      break;
  }
  return "client state";
}

std::string describe(const ReplicaDifference& difference) {
  std::string text = quote(difference.name);
  if (!difference.state.empty()) text += " " + plain_name(difference.state);
  text += ", " + std::to_string(difference.copies.size()) + " copies";
  text += ": " + who(difference);
  for (size_t i = 0; i < difference.contrasts.size() && i < kListed; ++i)
    text += "\n  " + contrast_text(difference, difference.contrasts[i]);
  if (!difference.evidence.empty()) text += "\n  " + difference.evidence;
  return text;
}

ReplicaTexts tell_replicas(const ReplicaReport& report) {
  ReplicaTexts texts;
  std::map<std::pair<ReplicaKind, bool>, std::vector<std::string>> details;
  for (const ReplicaDifference& d : report.differences) {
    const bool pair = d.kind == ReplicaKind::kMaster || d.kind == ReplicaKind::kRestated ||
                      d.kind == ReplicaKind::kTied;
    if (!pair)
      details[{d.kind, d.judged}].push_back(describe(d));
    else if (!d.evidence.empty())
      texts.notices.push_back(quote(d.name) + ": " + d.evidence);
  }
  for (const auto& [key, list] : details) {
    const auto& [kind, judged] = key;
    const int64_t sets = report.counts[static_cast<size_t>(kind)].sets;
    std::string title = paragraph_of(kind);
    if (!judged && kind == ReplicaKind::kBuffer)
      title = "Every rank has its own values of a buffer, as statistics of batches are";
    const std::string text = with_details(
        title + ", in " + std::to_string(list.size()) + " of " + std::to_string(sets) +
            (judged ? "." : "; a rank may have its own, so this is told and not judged."),
        list);
    (judged ? texts.findings : texts.notices).push_back(text);
  }
  return texts;
}

}  // namespace isoshard::reshard
