// file_difference of expect.h: the files of a job, compared with the reference's partition.
#include <algorithm>

#include "checkpoint/deepspeed/fields.h"
#include "checkpoint/deepspeed/zero_files.h"
#include "core/error.h"
#include "properties/expect.h"

namespace isoshard::properties {
namespace {

using checkpoint::Fields;
using checkpoint::NodeId;
using checkpoint::TensorView;
using checkpoint::TorchFile;
using reference::Bits;

class FileJudge {
 public:
  // `whole`: the model of which `model` is one rank's part.
  FileJudge(Storage& storage, const std::string& folder, const Model& whole, const Model& model,
            const Job& job)
      : storage_(storage),
        folder_(folder),
        whole_(whole),
        model_(model),
        job_(job),
        form_(form_of(model, job)),
        sizes_(group_sizes(model)),
        groups_(optimizer_groups(model)),
        members_(reference::buffers_of(sizes_, form_)) {}

  std::string run() {
    for (int state = -1; state < static_cast<int>(model_.states.size()); ++state) {
      states_.push_back(reference::partition(whole_state(model_, state), form_, 0));
    }
    for (int rank = 0; rank < job_.ranks() && reason_.empty(); ++rank) {
      if (rank == 0 || job_.stage == 3) model_file(rank);
      optim_file(rank);
    }
    return reason_;
  }

 private:
  void fail(const std::string& reason) {
    if (reason_.empty()) reason_ = place_ + ": " + reason;
  }

  template <typename Value>
  void same(const std::string& what, const Value& expected, const Value& actual) {
    if (expected == actual) return;
    if constexpr (std::is_same_v<Value, int64_t>) {
      fail(what + ": expected " + std::to_string(expected) + ", found " + std::to_string(actual));
    } else {
      fail(what + " differs");
    }
  }

  // The view's whole storage holds `expected`, and the view is its first `length` elements.
  void storage_is(const TorchFile& file, const TensorView& view, const Bits& expected,
                  int64_t length, const std::string& what) {
    same(what + " length", Shape{length}, view.shape);
    same(what + " offset", int64_t{0}, view.offset);
    bytes_are(file, view, pack(expected, view.dtype), what);
  }

  void bytes_are(const TorchFile& file, const TensorView& view, const std::string& wanted,
                 const std::string& what) {
    const checkpoint::ZipRecord& record = file.record(view.storage);
    std::string bytes(static_cast<size_t>(record.size_bytes), '\0');
    file.file().read_at(record.data_offset, std::as_writable_bytes(std::span(bytes)));
    same(what + " storage bytes", static_cast<int64_t>(wanted.size()), record.size_bytes);
    if (wanted == bytes || wanted.size() != bytes.size()) return;
    const auto at = std::mismatch(wanted.begin(), wanted.end(), bytes.begin()).first;
    fail(what + " differs at element " +
         std::to_string((at - wanted.begin()) / item_size_bytes(view.dtype)));
  }

  std::vector<int64_t> integers(const Fields& f, NodeId list, const std::string& what) {
    std::vector<int64_t> values;
    for (NodeId node : f.list(list, what)) values.push_back(f.integer(node, what));
    return values;
  }

  void optim_file(int rank) {
    const std::string prefix = model_.dtype == DType::kBFloat16 ? "bf16_" : "";
    place_ = prefix + "zero_pp_rank_" + std::to_string(rank) + "_" + mp_name(model_) +
             "_optim_states.pt";
    const TorchFile file(storage_, folder_ + "/" + place_);
    const Fields f(file);
    const NodeId state = f.need(f.root(), "optimizer_state_dict");
    const bool stage3 = job_.stage == 3;
    const NodeId base = f.need(state, stage3 ? "optimizer_state_dict" : "base_optimizer_state");
    const char* key = stage3 ? "fp32_flat_groups" : "single_partition_of_fp32_groups";
    const std::vector<NodeId>& masters = f.list(f.need(state, key), key);
    same("number of buffers", members_.size(), masters.size());
    for (size_t b = 0; b < members_.size() && reason_.empty(); ++b) {
      const std::vector<Bits>& mine = states_[0][static_cast<size_t>(rank)];
      int64_t length = static_cast<int64_t>(mine[b].size());
      if (!stage3) length -= stripped(b, rank);
      storage_is(file, f.tensor(masters[b], key), mine[b], length, key);
      states_of(file, f, f.need(base, "state"), b, rank);
      if (!stage3) slice_map(f, state, b, rank);
    }
    if (stage3) return;
    std::vector<int64_t> paddings;
    for (size_t b = 0; b < members_.size(); ++b) {
      const reference::FlatBuffer buffer = flat(b);
      paddings.push_back(uses_bf16_optimizer(model_, job_.stage)
                             ? reference::group_padding_bf16(buffer, rank, form_.ranks)
                             : reference::group_padding(buffer, rank));
    }
    same("group_paddings", paddings,
         integers(f, f.need(state, "group_paddings"), "group_paddings"));
  }

