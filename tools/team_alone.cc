// See team.h: the program without MPI.
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>

#include "tools/team.h"

namespace isoshard::tools {

void join_team(int, char** argv, Session*, std::unique_ptr<Team>*) {
  const char* ranks = std::getenv("OMPI_COMM_WORLD_SIZE");
  if (ranks == nullptr || std::strcmp(ranks, "1") == 0) return;
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
