// See laws.h. The law of experts: their files at every stage, compared with what each rank holds
// by definition (deepspeed/utils/groups.py, expert and expert-data-parallel groups).
#include <algorithm>

#include "checkpoint/deepspeed/fields.h"
#include "checkpoint/deepspeed/zero_files.h"
#include "properties/expect.h"
#include "properties/expert_source.h"
#include "properties/laws.h"
#include "properties/workshop.h"

namespace isoshard::properties {
namespace {

using checkpoint::Fields;
using checkpoint::NodeId;
using checkpoint::ShardedState;
using checkpoint::TensorView;
using checkpoint::TorchFile;

class ExpertJudge {
 public:
  ExpertJudge(Storage& storage, const std::string& folder, const Model& model, const Job& job)
      : storage_(storage), folder_(folder), model_(in_groups(model, job)), job_(job) {}

  std::string run() {
    const bool stage3 = job_.stage == 3;  // no file an expert, and names by rank
    for (size_t layer = 0; !stage3 && layer < model_.experts.size(); ++layer) {
      for (int number = 0; number < model_.experts[layer]; ++number)
        expert_file(static_cast<int>(layer), number);
    }
    if (job_.stage == 0) {
      for (int rank = 0; rank < job_.expert; ++rank) slots(rank);
      return reason_;
    }
    if (!stage3) names();
    partitions(-1);
    for (int rank = 0; rank < job_.expert; ++rank) partitions(rank);
    return reason_;
  }

 private:
  void fail(const std::string& reason) {
    if (reason_.empty()) reason_ = place_ + ": " + reason;
  }

  // The tensor's whole storage holds these bytes.
  void same(const TorchFile& file, const TensorView& view, const std::string& wanted,
            const std::string& what) {
    const checkpoint::ZipRecord& record = file.record(view.storage);
    std::string bytes(static_cast<size_t>(record.size_bytes), '\0');
    file.file().read_at(record.data_offset, std::as_writable_bytes(std::span(bytes)));
    if (wanted != bytes) fail(what + " differs");
  }

  void expert_file(int layer, int number) {
    place_ = "layer_" + std::to_string(layer) + "_expert_" + std::to_string(number) +
             "_mp_rank_00_model_states.pt";
    const TorchFile file(storage_, folder_ + "/" + place_);
    const Fields f(file);
    const auto expected = expert_entries(model_, {layer, number});
    for (const auto& [name, i] : expected)
      same(file, f.tensor(f.need(f.root(), name), name), expert_bytes(model_, {layer, number}, i),
           name);
    if (f.named(f.root(), "expert file").size() != expected.size())
      fail("another number of tensors");
  }

  // Stage 0: every slot of a rank's own optimizer.
  void slots(int rank) {
    place_ = "expp_rank_" + std::to_string(rank) + "_mp_rank_00_optim_states.pt";
    const TorchFile file(storage_, folder_ + "/" + place_);
    const Fields f(file);
    const NodeId optimizer = f.need(f.root(), "optimizer");
    const bool masters = model_.dtype != DType::kFloat32;
    const NodeId plain = masters ? f.need(optimizer, "optimizer_state_dict") : optimizer;
    int64_t index = 0;
    for (const int trained : {-1, rank}) {
      const Model part = trained_by(model_, job_, trained);
      for (const auto& [chunk, i, number] : slots_of(part)) {
        const std::string& name = model_.parameters[static_cast<size_t>(number)].name;
        if (masters) {
          const NodeId group = f.list(f.need(optimizer, "fp32_groups"), "fp32_groups")
                                   .at(trained < 0 ? 0 : 1 + chunk);
          const TensorView view = f.tensor(f.list(group, "group").at(i), name);
          same(file, view, pack(state_bits(part, number, -1), DType::kFloat32), name);
        }
        const NodeId entry = checkpoint::find_index(f.pickle(), f.need(plain, "state"), index++);
        for (size_t s = 0; s < model_.states.size(); ++s) {
          const auto& [state, dtype] = model_.states[s];
          same(file, f.tensor(f.need(entry, state), state),
               pack(state_bits(part, number, static_cast<int>(s)), dtype), name + " " + state);
        }
      }
    }
  }

  struct Slot {
    size_t group = 0, index = 0;
    int number = 0;
  };
  static std::vector<Slot> slots_of(const Model& part) {
    std::vector<Slot> slots;
    const std::vector<std::vector<int>> groups = optimizer_groups(part);
    for (size_t g = 0; g < groups.size(); ++g) {
      for (size_t i = 0; i < groups[g].size(); ++i) slots.push_back({g, i, groups[g][i]});
    }
    return slots;
  }

