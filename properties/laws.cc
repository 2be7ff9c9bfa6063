// See laws.h. Laws about values and files; those about digests stand in digest_laws.cc.
#include "properties/laws.h"

#include <ostream>

#include "core/error.h"
#include "core/random.h"
#include "properties/expect.h"
#include "properties/workshop.h"

namespace isoshard::properties {

using checkpoint::ShardedState;

namespace {

std::string in(const std::string& place, const std::string& reason) {
  return reason.empty() ? "" : place + ": " + reason;
}

// Whether files by way of `job` are the same bytes: stage 0 and BF16_Optimizer hold no loss scaler
// object or overflow flag of their own, and under round robin records are numbered in the order in
// which the last source's parameters lie.
bool keeps_bytes(const Model& model, const Job& job) {
  return job.stage != 0 && !uses_bf16_optimizer(model, job.stage) && !model.round_robin;
}

}  // namespace

std::ostream& operator<<(std::ostream& out, const Case& value) {
  return out << "A " << value.a << "  B " << value.b << "  C " << value.c << "  choice "
             << value.choice << "\n"
             << value.model;
}

std::string every_element_is_loaded(const Case& value, Mutant mutant) {
  Workshop workshop(value.model, mutant);
  const ShardedState a = workshop.source(value.a, "/a");
  const std::string reason = in("A", state_difference(a, value.model));
  if (!reason.empty()) return reason;
  return in("B", state_difference(workshop.reshard(a, value.b, "/b"), value.model));
}

std::string files_are_the_reference(const Case& value, Mutant mutant) {
  Workshop workshop(value.model, mutant);
  workshop.reshard(workshop.source(value.a, "/a"), value.b, "/b");
  return in("B", file_difference(workshop.storage(), "/b", value.model, value.b));
}

std::string no_padding_leaves_its_file(const Case& value, Mutant mutant) {
  Workshop workshop(value.model, mutant);
  return in("B",
            poison_difference(workshop.reshard(workshop.source(value.a, "/a"), value.b, "/b")));
}

// A1 is production's own copy of the hand-made A, with zeros where A has poison.
std::string there_and_back_is_identity(const Case& value, Mutant mutant) {
  Workshop workshop(value.model, mutant);
  const ShardedState a = workshop.reshard(workshop.source(value.a, "/a0"), value.a, "/a1");
  const ShardedState back = workshop.reshard(workshop.reshard(a, value.b, "/b"), value.a, "/a2");
  const std::string reason = in("A again", state_difference(back, value.model));
  if (!reason.empty()) return reason;
  if (workshop.digest(a).root != workshop.digest(back).root) return "A and A again: other digests";
  if (!keeps_bytes(value.model, value.b)) return "";
  return in("A again", folder_difference(workshop.storage(), "/a1", "/a2"));
}

std::string via_is_direct(const Case& value, Mutant mutant) {
  Workshop workshop(value.model, mutant);
  const ShardedState a = workshop.source(value.a, "/a");
  Workshop plain(value.model);
  plain.reshard(plain.source(value.a, "/a"), value.c, "/direct");
  const ShardedState via = workshop.reshard(workshop.reshard(a, value.b, "/b"), value.c, "/via");
  const std::string reason = in("C", state_difference(via, value.model));
  if (!reason.empty()) return reason;
  if (!keeps_bytes(value.model, value.b)) {
    return in("C", file_difference(workshop.storage(), "/via", value.model, value.c));
  }
  const ShardedState direct = workshop.reshard(a, value.c, "/direct");
  return in("C", folder_difference(workshop.storage(), "/direct", "/via"));
}

bool has_universal_form(const Model& model) {
  if (model.layers == 0) return true;
  for (size_t i = 0; i < model.parameters.size(); ++i) {
    if (!model.owned(i)) return false;
  }
  return model.buffers.empty();
}

std::string universal_keeps_everything(const Case& value, Mutant mutant) {
  Workshop workshop(value.model, mutant);
  const ShardedState a = workshop.source(value.a, "/a");
  if (!has_universal_form(value.model)) return "";
  const ShardedState universal = workshop.universal(a, "/u");
  if (value.model.layers > 0)  // it lacks the layers' files, and with them the module's dtype
    return workshop.digest(a).root == workshop.digest(universal).root ? "" : "another digest";
  std::string reason = in("universal", state_difference(universal, value.model));
  if (!reason.empty()) return reason;
  const ShardedState b = workshop.reshard(universal, value.b, "/b");
  reason = in("B", state_difference(b, value.model));
  if (!reason.empty()) return reason;
  return in("B", file_difference(workshop.storage(), "/b", value.model, value.b));
}

std::string weights_are_the_masters(const Case& value, Mutant mutant) {
  Workshop workshop(value.model, mutant);
  const ShardedState a = workshop.source(value.a, "/a");
  for (const bool safetensors : {true, false}) {
    const std::string folder = safetensors ? "/s" : "/p";
    const int64_t limit = static_cast<int64_t>(value.choice % 3) * 100;  // 0: one file
    const ShardedState weights =
        workshop.weights(a, folder, {.safetensors = safetensors, .max_shard_bytes = limit});
    const std::string reason = in(folder, weights_difference(weights, value.model));
    if (!reason.empty()) return reason;
  }
  return "";
}

namespace {

// Two parameters of one shape and group whose values the module holds alike, on some rank: their
// masters fit both, so that only the registration order tells them apart.
bool has_twins(const Model& model, int tensor_ranks) {
  for (int rank = 0; rank < tensor_ranks; ++rank) {
    const Model part = part_of(model, {.tensor = tensor_ranks}, rank);
    for (size_t i = 0; i < part.parameters.size(); ++i) {
      for (size_t k = 0; k < i; ++k) {
        const ModelParameter &a = part.parameters[i], &b = part.parameters[k];
        if (a.group == b.group && a.shape == b.shape &&
            module_bytes(part, i) == module_bytes(part, k))
          return true;
      }
    }
  }
  return false;
}

}  // namespace

std::string names_are_inferred_or_refused(const Case& value, Mutant mutant) {
  if (value.model.dynamic_scale || value.model.layers > 0) return "";  // not at stage 0
  // Without masters nothing but the registration order tells parameters of one shape apart.
  if (value.model.reversed && value.model.dtype == DType::kFloat32) return "";
  if (value.model.reversed && has_twins(value.model, value.b.tensor)) return "";
  Workshop workshop(value.model, mutant);
  Job zero = value.b;
  zero.stage = 0;
  workshop.reshard(workshop.source(value.a, "/a"), zero, "/b");
  try {
    return in("B", state_difference(workshop.read_inferring("/b"), value.model));
  } catch (const Error& error) {
    const bool refused =
        error.info().code == ErrorCode::kMismatch || error.info().code == ErrorCode::kUnsupported;
    return refused ? "" : error.what();
  }
}

std::string listing_order_is_nothing(const Case& value, Mutant mutant) {
  Workshop workshop(value.model, mutant);
  workshop.source(value.a, "/a");
  return in("A", state_difference(workshop.read("/a", value.choice | 1), value.model));
}

}  // namespace isoshard::properties
