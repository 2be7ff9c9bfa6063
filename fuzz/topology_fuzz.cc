// The bytes are what a command line says of topologies. A shell hands over no NUL and seldom long
// words: the first 200 bytes are read.
#include "core/check.h"
#include "core/topology.h"
#include "fuzz/targets.h"
#include "sim/topologies/catalog.h"

namespace isoshard::fuzz::topology {
namespace {

// "world<=64" is some 9,000 topologies, which take a second with sanitizers: only "world<=8" and
// its kin, at the end, are selected.
bool is_large(const std::string& text) {
  const std::string world = "world<=";
  const size_t at = text.find(world);
  return at != std::string::npos && text.size() > at + world.size() + 1;
}

}  // namespace

int run_one(Bytes bytes) {
  const std::string text = text_of(bytes.first(std::min<size_t>(bytes.size(), 200)));
  try {
    const TargetSpec spec = parse_target(text);
    const Topology whole = resolve(spec, Topology{});
    CHECK(whole.world() >= 1, "a topology without ranks");
    CHECK(to_string(whole).starts_with("dp"), "a topology is printed without dp");
  } catch (const Error&) {
  }
  if (is_large(text)) return 0;
  try {
    CHECK(!sim::select_topologies(text).empty(), "a selection of nothing is no Error");
  } catch (const Error&) {
  }
  return 0;
}

}  // namespace isoshard::fuzz::topology
