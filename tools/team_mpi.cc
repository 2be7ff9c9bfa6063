// See team.h: the program with MPI.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <iostream>
#include <string_view>

#include "core/random.h"
#include "reshard/mpi_world.h"
#include "reshard/team.h"
#include "tools/team.h"

namespace isoshard::tools {
namespace {

constexpr std::array<std::string_view, 4> kVerbs = {"convert", "digest", "reshard", "verify"};

// Longer than any rank works by itself: it is for a rank that is stuck.
std::chrono::milliseconds timeout() {
  const char* text = std::getenv("ISOSHARD_MPI_TIMEOUT");
  const long seconds = text == nullptr ? 3600 : std::atol(text);
  return std::chrono::seconds(std::clamp(seconds, 1l, 30l * 24 * 3600));
}

void refuse_unshared(int argc, char** argv) {
  const std::string_view verb = argc > 1 ? argv[1] : "";
  if (std::ranges::find(kVerbs, verb) == kVerbs.end()) {
    throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                          .what = "This is not done by several processes.",
                          .entry = std::string(verb),
                          .expected = "convert, reshard, digest or verify",
                          .next = "start it without mpirun"});
  }
  if (std::any_of(argv, argv + argc,
                  [](const char* a) { return std::string_view(a) == "--resume"; }))
    throw Error(ErrorInfo{.code = ErrorCode::kUnsupported,
                          .what = "--resume is done by one process.",
                          .next = "start it without mpirun, or without --resume"});
}

uint64_t word_of(const ErrorInfo& error) {
  uint64_t word = 1;
  for (const std::string& text : {error.what, error.file, error.entry, error.expected, error.found})
    for (const char c : text + "\n") word = mix(word ^ static_cast<unsigned char>(c));
  return word | 4;
}

class MpiTeam : public Team {
 public:
  MpiTeam() : world_({.timeout = timeout()}) {}
  reshard::MpiWorld& world() { return world_; }

  int end(int status) override {
    std::vector<uint64_t> words;
    const bool all_well = hear(nullptr);
    if (!come_together(0, &words)) return leave(kCouldNot);
    return all_well ? status : kCouldNot;
  }

  int fail(int status, const ErrorInfo& error, const std::function<void()>& tell) override {
    const bool heard = error.what.starts_with("Another rank could not go on");
    std::vector<uint64_t> words;
    const uint64_t word = heard ? kHeard : word_of(error);
    hear(std::make_exception_ptr(Error(error)));
    if (!come_together(word, &words)) {
      tell();
      return leave(status);
    }
    const bool told = std::ranges::any_of(words, [](uint64_t each) { return each > kHeard; });
    const bool first = world_.rank() == 0;
    if (heard ? first && !told : first || words[0] != word) tell();
    return status;
  }

 private:
  static constexpr uint64_t kHeard = 2;  // of another's failure

  // The others may be where ranks agree whether to go on (reshard/team.h): they learn it there.
  bool hear(const std::exception_ptr& failure) {
    try {
      reshard::agree(world_.world(), failure);
      return true;
    } catch (const Error&) {
      return false;
    }
  }

  // What each rank ends with; false where not all have come.
  bool come_together(uint64_t word, std::vector<uint64_t>* words) {
    std::vector<uint64_t> found(static_cast<size_t>(world_.size()));
    std::vector<Buffer> places;
    for (uint64_t& place : found)
      places.push_back({DType::kUInt64, reinterpret_cast<std::byte*>(&place), 1});
    try {
      world_.world().all_gather({DType::kUInt64, reinterpret_cast<std::byte*>(&word), 1}, places);
    } catch (const Error&) {
      return false;
    }
    if (words != nullptr) *words = std::move(found);
    return true;
  }

  [[noreturn]] int leave(int status) {
    std::cout.flush();
    world_.abort(status);
  }

  reshard::MpiWorld world_;
};

}  // namespace

void join_team(int argc, char** argv, Session* session, std::unique_ptr<Team>* joined) {
  if (!reshard::MpiWorld::is_launched()) return;
  auto made = std::make_unique<MpiTeam>();
  MpiTeam* const team = made.get();
  *joined = std::move(made);
  if (team->world().size() == 1) return;
  session->team = &team->world().world();
  if (!session->is_first_rank()) {
    const int nowhere = open("/dev/null", O_WRONLY | O_CLOEXEC);
    if (nowhere >= 0) dup2(nowhere, STDOUT_FILENO);
    if (nowhere > STDERR_FILENO) close(nowhere);
  }
  refuse_unshared(argc, argv);
}

}  // namespace isoshard::tools
