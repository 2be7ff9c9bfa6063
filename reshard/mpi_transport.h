// Messages between the ranks of an MPI job, under a time limit (mpi_world.h).
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace isoshard::reshard {

// Bytes to or from one rank of the world.
struct MpiSend {
  int rank = 0;
  const std::byte* data = nullptr;
  int64_t size_bytes = 0;
};
struct MpiReceive {
  int rank = 0;
  std::byte* data = nullptr;
  int64_t size_bytes = 0;
};

class MpiTransport {
 public:
  explicit MpiTransport(std::chrono::milliseconds timeout);
  ~MpiTransport();
  MpiTransport(const MpiTransport&) = delete;
  MpiTransport& operator=(const MpiTransport&) = delete;

  int rank() const { return rank_; }
  int size() const { return size_; }

  // Sends and receives all, and returns when that is done. Messages of one tag between two ranks
  // arrive in order; both ends know their sizes. With `until_received` a send is done when its
  // receive has begun. `call` says for messages what this is about.
  // Throws Error(kInterrupted) at the time limit, naming the ranks that have not answered, and
  // Error(kMismatch) for a message of another size. Nothing can be sent behind either.
  void move(const std::vector<MpiSend>& sends, const std::vector<MpiReceive>& receives, int tag,
            bool until_received, const std::string& call);

  // Tags from 0 on that move() takes.
  int tags() const { return tags_; }

  [[noreturn]] void abort(int status);

 private:
  struct Flight;
  void post(Flight* flight, const std::vector<MpiSend>& sends,
            const std::vector<MpiReceive>& receives, int tag, bool until_received);
  void finish(Flight& flight, const std::string& call);
  [[noreturn]] void refuse(Flight& flight, size_t which, const std::string& found,
                           const std::string& call);
  [[noreturn]] void give_up(Flight& flight, const std::string& call);

  std::chrono::milliseconds timeout_;
  int rank_ = 0, size_ = 1, tags_ = 0;
  bool ours_ = false;   // MPI was started here
  std::string broken_;  // why nothing can be sent any more
};

}  // namespace isoshard::reshard
