// HDF5 files that any reader of HDF5 opens, such as h5py: arrays of numbers under paths. Written
// only, in memory, with the same bytes for the same contents: no times are stored.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "core/dtype.h"

namespace isoshard::checkpoint {

class Hdf5File {
 public:
  Hdf5File();
  ~Hdf5File();
  Hdf5File(const Hdf5File&) = delete;
  Hdf5File& operator=(const Hdf5File&) = delete;

  // A dataset at "group/group/name"; groups are made. As many values as the shape has elements.
  void floats(const std::string& path, const Shape& shape, std::span<const float> values);
  void doubles(const std::string& path, const Shape& shape, std::span<const double> values);
  void integers(const std::string& path, const Shape& shape, std::span<const int64_t> values);
  // An attribute of a dataset that is there, or of the file ("").
  void attribute(const std::string& path, const std::string& name, const std::string& text);
  void attribute(const std::string& path, const std::string& name, int64_t value);

  // The whole file; nothing can be added afterwards.
  std::string finish();

 private:
  struct Handles;
  std::unique_ptr<Handles> handles_;
};

}  // namespace isoshard::checkpoint
