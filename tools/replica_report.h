// How verify prints what --replicas and --deep have found.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "reshard/verify.h"

namespace isoshard::tools {

// A line a kind: how many things are stored more than once, in how many copies, how many differ.
std::string replica_table(const reshard::ReplicaReport& report);

// {"masters": {"sets": 13, "copies": 26, …}, …}
nlohmann::json replica_counts(const reshard::ReplicaReport& report);

// One object a difference, "kind": "replica".
nlohmann::json replica_json(const reshard::ReplicaDifference& difference);

std::string deep_text(const reshard::DeepReading& deep);
nlohmann::json deep_json(const reshard::DeepReading& deep);

}  // namespace isoshard::tools