  reference::FlatRules rules() const {
    return {.ranks = form_.ranks,
            .round_robin = form_.round_robin,
            .align_elements = form_.align_elements};
  }
  reference::FlatBuffer flat(size_t group) const {
    return reference::flat_buffer(sizes_[group], rules());
  }
  int64_t stripped(size_t group, int rank) const {
    if (uses_bf16_optimizer(model_, job_.stage)) return 0;
    return reference::group_padding(flat(group), rank);
  }

  void states_of(const TorchFile& file, const Fields& f, NodeId states, size_t buffer, int rank) {
    const NodeId entry = checkpoint::find_index(f.pickle(), states, static_cast<int64_t>(buffer));
    if (entry != checkpoint::kNoNode && !model_.stepped()) return fail("state out of nothing");
    for (size_t s = 0; s < model_.states.size() && reason_.empty(); ++s) {
      const std::string& name = model_.states[s].name;
      const TensorView view = f.tensor(f.need(entry, name), name);
      same(name + " dtype", model_.states[s].dtype, view.dtype);
      const Bits& bits = states_[s + 1][static_cast<size_t>(rank)][buffer];
      storage_is(file, view, bits, static_cast<int64_t>(bits.size()), name);
    }
  }

  // Ours says where the elements are, also under round robin (docs/deepspeed_errata.md).
  void slice_map(const Fields& f, NodeId state, size_t group, int rank) {
    const std::vector<NodeId>& maps =
        f.list(f.need(state, "param_slice_mappings"), "param_slice_mappings");
    same("number of slice maps", sizes_.size(), maps.size());
    if (!reason_.empty()) return;
    std::vector<std::pair<std::string, std::pair<int64_t, int64_t>>> expected, actual;
    for (const reference::Slice& slice : reference::slices(sizes_[group], rules(), rank)) {
      expected.push_back({name_of(group, slice.parameter), {slice.start, slice.count}});
    }
    for (const auto& [name, node] : f.named(maps[group], "param_slice_mappings")) {
      const NodeId fields = f.state_of(node);
      actual.push_back({name,
                        {f.integer(f.need(fields, "start"), "start"),
                         f.integer(f.need(fields, "numel"), "numel")}});
    }
    same("param_slice_mappings", expected, actual);
  }

  const std::string& name_of(size_t group, int index) const {
    const int number = groups_[group][static_cast<size_t>(index)];
    return model_.parameters[static_cast<size_t>(number)].name;
  }

  void model_file(int rank) {
    place_ = (job_.stage == 3 ? "zero_pp_rank_" + std::to_string(rank) + "_" : std::string()) +
             mp_name(model_) + "_model_states.pt";
    const TorchFile file(storage_, folder_ + "/" + place_);
    const Fields f(file);
    const std::vector<NodeId>& shapes = f.list(f.need(f.root(), "param_shapes"), "param_shapes");
    same("number of param_shapes", members_.size(), shapes.size());
    for (size_t b = 0; b < members_.size() && reason_.empty(); ++b) {
      std::vector<std::string> expected, actual;
      for (int index : members_[b].parameters) {
        expected.push_back(name_of(static_cast<size_t>(members_[b].group), index));
      }
      for (const auto& [name, shape] : f.named(shapes[b], "param_shapes")) actual.push_back(name);
      same("param_shapes", expected, actual);
    }
    same("dp_world_size", static_cast<int64_t>(job_.ranks()),
         f.integer(f.need(f.root(), "dp_world_size"), "dp_world_size"));
    if (model_.layers > 0)
      stage_of_pipeline(f);
    else if (job_.stage == 3)
      frozen_slots(file, f, rank);
    else
      module_storages(file, f);
  }

  void stage_of_pipeline(const Fields& f) {
    std::vector<std::string> actual;
    for (NodeId node : f.list(f.need(f.root(), "buffer_names"), "buffer_names"))
      actual.push_back(f.text(node, "buffer_names"));
    same("buffer_names", buffers_on(model_), actual);
    const NodeId degrees = f.need(f.root(), "checkpoint_parallel_dimensions");
    same("pp_degree", static_cast<int64_t>(job_.pipeline),
         f.integer(f.need(degrees, "pp_degree"), "pp_degree"));
    same("tp_degree", static_cast<int64_t>(job_.tensor),
         f.integer(f.need(degrees, "tp_degree"), "tp_degree"));
    same("module", checkpoint::kNoNode, f.maybe(f.root(), "module"));
    for (int layer = 0; layer + 1 < model_.layers && reason_.empty(); ++layer) layer_file(layer);
  }

