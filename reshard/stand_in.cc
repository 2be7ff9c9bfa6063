// See stand_in.h.
#include "reshard/stand_in.h"

#include <algorithm>

#include "checkpoint/deepspeed/fields.h"
#include "checkpoint/deepspeed/zero_files.h"
#include "checkpoint/format/crc.h"
#include "checkpoint/torch_builder.h"
#include "core/error.h"
#include "core/layout.h"
#include "core/zero_rules.h"
#include "reshard/target_file.h"

namespace isoshard::reshard {

using checkpoint::Fields;
using checkpoint::kNoNode;
using checkpoint::ModelStates;
using checkpoint::NodeId;
using checkpoint::ObjectParts;
using checkpoint::StorageFill;
using checkpoint::TensorView;
using checkpoint::TorchBuilder;
using checkpoint::TorchFile;
using checkpoint::ZipRecord;

namespace {

constexpr int64_t kNumberBytes = 64;  // the storage of a 0-d tensor
constexpr int64_t kMostElements = int64_t{1} << 48;
constexpr int64_t kRecordBytes = 700;  // header, descriptor, directory entry, names, as held

// A sibling's bytes where they are a number that its CRC proves; empty otherwise.
std::string number_of(const TorchFile& sibling, const ZipRecord& record) {
  if (record.size_bytes == 0 || record.size_bytes > kNumberBytes) return "";
  std::string bytes(static_cast<size_t>(record.size_bytes), '\0');
  sibling.file().read_at(record.data_offset, std::as_writable_bytes(std::span(bytes)));
  return checkpoint::crc32_of(std::as_bytes(std::span(bytes))) == record.crc32 ? bytes : "";
}

std::string pickle_bytes(const TorchFile& file) {
  for (const ZipRecord& record : file.zip().records) {
    if (record.name != "data.pkl") continue;
    std::string bytes(static_cast<size_t>(record.size_bytes), '\0');
    file.file().read_at(record.data_offset, std::as_writable_bytes(std::span(bytes)));
    return bytes;
  }
  throw Error(ErrorCode::kCorrupt, "The archive has no data.pkl record.");
}

// The header of a partition file of stages 1 and 2 as rank `place.rank` has it, from a sibling's.
class PartitionHeader {
 public:
  PartitionHeader(const TorchFile& sibling, const ModelStates& model, PartitionRank place)
      : sibling_(sibling), fields_(sibling), model_(model), place_(place) {
    optimizer_ = fields_.need(fields_.root(), "optimizer_state_dict");
    bf16_ = fields_.pickle().find(optimizer_, "zero_stage") == kNoNode;
  }

  checkpoint::FileBlueprint make(const std::string& name) {
    std::vector<NodeId> masters, paddings, slices;
    for (size_t group = 0; group < model_.param_shapes.size(); ++group) {
      const std::vector<int64_t> offsets = offsets_of(group);
      const int64_t total = offsets.back();
      const FlatSizes sizes = flat_sizes(total, place_.ranks);
      const int64_t padding = bf16_
                                  ? bf16_partition_padding(total, sizes, place_.ranks, place_.rank)
                                  : partition_padding(total, sizes.partition, place_.rank);
      const TensorView view = fields_.flat_tensor(item("single_partition_of_fp32_groups", group),
                                                  "single_partition_of_fp32_groups");
      const int storage = builder_.add_storage(StorageFill{
          .dtype = view.dtype, .numel = sizes.partition, .runs = {}, .copy = {}, .literal = {}});
      masters.push_back(
          builder_.tensor({.shape = {bf16_ ? sizes.partition : sizes.partition - padding},
                           .storage = storage,
                           .requires_grad = view.requires_grad}));
      paddings.push_back(builder_.pickle.integer(padding));
      slices.push_back(slice_map(group, offsets, std::max<int64_t>(sizes.partition, 1)));
      resize_states(group, sizes.partition);
    }
    replace("single_partition_of_fp32_groups", std::move(masters));
    replace("group_paddings", std::move(paddings));
    replace("param_slice_mappings", std::move(slices));
    const NodeId root = builder_.copy(sibling_, 0, fields_.root());
    return builder_.finish(name, root);
  }

