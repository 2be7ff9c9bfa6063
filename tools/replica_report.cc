// See replica_report.h.
#include "tools/replica_report.h"

#include <vector>

#include "reshard/report_text.h"

namespace isoshard::tools {
namespace {

using reshard::count_of;
using reshard::ReplicaCount;
using reshard::ReplicaDifference;
using reshard::ReplicaKind;
using reshard::ReplicaReport;

std::string padded(std::string text, size_t width, bool right) {
  if (text.size() >= width) return text;
  const std::string blanks(width - text.size(), ' ');
  return right ? blanks + text : text + blanks;
}

// Of pairs nobody has counted the elements; the line "copies" has them.
std::string row(const std::vector<std::string>& cells) {
  std::string text = padded(cells[0], 18, false);
  for (size_t i = 1; i < cells.size(); ++i) text += padded(cells[i], 11, true);
  return text;
}

}  // namespace

std::string replica_table(const ReplicaReport& report) {
  std::string text;
  for (int kind = 0; kind < reshard::kReplicaKinds; ++kind) {
    const ReplicaCount& count = report.counts[static_cast<size_t>(kind)];
    if (count.sets == 0) continue;
    text += "\n" + row({name(static_cast<ReplicaKind>(kind)), std::to_string(count.sets),
                        std::to_string(count.copies), std::to_string(count.differing)});
  }
  if (text.empty()) return "nothing is stored more than once";
  return row({"kind", "sets", "copies", "differing"}) + text;
}

nlohmann::json replica_counts(const ReplicaReport& report) {
  nlohmann::json result = nlohmann::json::object();
  for (int kind = 0; kind < reshard::kReplicaKinds; ++kind) {
    const ReplicaCount& count = report.counts[static_cast<size_t>(kind)];
    result[name(static_cast<ReplicaKind>(kind))] = {
        {"sets", count.sets}, {"copies", count.copies}, {"differing", count.differing}};
  }
  return result;
}

nlohmann::json replica_json(const ReplicaDifference& d) {
  nlohmann::json object = {{"kind", "replica"},
                           {"what", name(d.kind)},
                           {"name", d.name},
                           {"state", d.state},
                           {"majority", d.majority},
                           {"judged", d.judged},
                           {"evidence", d.evidence},
                           {"groups", d.groups},
                           {"copies", nlohmann::json::array()},
                           {"alone", nlohmann::json::array()},
                           {"contrasts", nlohmann::json::array()}};
  for (const reshard::ReplicaCopy& copy : d.copies)
    object["copies"].push_back({{"file", copy.file}, {"place", copy.place}});
  for (size_t g = 1; d.majority && g < d.groups.size(); ++g) {
    if (d.groups[g].size() == 1) object["alone"].push_back(d.groups[g][0]);
  }
  for (const reshard::CopyContrast& c : d.contrasts) {
    object["contrasts"].push_back({{"copy", c.copy},
                                   {"against", c.against},
                                   {"file", c.file},
                                   {"entry", c.entry},
                                   {"index", c.index},
                                   {"offset_bytes", c.offset_bytes},
                                   {"expected", c.expected},
                                   {"found", c.found},
                                   {"differing", c.differing},
                                   {"elements", c.total},
                                   {"how", c.how}});
  }
  return object;
}

std::string deep_text(const reshard::DeepReading& deep) {
  std::string text = deep.twice ? "all files twice, with the same digest" : "not all files twice";
  text += "; the system was asked to drop its copies of " +
          count_of(static_cast<size_t>(deep.dropped), "file");
  if (deep.kept > 0) text += ", of " + std::to_string(deep.kept) + " more that failed";
  if (deep.other_files > 0)
    text += "; " + count_of(static_cast<size_t>(deep.other_files), "other file") + " can be read";
  return text;
}

nlohmann::json deep_json(const reshard::DeepReading& deep) {
  return {{"dropped", deep.dropped},
          {"kept", deep.kept},
          {"other_files", deep.other_files},
          {"twice", deep.twice}};
}

}  // namespace isoshard::tools
