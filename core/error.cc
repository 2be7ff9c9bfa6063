// How an Error reads: one message with everything a person needs, each part on its own line.
#include "core/error.h"

#include <cstdio>

#include "core/mutant.h"
#include "core/utf8.h"

namespace isoshard {

const char* name(ErrorCode code) {
  switch (code) {
    case ErrorCode::kUsage:
      return "usage";
    case ErrorCode::kNotFound:
      return "not_found";
    case ErrorCode::kUnreadable:
      return "unreadable";
    case ErrorCode::kCorrupt:
      return "corrupt";
    case ErrorCode::kIncomplete:
      return "incomplete";
    case ErrorCode::kHostile:
      return "hostile";
    case ErrorCode::kUnsupported:
      return "unsupported";
    case ErrorCode::kLimit:
      return "limit";
    case ErrorCode::kNoSpace:
      return "no_space";
    case ErrorCode::kPermission:
      return "permission";
    case ErrorCode::kExists:
      return "exists";
    case ErrorCode::kMismatch:
      return "mismatch";
    case ErrorCode::kInterrupted:
      return "interrupted";
  }
  return "unknown";
}

Error::Error(ErrorInfo info) : info_(std::move(info)) {
  text_ = info_.what;
  const auto line = [this](const char* label, const std::string& value) {
    if (!value.empty()) text_ += std::string("\n  ") + label + value;
  };
  line("file:     ", info_.file);
  line("entry:    ", info_.entry);
  line("expected: ", info_.expected);
  line("found:    ", info_.found);
  line("safe now: ", info_.safe.empty() ? kNothingPublished : info_.safe);
  line("next:     ", info_.next);
}

std::string quote(const std::string& text) {
  std::string result = "\"";
  for (size_t at = 0; at < text.size();) {
    const CodePoint point = decode_utf8(text, at);
    char buffer[16];
    if (!point.valid) {
      std::snprintf(buffer, sizeof buffer, "\\x{%02x}", static_cast<unsigned char>(text[at]));
      result += buffer;
    } else if (!is_printable(point.value) && !mutant("quote_controls_raw")) {
      std::snprintf(buffer, sizeof buffer, "\\u{%x}", static_cast<unsigned>(point.value));
      result += buffer;
    } else if ((point.value == '"' || point.value == '\\') && !mutant("quote_quotes_raw")) {
      result += '\\';
      result += static_cast<char>(point.value);
    } else {
      result.append(text, at, point.length);
    }
    at += point.length;
  }
  return result + "\"";
}

}  // namespace isoshard
