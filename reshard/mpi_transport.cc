// See mpi_transport.h.
#include "reshard/mpi_transport.h"

#include <mpi.h>

#include <algorithm>
#include <cstdlib>
#include <set>
#include <thread>

#include "core/check.h"
#include "core/error.h"

namespace isoshard::reshard {

// What is under way: requests, whose rank each is, how many bytes it must have.
struct MpiTransport::Flight {
  std::vector<MPI_Request> requests;
  std::vector<int> ranks;
  std::vector<int64_t> sizes;  // -1 for a send
  std::vector<int> done;       // room for MPI's answers, as many as requests
  std::vector<MPI_Status> statuses;

  MPI_Request* add(int rank, int64_t size_bytes);  // room for it, before it is under way
  std::string missing() const;
  void cancel();
};

namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kLargestPart = int64_t{1} << 30;  // MPI counts in int
constexpr int kEagerTries = 4096;                   // before the processor is given back

std::string mpi_text(int status) {
  char text[MPI_MAX_ERROR_STRING] = {};
  int length = 0;
  if (MPI_Error_string(status, text, &length) != MPI_SUCCESS) return std::to_string(status);
  return std::string(text, static_cast<size_t>(length));
}

void require(int status, const char* function) {
  if (status == MPI_SUCCESS) return;
  throw Error(ErrorInfo{.code = ErrorCode::kUnreadable,
                        .what = std::string("MPI refused ") + function + ".",
                        .found = mpi_text(status),
                        .next = "look at mpirun's own messages, then start the job again"});
}

template <typename Post>
void in_parts(int64_t size_bytes, const Post& post) {
  for (int64_t at = 0; at == 0 || at < size_bytes; at += kLargestPart)
    post(at, static_cast<int>(std::min(kLargestPart, size_bytes - at)));
}

}  // namespace

MPI_Request* MpiTransport::Flight::add(int rank, int64_t size_bytes) {
  done.resize(requests.size() + 1);
  statuses.resize(requests.size() + 1);
  ranks.push_back(rank);
  sizes.push_back(size_bytes);
  requests.push_back(MPI_REQUEST_NULL);
  return &requests.back();
}

std::string MpiTransport::Flight::missing() const {
  std::set<int> open;
  for (size_t i = 0; i < requests.size(); ++i) {
    if (requests[i] != MPI_REQUEST_NULL) open.insert(ranks[i]);
  }
  std::string text;
  for (const int rank : open) text += (text.empty() ? "" : ",") + std::to_string(rank);
  return (open.size() == 1 ? "rank " : "ranks ") + text;
}

// Buffers that nobody has filled must not be written once they are gone. A message that has come
// in part cannot be taken back; it moves no further, as nothing calls MPI any more but abort().
void MpiTransport::Flight::cancel() {
  for (size_t i = 0; i < requests.size(); ++i) {
    if (requests[i] == MPI_REQUEST_NULL || sizes[i] < 0) continue;
    MPI_Cancel(&requests[i]);
    int done = 0;
    for (int tries = 0; tries < kEagerTries && done == 0; ++tries)
      MPI_Test(&requests[i], &done, MPI_STATUS_IGNORE);
  }
}
MpiTransport::MpiTransport(std::chrono::milliseconds timeout) : timeout_(timeout) {
  int started = 0;
  require(MPI_Initialized(&started), "MPI_Initialized");
  if (started == 0) {
    int provided = 0;
    if (MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided) != MPI_SUCCESS)
      throw Error(ErrorCode::kUsage, "MPI could not be started.");
    ours_ = true;
  }
  MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
  require(MPI_Comm_rank(MPI_COMM_WORLD, &rank_), "MPI_Comm_rank");
  require(MPI_Comm_size(MPI_COMM_WORLD, &size_), "MPI_Comm_size");
  int* largest = nullptr;
  int known = 0;
  require(MPI_Comm_get_attr(MPI_COMM_WORLD, MPI_TAG_UB, &largest, &known), "MPI_Comm_get_attr");
  tags_ = known != 0 ? *largest : 32767;
}

MpiTransport::~MpiTransport() {
  if (!broken_.empty()) abort(1);
  if (ours_) MPI_Finalize();
}

void MpiTransport::abort(int status) {
  MPI_Abort(MPI_COMM_WORLD, status);
  std::_Exit(status);
}

