// Error says what the world did wrong, so that a person can act: what, where, expected, found,
// what is safe now, what to do next. Our own mistakes are CheckFailure (core/check.h).
#pragma once

#include <exception>
#include <string>

namespace isoshard {

enum class ErrorCode {
  kUsage,        // the command line asks for something that cannot be
  kNotFound,     // a file, tag or tensor that must exist does not
  kUnreadable,   // the operating system refused or failed
  kCorrupt,      // bytes contradict each other or a checksum
  kIncomplete,   // a shard, a record or a commit marker is missing
  kHostile,      // a file tries something that no training program needs
  kUnsupported,  // understood, and not done (yet)
  kLimit,        // a budget against resource bombs was reached
  kNoSpace,      // disk or quota full
  kPermission,
  kExists,    // the target is already there
  kMismatch,  // two things that must agree do not
  kInterrupted,
};

// Printed name of a code, as in the JSON form of an error.
const char* name(ErrorCode code);

struct ErrorInfo {
  ErrorCode code = ErrorCode::kUnreadable;
  std::string what = {};   // one sentence
  std::string file = {};   // path as the user would type it, or empty
  std::string entry = {};  // record, key or tensor inside the file, or empty
  std::string expected = {};
  std::string found = {};
  std::string safe = {};  // what is safe now; empty: "nothing was changed"
  std::string next = {};  // what to do next
};

class Error : public std::exception {
 public:
  explicit Error(ErrorInfo info);
  Error(ErrorCode code, std::string what)
      : Error(ErrorInfo{.code = code, .what = std::move(what)}) {}

  const char* what() const noexcept override { return text_.c_str(); }
  const ErrorInfo& info() const { return info_; }

 private:
  ErrorInfo info_;
  std::string text_;
};

// A string from a file, made safe to print: control characters, escapes, bidi marks and invalid
// UTF-8 become \u{…}; the result is enclosed in double quotes.
// What is safe where ErrorInfo::safe says nothing.
inline constexpr const char* kNothingPublished = "the source was only read; nothing was published";

std::string quote(const std::string& text);

}  // namespace isoshard
