// See trace_picture.h.
#include "tools/trace_picture.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <tuple>
#include <vector>

namespace isoshard::tools {
namespace {

using Json = nlohmann::ordered_json;

// Calls of one exchange: the same number in the same group; of a message, between the same ranks.
using Exchange = std::tuple<int, int64_t, int, int>;

// The calls that met, in the trace's order, by whom the others waited for: it stands first.
std::vector<std::vector<size_t>> exchanges(const CollectiveTrace& trace) {
  const std::vector<TraceEvent>& events = trace.events();
  std::map<Exchange, std::vector<size_t>> met;
  for (size_t i = 0; i < events.size(); ++i) {
    const TraceEvent& e = events[i];
    int from = -1, to = -1;
    if (e.verb == Verb::kSend) from = e.rank, to = e.peer;
    if (e.verb == Verb::kReceive) from = e.peer, to = e.rank;
    met[{e.group, e.sequence, from, to}].push_back(i);
  }
  std::vector<std::vector<size_t>> list;
  for (auto& [key, calls] : met) {
    const auto last = std::max_element(calls.begin(), calls.end(), [&](size_t a, size_t b) {
      const auto key = [&](size_t i) {
        return std::pair(events[i].verb == Verb::kSend, events[i].begin);
      };
      return key(a) < key(b);
    });
    std::iter_swap(calls.begin(), last);
    if (calls.size() > 1) list.push_back(std::move(calls));
  }
  return list;
}

const char* color(Verb verb) {
  switch (verb) {
    case Verb::kAllReduce:
      return "#3b6ea5";
    case Verb::kReduceScatter:
      return "#6a9fd4";
    case Verb::kAllGather:
      return "#4f9d69";
    case Verb::kAllToAll:
      return "#c9792b";
    case Verb::kBroadcast:
      return "#8a63b0";
    case Verb::kSend:
      return "#b04a5a";
    case Verb::kReceive:
      return "#d98a96";
    case Verb::kBarrier:
      break;
  }
  return "#888888";
}

struct Slice {
  int64_t begin = 0, end = 0;
};

constexpr int64_t kTick = 100;    // units a tick
constexpr int64_t kShortest = 4;  // of a call that nobody waited for

// A rank's calls one behind the other, also where several fall into one tick.
std::vector<Slice> slices_of(const CollectiveTrace& trace) {
  std::map<int, int64_t> free_from;
  std::vector<Slice> slices;
  for (const TraceEvent& e : trace.events()) {
    int64_t& from = free_from[e.rank];
    Slice slice{std::max(e.begin * kTick, from), 0};
    slice.end = std::max(e.end * kTick, slice.begin + kShortest);
    from = slice.end;
    slices.push_back(slice);
  }
  return slices;
}

}  // namespace

std::string perfetto_json(const CollectiveTrace& trace, int ranks_per_node) {
  Json list = Json::array();
  int most = -1;
  for (const TraceEvent& e : trace.events()) most = std::max(most, e.rank);
  for (int rank = 0; rank <= most; ++rank) {
    const int node = rank / ranks_per_node;
    if (rank % ranks_per_node == 0) {
      list.push_back({{"name", "process_name"},
                      {"ph", "M"},
                      {"pid", node},
                      {"args", {{"name", "node " + std::to_string(node)}}}});
    }
    list.push_back({{"name", "thread_name"},
                    {"ph", "M"},
                    {"pid", node},
                    {"tid", rank},
                    {"args", {{"name", "rank " + std::to_string(rank)}}}});
  }
  const auto at = [&](const TraceEvent& e, const char* phase, int64_t time) {
    return Json{
        {"name", name(e.verb)},           {"cat", "collective"}, {"ph", phase}, {"ts", time},
        {"pid", e.rank / ranks_per_node}, {"tid", e.rank}};
  };
  const std::vector<Slice> slices = slices_of(trace);
  for (size_t i = 0; i < slices.size(); ++i) {
    const TraceEvent& e = trace.events()[i];
    Json slice = at(e, "X", slices[i].begin);
    slice["dur"] = slices[i].end - slices[i].begin;
    slice["args"] = {{"group", trace.groups()[static_cast<size_t>(e.group)]},
                     {"call", e.sequence},
                     {"dtype", name(e.dtype)},
                     {"elements", e.count},
                     {"ticks", std::to_string(e.begin) + " to " + std::to_string(e.end)},
                     {"site", CollectiveTrace::site_text(e.site)}};
    if (e.peer >= 0) slice["args"]["peer"] = e.peer;
    list.push_back(std::move(slice));
  }
  int64_t arrow = 0;
  for (const std::vector<size_t>& calls : exchanges(trace)) {
    for (size_t k = 1; k < calls.size(); ++k) {
      const Slice &from = slices[calls[0]], &to = slices[calls[k]];
      const int64_t leaves = from.begin + 1;
      Json start = at(trace.events()[calls[0]], "s", leaves);
      Json finish = at(trace.events()[calls[k]], "f", std::max(leaves, to.end - 1));
      start["id"] = finish["id"] = ++arrow;
      finish["bp"] = "e";
      list.push_back(std::move(start));
      list.push_back(std::move(finish));
    }
  }
  return Json{{"traceEvents", std::move(list)}, {"displayTimeUnit", "ms"}}.dump() + "\n";
}

std::string svg_picture(const CollectiveTrace& trace, size_t most) {
  const std::vector<TraceEvent>& all = trace.events();
  const std::vector<Slice> slices = slices_of(trace);
  const size_t first = all.size() > most ? all.size() - most : 0;
  int64_t begin = INT64_MAX, end = 0;
  int ranks = 0;
  std::set<Verb> verbs;
  for (size_t i = first; i < all.size(); ++i) {
    begin = std::min(begin, slices[i].begin);
    end = std::max(end, slices[i].end);
    ranks = std::max(ranks, all[i].rank + 1);
    verbs.insert(all[i].verb);
  }
  constexpr int kLeft = 64, kWidth = 1100, kRow = 18;
  const double scale = end > begin ? kWidth / static_cast<double>(end - begin) : 1.0;
  std::ostringstream svg;
  svg << "<svg xmlns=\"http://www.w3.org/2000/svg\" role=\"img\" width=\"" << kLeft + kWidth + 8
      << "\" height=\"" << ranks * kRow + 26
      << "\" font-family=\"sans-serif\" font-size=\"11\"><title>calls of " << ranks
      << " ranks over time</title>\n";
  for (int rank = 0; rank < ranks; ++rank) {
    svg << "<text x=\"0\" y=\"" << rank * kRow + 13 << "\">rank " << rank << "</text>\n";
  }
  for (size_t i = first; i < all.size(); ++i) {
    const TraceEvent& e = all[i];
    const double x = kLeft + static_cast<double>(slices[i].begin - begin) * scale;
    const double width = static_cast<double>(slices[i].end - slices[i].begin) * scale;
    svg << "<rect x=\"" << x << "\" y=\"" << e.rank * kRow + 2 << "\" width=\""
        << std::max(0.5, width) << "\" height=\"" << kRow - 4 << "\" fill=\"" << color(e.verb)
        << "\"><title>rank " << e.rank << ": " << name(e.verb) << ", call " << e.sequence << " of "
        << trace.groups()[static_cast<size_t>(e.group)] << ", " << e.count << " " << name(e.dtype)
        << ", ticks " << e.begin << " to " << e.end << ", " << CollectiveTrace::site_text(e.site)
        << "</title></rect>\n";
  }
  int x = kLeft;
  for (const Verb verb : verbs) {
    svg << "<rect x=\"" << x << "\" y=\"" << ranks * kRow + 8
        << "\" width=\"10\" height=\"10\" fill=\"" << color(verb) << "\"/><text x=\"" << x + 14
        << "\" y=\"" << ranks * kRow + 17 << "\">" << name(verb) << "</text>\n";
    x += 110;
  }
  svg << "</svg>\n";
  return svg.str();
}

}  // namespace isoshard::tools
