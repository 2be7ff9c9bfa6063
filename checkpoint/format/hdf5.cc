// See hdf5.h. The library keeps the file in memory (its core driver), and gives its bytes. The
// oldest superblock is used: an image of a newer one has a wrong checksum (HDF5 1.10.8).
#include "checkpoint/format/hdf5.h"

#include <hdf5.h>

#include <vector>

#include "core/check.h"

namespace isoshard::checkpoint {
namespace {

// One of the library's handles, and how it is closed.
class Handle {
 public:
  Handle(hid_t id, herr_t (*close)(hid_t)) : id_(id), close_(close) {
    CHECK(id_ >= 0, "the HDF5 library refused");
  }
  ~Handle() { close_(id_); }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  operator hid_t() const { return id_; }  // NOLINT: stands for the library's own type

 private:
  hid_t id_;
  herr_t (*close_)(hid_t);
};

void must(herr_t status) { CHECK(status >= 0, "the HDF5 library refused"); }

}  // namespace

struct Hdf5File::Handles {
  Handles() : access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose) {
    must(H5Pset_fapl_core(access, size_t{1} << 16, 0));
    file = H5Fcreate("golden.h5", H5F_ACC_TRUNC, H5P_DEFAULT, access);
    CHECK(file >= 0, "the HDF5 library refused");
  }
  ~Handles() {
    if (file >= 0) H5Fclose(file);
  }

  void write(const std::string& path, const Shape& shape, hid_t stored, hid_t given,
             const void* values) {
    const std::vector<hsize_t> sizes(shape.begin(), shape.end());
    const Handle space(
        sizes.empty() ? H5Screate(H5S_SCALAR)
                      : H5Screate_simple(static_cast<int>(sizes.size()), sizes.data(), nullptr),
        H5Sclose);
    const Handle links(H5Pcreate(H5P_LINK_CREATE), H5Pclose);
    must(H5Pset_create_intermediate_group(links, 1));
    const Handle creation(H5Pcreate(H5P_DATASET_CREATE), H5Pclose);
    must(H5Pset_obj_track_times(creation, false));
    const Handle set(H5Dcreate2(file, path.c_str(), stored, space, links, creation, H5P_DEFAULT),
                     H5Dclose);
    if (numel(shape) > 0) must(H5Dwrite(set, given, H5S_ALL, H5S_ALL, H5P_DEFAULT, values));
  }

  void attribute(const std::string& path, const std::string& name, hid_t type, const void* value) {
    const Handle object(H5Oopen(file, path.empty() ? "/" : path.c_str(), H5P_DEFAULT), H5Oclose);
    const Handle space(H5Screate(H5S_SCALAR), H5Sclose);
    const Handle made(H5Acreate2(object, name.c_str(), type, space, H5P_DEFAULT, H5P_DEFAULT),
                      H5Aclose);
    must(H5Awrite(made, type, value));
  }

  Handle access;
  hid_t file = -1;
};

Hdf5File::Hdf5File() : handles_(std::make_unique<Handles>()) {}
Hdf5File::~Hdf5File() = default;

void Hdf5File::floats(const std::string& path, const Shape& shape, std::span<const float> values) {
  CHECK(static_cast<int64_t>(values.size()) == numel(shape), "a value for each element");
  handles_->write(path, shape, H5T_IEEE_F32LE, H5T_NATIVE_FLOAT, values.data());
}

void Hdf5File::doubles(const std::string& path, const Shape& shape,
                       std::span<const double> values) {
  CHECK(static_cast<int64_t>(values.size()) == numel(shape), "a value for each element");
  handles_->write(path, shape, H5T_IEEE_F64LE, H5T_NATIVE_DOUBLE, values.data());
}

void Hdf5File::integers(const std::string& path, const Shape& shape,
                        std::span<const int64_t> values) {
  CHECK(static_cast<int64_t>(values.size()) == numel(shape), "a value for each element");
  handles_->write(path, shape, H5T_STD_I64LE, H5T_NATIVE_INT64, values.data());
}

void Hdf5File::attribute(const std::string& path, const std::string& name,
                         const std::string& text) {
  const Handle type(H5Tcopy(H5T_C_S1), H5Tclose);
  must(H5Tset_size(type, text.size() + 1));
  must(H5Tset_cset(type, H5T_CSET_UTF8));
  handles_->attribute(path, name, type, text.c_str());
}

void Hdf5File::attribute(const std::string& path, const std::string& name, int64_t value) {
  handles_->attribute(path, name, H5T_NATIVE_INT64, &value);
}

std::string Hdf5File::finish() {
  must(H5Fflush(handles_->file, H5F_SCOPE_GLOBAL));
  const ssize_t size = H5Fget_file_image(handles_->file, nullptr, 0);
  CHECK(size > 0, "the HDF5 library refused");
  std::string bytes(static_cast<size_t>(size), '\0');
  CHECK(H5Fget_file_image(handles_->file, bytes.data(), bytes.size()) == size,
        "the HDF5 library refused");
  return bytes;
}

}  // namespace isoshard::checkpoint
