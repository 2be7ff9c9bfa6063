// See report.h.
#include "tools/report.h"

#include <algorithm>
#include <sstream>

namespace isoshard::tools {
namespace {

std::string escaped(const std::string& text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

constexpr const char* kStyle =
    "body{font:14px/1.45 system-ui,sans-serif;margin:24px;color:#1c2430;max-width:1200px}"
    "h1{font-size:20px}h2{font-size:16px;margin-top:28px}"
    "pre{background:#f3f5f8;padding:10px;white-space:pre-wrap;overflow-wrap:anywhere}"
    "table{border-collapse:collapse}td,th{border:1px solid #d4dae2;padding:2px 10px;"
    "text-align:right}th:first-child,td:first-child{text-align:left}"
    ".ok{background:#e3f3e6}.bad{background:#f7d4d4;font-weight:600}.none{color:#9aa4b0}"
    ".big{font-size:22px;font-weight:600}.picture{overflow-x:auto}";

void matrix(const SimulationReport& report, std::ostringstream* out) {
  *out << "<table><tr><th>topology</th><th>stage 0</th><th>stage 1</th><th>stage 2</th>"
          "<th>stage 3</th></tr>\n";
  for (const auto& [topology, stages] : report.matrix) {
    *out << "<tr><td>" << escaped(topology) << "</td>";
    for (const auto& [cases, failed] : stages) {
      if (cases == 0) {
        *out << "<td class=\"none\">–</td>";
      } else if (failed == 0) {
        *out << "<td class=\"ok\">" << cases << "</td>";
      } else {
        *out << "<td class=\"bad\">" << failed << " of " << cases << " failed</td>";
      }
    }
    *out << "</tr>\n";
  }
  *out << "</table>\n";
}

}  // namespace

std::string report_html(const SimulationReport& report) {
  std::ostringstream out;
  const int64_t rate = static_cast<int64_t>(60.0 * static_cast<double>(report.cases) /
                                            std::max(report.seconds, 1e-9));
  out << "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">"
         "<title>isoshard simulate</title><style>"
      << kStyle << "</style></head><body>\n<h1>isoshard simulate</h1>\n<p class=\"big\">"
      << report.cases << " cases, " << report.failed << " failed</p>\n<p>" << rate
      << " cases a minute. Each case is a run on simulated ranks that changes its topology and "
         "stage, and with --faults loses ranks, disks and messages; it must be the run on one "
         "rank, bit for bit.</p>\n<pre>"
      << escaped(report.command) << "\n"
      << escaped(report.program) << "\n"
      << escaped(report.counters) << "</pre>\n"
      << "<h2>" << (report.reason.empty() ? "A case" : "The first case that failed") << ": number "
      << report.shown << "</h2>\n";
  if (!report.reason.empty()) out << "<pre class=\"bad\">" << escaped(report.reason) << "</pre>\n";
  out << "<pre>" << escaped(report.text) << "\n\n"
      << escaped(report.replay) << "</pre>\n"
      << "<p>Its last calls between ranks (up to 400), on " << escaped(report.leg)
      << ": a row a rank, time to the right; a bar lasts from a rank's coming to its going "
         "on.</p>\n"
      << "<div class=\"picture\">" << report.picture << "</div>\n"
      << "<h2>Topologies and stages</h2>\n<p>Times that a case went through each.</p>\n";
  matrix(report, &out);
  out << "</body></html>\n";
  return out.str();
}

}  // namespace isoshard::tools