  // Every layer of this tensor-parallel rank, whichever stage holds it.
  void layer_file(int layer) {
    const Model shard = shard_of(whole_, model_.tensor_rank, model_.tensor_ranks);
    place_ = layer_name(shard, layer);
    const TorchFile file(storage_, folder_ + "/" + place_);
    const Fields f(file);
    const std::vector<LayerEntry> entries = entries_of(whole_, layer);
    const auto found = f.named(f.root(), "layer");
    same("number of tensors", entries.size(), found.size());
    for (size_t i = 0; i < entries.size() && reason_.empty(); ++i) {
      const LayerEntry& entry = entries[i];
      const auto& [name, node] = found[i];
      same("name", entry.name, name);
      if (!entry.buffer)
        same("shape", shard.parameters[entry.parameter].shape, f.tensor(node, name).shape);
      if (reason_.empty())
        bytes_are(file, f.tensor(node, name),
                  entry.buffer ? buffer_bytes(shard, entry.parameter)
                               : module_bytes(shard, entry.parameter),
                  quote(name));
    }
  }

  static Bits unpack(const std::string& bytes, DType dtype) {
    const size_t item = static_cast<size_t>(item_size_bytes(dtype));
    Bits bits(bytes.size() / item, 0);
    for (size_t i = 0; i < bytes.size(); ++i) {
      const uint32_t byte = static_cast<unsigned char>(bytes[i]);
      bits[i / item] |= byte << (8 * (i % item));
    }
    return bits;
  }

  // Stages 1 and 2: one padded storage a group, and each parameter a view of it.
  void module_storages(const TorchFile& file, const Fields& f) {
    const NodeId module = f.need(f.root(), "module");
    for (size_t g = 0; g < groups_.size() && reason_.empty(); ++g) {
      std::vector<Bits> tensors;
      for (int number : groups_[g]) {
        tensors.push_back(unpack(module_bytes(model_, static_cast<size_t>(number)), model_.dtype));
      }
      Bits whole;
      for (const Bits& part : reference::partition_flat(tensors, rules(), 0)) {
        whole.insert(whole.end(), part.begin(), part.end());
      }
      const reference::FlatBuffer buffer = flat(g);
      for (size_t k = 0; k < buffer.order.size() && reason_.empty(); ++k) {
        const std::string& name = name_of(g, buffer.order[k]);
        const TensorView view = f.tensor(f.need(module, name), name);
        same("module offset of " + quote(name), buffer.begin[k], view.offset);
        bytes_are(file, view, pack(whole, model_.dtype), "module storage of " + quote(name));
      }
    }
  }

  void frozen_slots(const TorchFile& file, const Fields& f, int rank) {
    const NodeId fragments = f.need(f.root(), "frozen_param_fragments");
    for (size_t i = 0; i < model_.parameters.size() && reason_.empty(); ++i) {
      if (model_.owned(i) || model_.elsewhere(i)) continue;
      const Bits bits = unpack(module_bytes(model_, i), model_.dtype);
      const Bits slot =
          reference::partition_slots({bits}, form_.ranks, 0).at(static_cast<size_t>(rank));
      const std::string& name = model_.parameters[i].name;
      storage_is(file, f.tensor(f.need(fragments, name), name), slot,
                 static_cast<int64_t>(slot.size()), "frozen " + quote(name));
    }
  }

  Storage& storage_;
  const std::string& folder_;
  const Model& whole_;
  const Model& model_;
  const Job& job_;
  reference::Form form_;
  reference::GroupSizes sizes_;
  std::vector<std::vector<int>> groups_;
  std::vector<reference::BufferMembers> members_;
  std::vector<reference::RankBuffers> states_;  // masters, then the optimizer's states
  std::string place_;
  std::string reason_;
};

}  // namespace

std::string file_difference(Storage& storage, const std::string& folder, const Model& model,
                            const Job& job) {
  if (job.stage == 0) return "";
  for (int mp = 0; mp < job.mp_ranks(); ++mp) {
    const Model part = part_of(model, job, mp);
    const std::string reason = FileJudge(storage, folder, model, part, job).run();
    if (!reason.empty()) return reason;
  }
  return "";
}

}  // namespace isoshard::properties
