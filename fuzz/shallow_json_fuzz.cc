// The bytes are a JSON text. What is accepted must be what the library alone makes of it, and come
// back from its own text.
#include "checkpoint/shallow_json.h"
#include "core/check.h"
#include "fuzz/targets.h"

namespace isoshard::fuzz::shallow_json {

int run_one(Bytes bytes) {
  const std::string text = text_of(bytes);
  const checkpoint::ShallowJson read = checkpoint::read_shallow_json(text);
  CHECK(read.value.is_discarded() != read.why.empty(), "a refusal and its reason come together");
  try {
    checkpoint::parse_shallow_json(text, "fuzzed");
    CHECK(read.why.empty(), "one of the two forms refuses");
  } catch (const Error&) {
    CHECK(!read.why.empty(), "one of the two forms accepts");
    return 0;
  }
  CHECK(read.value == nlohmann::json::parse(text), "another value than the library's own");
  CHECK(checkpoint::read_shallow_json(read.value.dump()).value == read.value,
        "JSON that is read and written changes");
  return 0;
}

}  // namespace isoshard::fuzz::shallow_json
