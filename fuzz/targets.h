// What is fuzzed. Each target takes any bytes at all and returns 0: an Error is an answer; any
// other exception, a signal and a sanitizer's report are findings. libFuzzer (fuzzer.cc) and the
// replay of the committed files (replay_test.cc) call the same functions.
//
// Not seen by any target: what a file does that is larger than the fuzzer's inputs.
#pragma once

#include <ostream>
#include <string>
#include <vector>

#include "fuzz/fuzz_storage.h"

namespace isoshard::fuzz {

namespace zip {
int run_one(Bytes bytes);
}
namespace zip_records {
int run_one(Bytes bytes);
}
namespace pickle {
int run_one(Bytes bytes);
}
namespace torch_file {
int run_one(Bytes bytes);
}
namespace safetensors {
int run_one(Bytes bytes);
}
namespace manifest {
int run_one(Bytes bytes);
}
namespace folder_tree {
int run_one(Bytes bytes);
}
namespace shallow_json {
int run_one(Bytes bytes);
}
namespace topology {
int run_one(Bytes bytes);
}

struct Target {
  std::string name;  // of its folders under corpus/ and regressions/
  int (*run_one)(Bytes bytes) = nullptr;
};

inline void PrintTo(const Target& target, std::ostream* out) { *out << target.name; }

inline std::vector<Target> targets() {
  return {{"folder_tree", folder_tree::run_one},
          {"manifest", manifest::run_one},
          {"pickle", pickle::run_one},
          {"safetensors", safetensors::run_one},
          {"shallow_json", shallow_json::run_one},
          {"topology", topology::run_one},
          {"torch_file", torch_file::run_one},
          {"zip", zip::run_one},
          {"zip_records", zip_records::run_one}};
}

}  // namespace isoshard::fuzz