  // param_shapes names what rank 0 trains, as its own module does.
  void names() {
    place_ = "mp_rank_00_model_states.pt";
    const TorchFile file(storage_, folder_ + "/" + place_);
    const Fields f(file);
    const std::vector<NodeId>& groups = f.list(f.need(f.root(), "param_shapes"), "param_shapes");
    size_t group = 0;
    for (const int trained : {-1, 0}) {
      for (const std::vector<int>& members : optimizer_groups(trained_by(model_, job_, trained))) {
        std::string wanted, found;
        for (int number : members)
          wanted += local_name(model_, job_, static_cast<size_t>(number)) + " ";
        for (const auto& [name, shape] : f.named(groups.at(group++), "param_shapes"))
          found += name + " ";
        if (wanted != found) fail("expected " + wanted + ", found " + found);
      }
    }
    if (group != groups.size()) fail(std::to_string(groups.size()) + " groups");
  }

  // The flat partitions of the dense groups (rank −1), which all ranks share, or of one
  // expert-parallel rank's experts; at stage 3 of their sub-groups.
  void partitions(int expert_rank) {
    const bool dense = expert_rank < 0;
    const Model part = trained_by(model_, job_, expert_rank);
    const int replicas = dense ? job_.ranks() : job_.ranks() / job_.expert;
    const reference::Form form = form_of(part, {.data = replicas, .stage = job_.stage});
    for (int state = -1; state < static_cast<int>(model_.states.size()); ++state) {
      const DType dtype = state_dtype(model_, state);
      const reference::RankBuffers held = reference::partition(whole_state(part, state), form, 0);
      for (int replica = 0; replica < replicas; ++replica) {
        int rank = replica;
        if (!dense && model_.data_first) rank = expert_rank * replicas + replica;
        if (!dense && !model_.data_first) rank = replica * job_.expert + expert_rank;
        const std::string prefix = model_.dtype == DType::kBFloat16 ? "bf16_" : "";
        place_ = prefix + "zero_pp_rank_" + std::to_string(rank) + "_mp_rank_00_optim_states.pt";
        const TorchFile file(storage_, folder_ + "/" + place_);
        const Fields f(file);
        const NodeId root = f.need(f.root(), "optimizer_state_dict");
        const bool stage3 = job_.stage == 3;
        const char* holder = stage3 ? "optimizer_state_dict" : "base_optimizer_state";
        const NodeId base = f.need(f.need(root, holder), "state");
        const std::vector<reference::Bits>& own = held.at(static_cast<size_t>(replica));
        const size_t first = dense ? 0 : dense_buffers();
        for (size_t group = first; group < first + own.size(); ++group) {
          const char* masters = stage3 ? "fp32_flat_groups" : "single_partition_of_fp32_groups";
          NodeId node = checkpoint::kNoNode;
          if (state < 0) {
            node = f.list(f.need(root, masters), masters).at(group);
          } else {
            const NodeId entry =
                checkpoint::find_index(f.pickle(), base, static_cast<int64_t>(group));
            node = f.need(entry, model_.states[static_cast<size_t>(state)].name);
          }
          same(file, f.tensor(node, "partition"), pack(own.at(group - first), dtype),
               "group " + std::to_string(group) + " state " + std::to_string(state));
        }
      }
    }
  }

  size_t dense_buffers() const {
    const Model dense = trained_by(model_, job_, -1);
    const reference::Form form = form_of(dense, {.data = job_.ranks(), .stage = job_.stage});
    return reference::buffers_of(group_sizes(dense), form).size();
  }

  Storage& storage_;
  const std::string folder_;
  const Model model_;
  const Job& job_;
  std::string place_, reason_;
};

std::string in(const std::string& place, const std::string& reason) {
  return reason.empty() ? "" : place + ": " + reason;
}

}  // namespace

std::string experts_keep_what_is_theirs(const Case& value, Mutant mutant) {
  Workshop workshop(value.model, mutant);
  const auto judged = [&](const char* place, const ShardedState& state, const Job& job) {
    return in(place, state_difference(state, in_groups(value.model, job)));
  };
  const auto files = [&](const char* folder, const Job& job) {
    return in(folder, ExpertJudge(workshop.storage(), folder, value.model, job).run());
  };
  const ShardedState a = workshop.source(value.a, "/a");
  std::string reason = judged("A", a, value.a);
  if (!reason.empty()) return reason;
  const ShardedState b = workshop.reshard(a, value.b, "/b");
  reason = judged("B", b, value.b);
  if (reason.empty()) reason = files("/b", value.b);
  if (!reason.empty()) return reason;
  const ShardedState universal = workshop.universal(b, "/u");
  reason = judged("universal", universal, value.b);
  if (!reason.empty()) return reason;
  const ShardedState c = workshop.reshard(value.choice % 2 == 0 ? b : universal, value.c, "/c");
  reason = judged("C", c, value.c);
  if (reason.empty()) reason = files("/c", value.c);
  if (!reason.empty()) return reason;
  const std::string root = workshop.digest(a).root;
  for (const ShardedState* other : {&b, &universal, &c}) {
    if (workshop.digest(*other).root != root) return "another digest";
  }
  return "";
}

}  // namespace isoshard::properties
