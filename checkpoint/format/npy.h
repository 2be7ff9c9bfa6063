// .npy, version 1.0 (numpy/lib/format.py), for one tensor in row-major order:
//
//   | "\x93NUMPY" | 1 0 | u16 length | {'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }
//   | spaces and a newline up to a multiple of 64 | elements |
#pragma once

#include <optional>
#include <string>

#include "core/dtype.h"

namespace isoshard::checkpoint {

// The dtype that holds the values in a .npy file: the same one, float32 for bfloat16; nothing for
// 8-bit floats, which numpy does not have.
std::optional<DType> npy_dtype(DType dtype);

// Everything before the elements. `dtype` must be an answer of npy_dtype; throws
// Error(kUnsupported) for a shape that version 1.0 cannot hold.
std::string npy_head(DType dtype, const Shape& shape);

}  // namespace isoshard::checkpoint