 private:
  NodeId item(const char* key, size_t group) const {
    const std::vector<NodeId>& list = fields_.list(fields_.need(optimizer_, key), key);
    if (group >= list.size())
      fields_.fail("The number of groups differs from param_shapes.", key,
                   std::to_string(model_.param_shapes.size()), std::to_string(list.size()));
    return list[group];
  }
  void replace(const char* key, std::vector<NodeId> items) {
    builder_.replace(0, fields_.need(optimizer_, key), builder_.pickle.list(std::move(items)));
  }

  // The sibling may be of another tensor-parallel rank, with more elements or fewer.
  void resize_states(size_t group, int64_t partition) {
    const NodeId base = fields_.need(optimizer_, "base_optimizer_state");
    const NodeId entry = checkpoint::find_index(fields_.pickle(), fields_.need(base, "state"),
                                                static_cast<int64_t>(group));
    if (entry == kNoNode) return;
    for (const auto& [state, view] :
         checkpoint::sort_optimizer_state(fields_, entry, "state").tensors) {
      const int storage = builder_.add_storage(StorageFill{
          .dtype = view.dtype, .numel = partition, .runs = {}, .copy = {}, .literal = {}});
      builder_.replace(
          0, fields_.need(entry, state),
          builder_.tensor(
              {.shape = {partition}, .storage = storage, .requires_grad = view.requires_grad}));
    }
  }

  // Where each parameter begins in the flat buffer, and where the last one ends.
  std::vector<int64_t> offsets_of(size_t group) const {
    const auto& shapes = model_.param_shapes[group];
    std::vector<int64_t> result = {0};
    const bool aligned = fields_.maybe(optimizer_, "param_alignment_paddings") != kNoNode;
    for (size_t i = 0; i < shapes.size(); ++i) {
      int64_t gap = 0;
      if (aligned) {
        const std::vector<NodeId>& list =
            fields_.list(item("param_alignment_paddings", group), "param_alignment_paddings");
        if (i < list.size()) gap = fields_.integer(list[i], "param_alignment_paddings");
      }
      result.push_back(result.back() + numel(shapes[i].second) + gap);
      if (gap < 0 || result.back() > kMostElements)
        fields_.fail("The parameters of a group are impossibly large.", "param_shapes",
                     "at most " + std::to_string(kMostElements) + " elements",
                     std::to_string(result.back()));
    }
    return result;
  }

  // What this rank holds of each parameter, as DeepSpeed records it beside the buffer.
  NodeId slice_map(size_t group, const std::vector<int64_t>& offsets, int64_t partition) {
    std::vector<NodeId> items;
    const auto& shapes = model_.param_shapes[group];
    for (size_t i = 0; i < shapes.size(); ++i) {
      const TensorLayout layout{.numel = numel(shapes[i].second),
                                .ranks = place_.ranks,
                                .placement = FlatShard{offsets[i], partition}};
      const RankFragment part = fragment_on(layout, place_.rank);
      if (part.count == 0) continue;
      ObjectParts parts;
      parts.newobj = true;
      parts.callable =
          builder_.pickle.global("deepspeed.utils.tensor_fragment", "fragment_address");
      parts.args = builder_.pickle.tuple({});
      parts.state = builder_.dict({{"numel", builder_.pickle.integer(part.count)},
                                   {"start", builder_.pickle.integer(part.offset_local)}});
      items.push_back(builder_.pickle.string(shapes[i].first));
      items.push_back(builder_.pickle.object(std::move(parts)));
    }
    return builder_.pickle.ordered_dict(std::move(items));
  }

