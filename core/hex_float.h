// A float or double as text that loses nothing: "0x1.8p+1" for 3.
#pragma once

#include <cstdio>
#include <string>

namespace isoshard {

inline std::string hex_float(double value) {
  char text[40];
  std::snprintf(text, sizeof text, "%a", value);
  return text;
}

}  // namespace isoshard
