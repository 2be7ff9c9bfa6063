// See mp_checks.h.
#include "checkpoint/deepspeed/mp_checks.h"

#include "checkpoint/deepspeed/hyper.h"
#include "core/check.h"
#include "core/error.h"

namespace isoshard::checkpoint {

nlohmann::json shared_hyper(const ShardedState& part) {
  nlohmann::json hyper = hyper_json(part);
  hyper.erase("client_state");
  if (hyper.contains("param_groups")) {
    for (nlohmann::json& group : hyper["param_groups"]) group.erase("names");
  }
  return hyper;
}

void refuse_hyper(const MpPart& part, const nlohmann::json& expected, const nlohmann::json& found) {
  for (const auto& [key, value] : expected.items()) {
    if (found.contains(key) && found[key] == value) continue;
    throw Error(ErrorInfo{
        .code = ErrorCode::kMismatch,
        .what = "mp ranks differ in what they must say alike: files of two saves are mixed.",
        .file = part.state.document(part.model.file).path(),
        .entry = key,
        .expected = "as in mp rank 0: " + value.dump().substr(0, 200),
        .found = found.value(key, nlohmann::json()).dump().substr(0, 200),
        .next = "put the files of one save together; compare the files' times and steps"});
  }
  CHECK(false, "no difference to tell");
}

namespace {

// What the ranks must say alike; the layers of experts are those of the rank that writes them.
std::vector<std::string> keys_of(const Fields& fields, NodeId info) {
  std::vector<std::string> keys;
  const std::vector<NodeId>& entries = fields.pickle().entries(info);
  for (size_t i = 0; i + 1 < entries.size(); i += 2) {
    keys.push_back(fields.text(entries[i], "universal_checkpoint_info"));
    if (keys.back() == "ds_autoep_layers") keys.pop_back();
  }
  return keys;
}

}  // namespace

void check_split_info(const ShardedState& whole, const std::vector<MpPart>& parts) {
  const Fields first(whole.document(parts.at(0).model.file));
  const NodeId info = first.maybe(first.root(), "universal_checkpoint_info");
  if (info == kNoNode || !first.pickle().is_mapping(info)) return;
  for (const MpPart& part : parts) {
    const Fields other(whole.document(part.model.file));
    const NodeId own = other.maybe(other.root(), "universal_checkpoint_info");
    if (&part == &parts[0] || own == kNoNode || !other.pickle().is_mapping(own)) continue;
    const auto refuse = [&](const std::string& key, const char* found) {
      other.fail("Two mp ranks say different things of how tensors are cut.",
                 "universal_checkpoint_info " + quote(key), "as in mp rank 0", found);
    };
    for (const std::string& key : keys_of(first, info)) {
      const NodeId found = other.pickle().find(own, key);
      if (found == kNoNode) refuse(key, "only one of them has it");
      if (!same_value(first, first.pickle().find(info, key), other, found)) refuse(key, "another");
    }
    for (const std::string& key : keys_of(other, own)) {
      if (first.pickle().find(info, key) == kNoNode) refuse(key, "only one of them has it");
    }
  }
}

}  // namespace isoshard::checkpoint
