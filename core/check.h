// CHECK states what must hold in our own code. It throws, so that a property can shrink the case
// and the program can end with status 70 and one line to report; it stays on in release.
#pragma once

#include <stdexcept>
#include <string>

namespace isoshard {

// Our own bug: never caused by bad input.
class CheckFailure : public std::logic_error {
 public:
  using std::logic_error::logic_error;
};

[[noreturn]] inline void fail_check(const char* condition, const char* file, int line,
                                    const std::string& context) {
  throw CheckFailure(std::string(file) + ":" + std::to_string(line) + ": CHECK(" + condition +
                     ") failed" + (context.empty() ? "" : ": " + context));
}

}  // namespace isoshard

#define CHECK(condition, context)                                                        \
  do {                                                                                   \
    if (!(condition)) ::isoshard::fail_check(#condition, __FILE__, __LINE__, (context)); \
  } while (false)
