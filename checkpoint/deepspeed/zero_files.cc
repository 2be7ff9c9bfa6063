// What the partition files of all stages have in common.
#include "checkpoint/deepspeed/zero_files.h"

#include "core/error.h"

namespace isoshard::checkpoint {

OptimizerState sort_optimizer_state(const Fields& fields, NodeId entry, const std::string& what) {
  OptimizerState result;
  for (const auto& [key, value] : fields.named(entry, what)) {
    const std::string place = what + " " + key;
    const std::optional<TensorView> view = fields.document().tensor(value);
    const Kind kind = fields.pickle().kind(value);
    if (view && !view->shape.empty()) {
      if (view->shape.size() != 1 || !view->is_contiguous()) {
        fields.fail("An optimizer state is not a flat tensor.", place, "one dimension",
                    to_string(view->shape));
      }
      result.tensors.emplace_back(key, *view);
    } else if (view || kind == Kind::kInt || kind == Kind::kFloat || kind == Kind::kBool ||
               kind == Kind::kNone) {
      result.scalars.emplace_back(key, value);
    } else {
      throw Error(ErrorInfo{.code = ErrorCode::kUnsupported,
                            .what = "An optimizer state is neither a tensor nor a number.",
                            .file = fields.document().path(),
                            .entry = place,
                            .expected = "a flat tensor, a 0-d tensor or a number",
                            .found = name(kind)});
    }
  }
  return result;
}

NodeId find_index(const Pickle& pickle, NodeId mapping, int64_t index) {
  const std::vector<NodeId>& entries = pickle.entries(mapping);
  for (size_t i = 0; i + 1 < entries.size(); i += 2) {
    if (pickle.kind(entries[i]) == Kind::kInt && pickle.integer_value(entries[i]) == index) {
      return entries[i + 1];
    }
  }
  return kNoNode;
}

}  // namespace isoshard::checkpoint
