// Topology: an ordered list of (axis, degree), a value, printed as dp2.sp4.tp1 and read from
// "dp=2,sp=4". The ZeRO partition group is dp·sp ranks; world = dp·sp·tp·pp; ep divides dp·sp.
#pragma once

#include <string>
#include <vector>

namespace isoshard {

enum class Axis { kData, kSequence, kTensor, kExpert, kPipeline };

const char* name(Axis axis);  // "dp", "sp", "tp", "ep", "pp"

struct Topology {
  int data = 1;
  int sequence = 1;
  int tensor = 1;
  int expert = 1;
  int pipeline = 1;

  int degree(Axis axis) const;
  int zero_ranks() const { return data * sequence; }
  int world() const { return data * sequence * tensor * pipeline; }
  bool operator==(const Topology&) const = default;
};

// "dp2.sp4": axes of degree 1 are left out, except dp.
std::string to_string(const Topology& topology);

// What `--to` asks for: axes left out keep the source's degree (nullopt-like: 0), stage −1
// likewise.
struct TargetSpec {
  Topology topology{.data = 0, .sequence = 0, .tensor = 0, .expert = 0, .pipeline = 0};
  int stage = -1;
};

// Reads "dp=4,sp=2,stage=3"; throws Error(kUsage) that names the offending part.
// `option`: where it was given.
TargetSpec parse_target(const std::string& text, const std::string& option = "--to");

// The source's degrees where the spec leaves them out.
Topology resolve(const TargetSpec& spec, const Topology& source);

}  // namespace isoshard