  const TorchFile& sibling_;
  Fields fields_;
  const ModelStates& model_;
  PartitionRank place_;
  NodeId optimizer_ = kNoNode;
  bool bf16_ = false;
  TorchBuilder builder_;
};

}  // namespace

StandIn make_stand_in(const std::string& name, std::shared_ptr<const std::string> pickle,
                      const std::vector<StorageSource>& storages,
                      std::shared_ptr<const ReadableFile> source) {
  checkpoint::FileBlueprint blueprint{.path = name, .head = *pickle, .storages = {}};
  std::vector<uint32_t> crcs;
  for (const StorageSource& storage : storages) {
    const bool literal = !storage.literal.empty();
    blueprint.storages.push_back({.dtype = DType::kUInt8,
                                  .numel = storage.size_bytes,
                                  .runs = {},
                                  .copy = {},
                                  .literal = storage.literal});
    crcs.push_back(literal ? checkpoint::crc32_of(std::as_bytes(std::span(storage.literal)))
                   : storage.record ? storage.record->crc32
                                    : 0);
  }
  const TargetFile file(blueprint);
  auto pieces = std::make_shared<Pieces>();
  pieces->size_bytes = file.size_bytes();
  pieces->source = std::move(source);
  for (const std::vector<Literal>& part : {file.opening(), file.closing(crcs)}) {
    for (const Literal& literal : part)
      pieces->pieces.push_back({.offset_bytes = literal.offset_bytes,
                                .size_bytes = static_cast<int64_t>(literal.bytes.size()),
                                .literal = literal.bytes,
                                .shared = nullptr});
  }
  // The first record is the pickle: its header stays, its bytes are held once for all that share
  // it.
  const auto pickle_bytes = static_cast<int64_t>(pickle->size());
  Pieces::Piece& opening = pieces->pieces.front();
  opening.size_bytes -= pickle_bytes;
  opening.literal = opening.literal.substr(0, static_cast<size_t>(opening.size_bytes));
  const int64_t pickle_offset = opening.size_bytes;
  pieces->pieces.push_back({.offset_bytes = pickle_offset,
                            .size_bytes = pickle_bytes,
                            .literal = {},
                            .shared = std::move(pickle)});
  StandIn result;
  for (size_t i = 0; i < storages.size(); ++i) {
    const StorageSource& storage = storages[i];
    const int64_t at = file.storage_offset(static_cast<int>(i));
    if (storage.size_bytes > 0 && storage.record && storage.literal.empty())
      pieces->pieces.push_back({.offset_bytes = at,
                                .size_bytes = storage.size_bytes,
                                .literal = {},
                                .shared = nullptr,
                                .source_offset = storage.record->data_offset});
    if (!storage.why.empty() && storage.size_bytes > 0)
      result.damage.push_back({at, at + storage.size_bytes, storage.why});
  }
  std::erase_if(pieces->pieces, [](const Pieces::Piece& piece) { return piece.size_bytes == 0; });
  std::ranges::sort(pieces->pieces, {}, &Pieces::Piece::offset_bytes);
  result.contents = std::move(pieces);
  result.held_bytes = static_cast<int64_t>(storages.size()) * kRecordBytes;
  return result;
}

SiblingForm sibling_form(std::shared_ptr<const TorchFile> sibling) {
  auto pickle = std::make_shared<const std::string>(pickle_bytes(*sibling));
  std::vector<int64_t> sizes = checkpoint::storage_sizes(*pickle, sibling->path());
  return {std::move(sibling), std::move(pickle), std::move(sizes)};
}

StandIn sibling_stand_in(const std::string& name, const SiblingForm& sibling,
                         const std::string& why) {
  std::vector<StorageSource> storages;
  for (int64_t size_bytes : sibling.storage_sizes)
    storages.push_back({.size_bytes = size_bytes, .literal = {}, .why = why});
  for (const ZipRecord& record : sibling.file->zip().records) {
    if (!record.name.starts_with("data/")) continue;
    const auto key = static_cast<size_t>(std::stol(record.name.substr(5)));
    if (key < storages.size()) storages[key].literal = number_of(*sibling.file, record);
  }
  return make_stand_in(name, sibling.pickle, storages, nullptr);
}

StandIn partition_stand_in(const std::string& name, const TorchFile& sibling,
                           const ModelStates& model, PartitionRank place, const std::string& why) {
  const checkpoint::FileBlueprint header = PartitionHeader(sibling, model, place).make(name);
  std::vector<StorageSource> storages;
  for (const StorageFill& fill : header.storages) {
    StorageSource storage{.size_bytes = fill.size_bytes(), .literal = {}, .why = why};
    for (const ZipRecord& record : sibling.zip().records) {
      if (fill.copy && record.data_offset == fill.copy->offset_bytes &&
          record.size_bytes == fill.copy->size_bytes && record.name.starts_with("data/"))
        storage.literal = number_of(sibling, record);
    }
    storages.push_back(std::move(storage));
  }
  return make_stand_in(name, std::make_shared<const std::string>(header.head), storages, nullptr);
}

}  // namespace isoshard::reshard
