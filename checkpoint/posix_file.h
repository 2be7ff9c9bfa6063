// Files that the operating system keeps, opened for reading or for writing.
#pragma once

#include <sys/stat.h>

#include <memory>
#include <string>
#include <utility>

#include "core/storage.h"

namespace isoshard::checkpoint {

// Owns a file descriptor; -1 is none. Its destructor reports nothing: who must know closes first.
class Descriptor {
 public:
  explicit Descriptor(int number = -1) : number_(number) {}
  Descriptor(Descriptor&& other) noexcept : number_(other.release()) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(number_, other.number_);
    return *this;
  }
  ~Descriptor();

  int number() const { return number_; }
  int release() { return std::exchange(number_, -1); }

 private:
  int number_;
};

struct OpenedPath {
  Descriptor descriptor;
  struct stat status {};
};

// open and fstat, with a few re-openings of a stale handle; `operation` begins the message.
OpenedPath open_path(const std::string& path, int flags, const char* operation);

std::unique_ptr<ReadableFile> open_posix_read(const std::string& path);
std::unique_ptr<WritableFile> create_posix(const std::string& path);
std::unique_ptr<WritableFile> open_posix_write(const std::string& path);

}  // namespace isoshard::checkpoint
