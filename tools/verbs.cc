// The list of verbs, in the order of `isoshard help`.
#include "tools/session.h"

namespace isoshard::tools {

void add_verbs(CLI::App* app, Session* session) {
  add_inspect(app, session);
  add_show(app, session);
  add_verify(app, session);
  add_doctor(app, session);
  add_salvage(app, session);
  add_diff(app, session);
  add_digest(app, session);
  add_convert(app, session);
  add_reshard(app, session);
  add_migrate(app, session);
  add_export(app, session);
  add_simulate(app, session);
  add_golden(app, session);
  add_trace(app, session);
  add_deepspeed_aliases(app, session);
}

}  // namespace isoshard::tools
