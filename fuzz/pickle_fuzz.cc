// The bytes are a pickle. What is accepted must come back from its own bytes as the same graph.
#include "checkpoint/format/hostile_globals.h"
#include "checkpoint/format/pickle_reader.h"
#include "checkpoint/format/pickle_writer.h"
#include "core/check.h"
#include "fuzz/targets.h"

namespace isoshard::fuzz::pickle {

int run_one(Bytes bytes) {
  std::string written;
  try {
    const checkpoint::Pickle read = checkpoint::read_pickle(text_of(bytes), "fuzzed");
    checkpoint::find_hostile_global(read);
    written = checkpoint::write_pickle(read);
  } catch (const Error&) {
    return 0;
  }
  // Outside of the try: an Error about our own bytes is a finding.
  const std::string again = checkpoint::write_pickle(checkpoint::read_pickle(written, "written"));
  CHECK(again == written, "a pickle that is read and written changes");
  return 0;
}

}  // namespace isoshard::fuzz::pickle
