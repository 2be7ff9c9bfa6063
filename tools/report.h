// The page that `simulate --report` writes: what ran where, how fast, and the first failing case as
// a picture. One file that needs nothing else.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <string>
#include <utility>

namespace isoshard::tools {

struct SimulationReport {
  std::string command;  // that was given
  std::string program;  // its version, and what tells this run from others
  int64_t cases = 0, failed = 0;
  double seconds = 0;
  // By topology and stage: the cases that passed through it, and those of them that failed.
  std::map<std::string, std::array<std::pair<int64_t, int64_t>, 4>> matrix;
  int64_t shown = -1;    // number of the case that is shown: the first to fail, or else case 0
  std::string text;      // it in words
  std::string reason;    // empty: it did not fail
  std::string replay;    // the command that runs it again
  std::string leg;       // the last that the picture shows
  std::string picture;   // SVG
  std::string counters;  // further lines of the summary
};

std::string report_html(const SimulationReport& report);

}  // namespace isoshard::tools
