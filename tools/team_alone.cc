// See team.h: the program without MPI.
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "tools/team.h"

namespace isoshard::tools {

namespace {

// A job's script that calls isoshard has the job's environment too, and is one process alone: what
// mpirun has started itself has mpirun, or its daemon on another machine, for a parent.
bool is_started_by_mpirun() {
  const char* asked = std::getenv("ISOSHARD_MPI");
  if (asked != nullptr) return std::strcmp(asked, "0") != 0;
  std::ifstream file("/proc/" + std::to_string(getppid()) + "/comm");
  std::string parent;
  std::getline(file, parent);
  for (const char* name : {"mpirun", "mpiexec", "orterun", "orted", "prterun", "prted"})
    if (parent == name) return true;
  return false;
}

}  // namespace

void join_team(int, char** argv, Session*, std::unique_ptr<Team>*) {
  const char* ranks = std::getenv("OMPI_COMM_WORLD_SIZE");
  if (ranks == nullptr || std::strcmp(ranks, "1") == 0 || !is_started_by_mpirun()) return;
  std::error_code failure;
  const std::filesystem::path here = std::filesystem::read_symlink("/proc/self/exe", failure);
  const std::string other = (here.parent_path() / "isoshard_mpi").string();
  execv(other.c_str(), argv);
  throw Error(ErrorInfo{.code = ErrorCode::kUnsupported,
                        .what = "This isoshard was built without OpenMPI.",
                        .file = other,
                        .expected = "the program for several processes, beside this one",
                        .found = std::strerror(errno),
                        .next = "install libopenmpi-dev and build again, or start it without "
                                "mpirun: one process does the same"});
}

}  // namespace isoshard::tools
