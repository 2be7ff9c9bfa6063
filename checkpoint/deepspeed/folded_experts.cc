// See folded_experts.h.
#include "checkpoint/deepspeed/folded_experts.h"

#include "checkpoint/deepspeed/zero_files.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

class FoldedExperts {
 public:
  FoldedExperts(ShardedState* whole, const std::vector<MpPart>& parts, const ExpertInfo& experts)
      : whole_(*whole),
        parts_(parts),
        experts_(experts),
        tensor_(static_cast<int>(parts.size())),
        data_(static_cast<int>(parts[0].state.optim_files.size())) {}

  void run() {
    const auto groups = groups_of_experts(whole_, parts_[0].model, experts_);
    const int ranks =
        experts_.layers().empty() ? 0 : static_cast<int>(experts_.layers()[0].ep_size);
    if (ranks < 1 || data_ * tensor_ % ranks != 0)
      refuse(parts_[0].model.file, "ep_size", "a divisor of " + std::to_string(data_ * tensor_),
             std::to_string(ranks));
    for (const MpPart& part : parts_) {
      if (groups_of_experts(whole_, part.model, experts_).expert != groups.expert)
        refuse(part.model.file, "param_shapes", "experts in the same groups", "others");
    }
    whole_.expert_layout = ExpertLayout::kAutoEp;
    whole_.topology.expert = ranks;
    std::vector<MpPart> joined;
    for (int rank = 0; rank < ranks; ++rank) joined.push_back(read(rank, ranks, groups.expert));
    merge_expert_ranks(&whole_, joined, experts_);
  }

 private:
  [[noreturn]] void refuse(int file, const std::string& entry, const std::string& expected,
                           const std::string& found) const {
    throw Error(ErrorInfo{.code = ErrorCode::kMismatch,
                          .what = "A folded checkpoint's files do not say what their place among "
                                  "the ranks calls for.",
                          .file = whole_.document(file).path(),
                          .entry = entry,
                          .expected = expected,
                          .found = found,
                          .next = "files of two saves may be mixed; compare their times"});
  }

  // The experts of one expert-parallel rank, from the files of its replicas.
  MpPart read(int rank, int ranks, const GroupMask& groups) {
    const std::vector<int> members = experts_.partition_ranks(rank, ranks, data_ * tensor_);
    std::vector<int> files;
    for (size_t replica = 0; replica < members.size(); ++replica) {
      const int tensor = members[replica] % tensor_, data = members[replica] / tensor_;
      const MpPart& holder = parts_[static_cast<size_t>(tensor)];
      const int file = holder.state.optim_files[static_cast<size_t>(data)];
      check_place(file, {tensor, data, rank, static_cast<int64_t>(replica), ranks});
      files.push_back(file);
    }
    MpPart part = lend_files(&whole_, parts_[static_cast<size_t>(members[0] % tensor_)].model);
    part.state.optim_files = std::move(files);
    read_zero12(&part.state, part.model, groups);
    whole_.files = std::move(part.state.files);
    return part;
  }

  struct Place {
    int64_t tensor, data, expert, replica, expert_ranks;
  };

  void check_place(int file, const Place& place) const {
    const Fields f(whole_.document(file));
    const NodeId folding = f.need(f.root(), "folding");
    if (!f.pickle().is_mapping(folding))
      f.fail("A value has the wrong type.", "folding", "dict",
             isoshard::checkpoint::name(f.pickle().kind(folding)));
    const auto check = [&](NodeId holder, const char* key, int64_t expected) {
      const int64_t found = f.integer(f.need(holder, key), key);
      if (found != expected)
        refuse(file, std::string("folding ") + key, std::to_string(expected),
               std::to_string(found));
    };
    check(folding, "version", 1);
    check(folding, "etp_size", 1);
    check(folding, "etp_rank", 0);
    check(folding, "zero_partition_rank", place.data);
    check(folding, "zero_partition_count", data_);
    for (const auto& [key, expected] : std::initializer_list<std::pair<const char*, const char*>>{
             {"family", "zero_optimizer_state"},
             {"zero_partition_group", "per_family"},
             {"dispatch_strategy", "route_full_partition_dispatch"},
             {"shared_expert_placement", "tp_sharded"}}) {
      const std::string found = f.text(f.need(folding, key), key);
      if (found != expected)
        refuse(file, std::string("folding ") + key, quote(expected), quote(found));
    }
    check(folding, "tp_size", tensor_);
    check(folding, "tp_rank", place.tensor);
    check(folding, "ep_size", place.expert_ranks);
    check(folding, "ep_rank", place.expert);
    int64_t families = 0;
    for (const auto& [name, family] :
         f.named(f.need(folding, "param_families"), "param_families")) {
      if (!experts_.is_expert(name)) continue;
      ++families;
      check(family, "zero_partition_rank", place.replica);
      check(family, "zero_partition_count", data_ * tensor_ / place.expert_ranks);
    }
    const auto stacks = static_cast<int64_t>(3 * experts_.layers().size());
    if (families != stacks)
      refuse(file, "folding param_families", std::to_string(stacks) + " stacks of experts",
             std::to_string(families));
    const int model = parts_[static_cast<size_t>(place.tensor)].model.file;
    const Fields of_model(whole_.document(model));
    const NodeId rank = of_model.need(of_model.need(of_model.root(), "folding"), "tp_rank");
    if (of_model.integer(rank, "tp_rank") != place.tensor)
      refuse(model, "folding tp_rank", std::to_string(place.tensor), "another");
  }

  ShardedState& whole_;
  const std::vector<MpPart>& parts_;
  const ExpertInfo& experts_;
  const int tensor_, data_;
};

}  // namespace

void read_folded_experts(ShardedState* whole, const std::vector<MpPart>& parts,
                         const ExpertInfo& experts) {
  FoldedExperts(whole, parts, experts).run();
}

}  // namespace isoshard::checkpoint
