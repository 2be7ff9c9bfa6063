// `mpirun -n N isoshard VERB …`: N processes do one command together.
//
// The program that users start knows nothing of MPI, whose libraries take a while to load: under
// mpirun it becomes isoshard_mpi, which lies beside it and is the same program with them.
#pragma once

#include <functional>
#include <memory>

#include "core/error.h"
#include "tools/session.h"

namespace isoshard::tools {

class Team {
 public:
  virtual ~Team() = default;

  // One of both, once, at the end of the command, on every rank. Of ranks with the same Error the
  // first tells it, and those that have only heard of another's failure are silent. Return the
  // status of the process, or end all where the ranks have come apart.
  virtual int end(int status) = 0;
  virtual int fail(int status, const ErrorInfo& error, const std::function<void()>& tell) = 0;
};

// Nothing where this is one process alone. Otherwise `team` is set, the session has it from now on,
// and ranks but the first write to stdout no more. Throws Error(kUsage, kUnsupported) for what is
// not done by several processes. Does not return in the program without MPI, which becomes the
// other.
void join_team(int argc, char** argv, Session* session, std::unique_ptr<Team>* team);

}  // namespace isoshard::tools