void MpiTransport::move(const std::vector<MpiSend>& sends, const std::vector<MpiReceive>& receives,
                        int tag, bool until_received, const std::string& call) {
  CHECK(tag >= 0 && tag < tags_, "a tag that MPI does not have");
  if (!broken_.empty()) {
    throw Error(ErrorInfo{.code = ErrorCode::kInterrupted,
                          .what = "An earlier call to other ranks failed.",
                          .entry = call,
                          .found = broken_,
                          .next = "start the job again"});
  }
  Flight flight;
  try {
    post(&flight, sends, receives, tag, until_received);
  } catch (...) {  // half of it is under way, in buffers that are about to go
    broken_ = "not all of its messages could be sent";
    flight.cancel();
    throw;
  }
  finish(flight, call);
}

void MpiTransport::post(Flight* flight, const std::vector<MpiSend>& sends,
                        const std::vector<MpiReceive>& receives, int tag, bool until_received) {
  for (const MpiReceive& receive : receives) {
    in_parts(receive.size_bytes, [&](int64_t at, int count) {
      MPI_Request* const request = flight->add(receive.rank, count);
      require(
          MPI_Irecv(receive.data + at, count, MPI_BYTE, receive.rank, tag, MPI_COMM_WORLD, request),
          "MPI_Irecv");
    });
  }
  for (const MpiSend& send : sends) {
    in_parts(send.size_bytes, [&](int64_t at, int count) {
      MPI_Request* const request = flight->add(send.rank, -1);
      const auto send_part = until_received ? MPI_Issend : MPI_Isend;
      require(send_part(send.data + at, count, MPI_BYTE, send.rank, tag, MPI_COMM_WORLD, request),
              until_received ? "MPI_Issend" : "MPI_Isend");
    });
  }
}

// Waits until all of a flight has landed.
void MpiTransport::finish(Flight& flight, const std::string& call) {
  const Clock::time_point end = Clock::now() + timeout_;
  std::vector<int>& done = flight.done;
  std::vector<MPI_Status>& statuses = flight.statuses;
  for (size_t left = flight.requests.size(), tries = 0; left > 0; ++tries) {
    int count = 0;
    const int status = MPI_Testsome(static_cast<int>(flight.requests.size()),
                                    flight.requests.data(), &count, done.data(), statuses.data());
    if (status != MPI_SUCCESS && status != MPI_ERR_IN_STATUS) require(status, "MPI_Testsome");
    for (int i = 0; i < count; ++i) {
      const auto which = static_cast<size_t>(done[static_cast<size_t>(i)]);
      const MPI_Status& of = statuses[static_cast<size_t>(i)];
      int found = 0;
      MPI_Get_count(&of, MPI_BYTE, &found);
      const bool failed = status == MPI_ERR_IN_STATUS && of.MPI_ERROR != MPI_SUCCESS;
      if (!failed && (flight.sizes[which] < 0 || flight.sizes[which] == found)) continue;
      refuse(flight, which, failed ? mpi_text(of.MPI_ERROR) : std::to_string(found) + " bytes",
             call);
    }
    left -= static_cast<size_t>(std::max(count, 0));
    if (count > 0) tries = 0;
    if (tries < kEagerTries) {
      std::this_thread::yield();
      continue;
    }
    if (Clock::now() > end) give_up(flight, call);
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
}

void MpiTransport::refuse(Flight& flight, size_t which, const std::string& found,
                          const std::string& call) {
  const std::string rank = "rank " + std::to_string(flight.ranks[which]);
  broken_ = "a message of " + rank + ": " + found;
  flight.cancel();
  throw Error(ErrorInfo{.code = ErrorCode::kMismatch,
                        .what = "A message between two ranks is not what was expected.",
                        .entry = call,
                        .expected = std::to_string(flight.sizes[which]) + " bytes from " + rank,
                        .found = found,
                        .next = "compare the layouts that the two ranks compute"});
}

void MpiTransport::give_up(Flight& flight, const std::string& call) {
  const std::string missing = flight.missing();
  broken_ = missing + " did not answer";
  flight.cancel();
  const std::string seconds = std::to_string(timeout_.count() / 1000) + " s";
  throw Error(ErrorInfo{
      .code = ErrorCode::kInterrupted,
      .what = "Rank " + std::to_string(rank_) + " waited " + seconds + " for " + missing + ".",
      .entry = call,
      .expected = "every rank calls the same in the same order, and in time",
      .found = "no answer of " + missing,
      .next = "look for what stopped " + missing +
              ": its own message, its machine, or a condition that took it another way"});
}

}  // namespace isoshard::reshard
