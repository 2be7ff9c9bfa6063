// For tests alone: a folder of the real disk that a test has for itself, and the Error of an
// action.
#pragma once

#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <functional>
#include <stdexcept>
#include <string>

#include "checkpoint/posix_storage.h"
#include "core/error.h"

namespace isoshard::checkpoint {

// The Error that the action throws. Where it throws none, an exception fails the test.
inline ErrorInfo error_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.info();
  }
  throw std::logic_error("no Error was thrown");
}

// The folder is gone at the test's end.
class RealFolder {
 protected:
  RealFolder() {
    std::string pattern =
        (std::filesystem::temp_directory_path() / "isoshard-test-XXXXXX").string();
    if (::mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("no folder for the test");
    root_ = pattern;
  }
  ~RealFolder() { std::filesystem::remove_all(root_); }

  std::string at(const std::string& name) const { return root_ + "/" + name; }

  PosixStorage storage_;
  std::string root_;
};

}  // namespace isoshard::checkpoint
