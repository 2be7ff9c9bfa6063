// Reading of torch.save files; forms of tensors as in torch/_utils.py and torch/_tensor.py.
#include "checkpoint/format/torch_file.h"

#include <algorithm>

#include "checkpoint/format/crc.h"
#include "checkpoint/format/hostile_globals.h"
#include "checkpoint/format/pickle_reader.h"
#include "core/error.h"
#include "core/mutant.h"

namespace isoshard::checkpoint {
namespace {

struct TypeRow {
  const char* name;
  DType dtype;
};

constexpr TypeRow kTypes[] = {{"FloatStorage", DType::kFloat32},
                              {"DoubleStorage", DType::kFloat64},
                              {"HalfStorage", DType::kFloat16},
                              {"BFloat16Storage", DType::kBFloat16},
                              {"LongStorage", DType::kInt64},
                              {"IntStorage", DType::kInt32},
                              {"ShortStorage", DType::kInt16},
                              {"CharStorage", DType::kInt8},
                              {"ByteStorage", DType::kUInt8},
                              {"BoolStorage", DType::kBool},
                              {"ComplexFloatStorage", DType::kComplex64},
                              {"ComplexDoubleStorage", DType::kComplex128}};

constexpr size_t kShelfEntries = 8;      // one for each device of a node
constexpr size_t kShelfBytes = 8 << 20;  // larger pickles are not kept

bool is_number(const std::string& text) {
  return !text.empty() && text.size() <= 9 &&
         std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; });
}

}  // namespace

std::string storage_type_name(DType dtype) {
  for (const TypeRow& row : kTypes) {
    if (row.dtype == dtype) return row.name;
  }
  return "UntypedStorage";
}

int64_t storage_item_bytes(const std::string& type_name) {
  if (type_name == "UntypedStorage") return 1;
  for (const TypeRow& row : kTypes) {
    if (type_name == row.name) return item_size_bytes(row.dtype);
  }
  return 0;
}

void refuse_hostile(const Pickle& pickle, const std::string& path) {
  const HostileGlobal hostile = find_hostile_global(pickle);
  if (hostile.name.empty() || mutant("torch_hostile_allowed")) return;
  throw Error(ErrorInfo{.code = ErrorCode::kHostile,
                        .what = "The pickle names a function that would run a program or reach "
                                "the system when loaded by Python.",
                        .file = path,
                        .entry = "global " + quote(hostile.name),
                        .found = hostile.called ? kCalledGlobal : "its name alone",
                        .safe = "nothing was executed: this program never runs a pickle",
                        .next = "do not load this file with torch; find out who wrote it"});
}

bool TensorView::is_contiguous() const {
  int64_t step = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    if ((shape[i] != 1 || mutant("torch_contiguous_by_stride")) && stride[i] != step)
      return numel(shape) == 0;
    step *= shape[i];
  }
  return true;
}

std::shared_ptr<const TorchDocument> PickleShelf::find(const std::string& bytes) const {
  std::deque<std::shared_ptr<const Entry>> entries;
  {
    const std::lock_guard lock(mutex_);
    entries = entries_;
  }
  for (const auto& entry : entries) {
    if (entry->bytes == bytes) return entry->document;
  }
  return nullptr;
}

void PickleShelf::keep(std::string bytes, std::shared_ptr<const TorchDocument> document) {
  auto entry = std::make_shared<const Entry>(Entry{std::move(bytes), std::move(document)});
  const std::lock_guard lock(mutex_);
  entries_.push_front(std::move(entry));
  if (entries_.size() > kShelfEntries) entries_.pop_back();
}

TorchFile::TorchFile(Storage& storage, const std::string& path, PickleShelf* shelf)
    : path_(path), file_(storage.open_read(path)) {
  if (file_->size_bytes() >= 2) {
    std::string magic(2, '\0');
    file_->read_at(0, std::as_writable_bytes(std::span(magic)));
    if (magic != "PK" && magic[0] == '\x80') {
      throw Error(ErrorInfo{.code = ErrorCode::kUnsupported,
                            .what = "This is a legacy torch stream, not a zip archive.",
                            .file = path,
                            .expected = "a zip archive, which begins with PK",
                            .found = "a pickle",
                            .next = "save it again with checkpoint_serialization true, or load and "
                                    "torch.save it once"});
    }
  }
  zip_ = read_zip_index(*file_);
  read_pickle_record(shelf);
  check_small_records();
  find_records();
}

void TorchFile::corrupt(const std::string& what, const std::string& entry,
                        const std::string& expected, const std::string& found) const {
  throw Error(ErrorInfo{.code = ErrorCode::kCorrupt,
                        .what = what,
                        .file = path_,
                        .entry = entry,
                        .expected = expected,
                        .found = found,
                        .next = "restore this file from another copy, or use an older checkpoint"});
}

std::string TorchFile::read_record(const ZipRecord& record) const {
  std::string bytes(static_cast<size_t>(record.size_bytes), '\0');
  file_->read_at(record.data_offset, std::as_writable_bytes(std::span(bytes)));
  const uint32_t found = crc32_of(std::as_bytes(std::span(bytes)));
  if (found != record.crc32 && !mutant("torch_crc_skipped")) {
    corrupt("A record's bytes do not fit its CRC.", quote(record.name),
            hex16(record.crc32).substr(8), hex16(found).substr(8));
  }
  return bytes;
}

void TorchFile::read_pickle_record(PickleShelf* shelf) {
  for (const ZipRecord& record : zip_.records) {
    if (record.name != "data.pkl") continue;
    if (record.size_bytes > PickleLimits{}.stream_bytes) {
      throw Error(
          ErrorInfo{.code = ErrorCode::kLimit,
                    .what = "A limit against resource bombs was reached: pickle size.",
                    .file = path_,
                    .entry = quote(record.name),
                    .expected = "at most " + std::to_string(PickleLimits{}.stream_bytes) + " bytes",
                    .found = std::to_string(record.size_bytes) + " bytes",
                    .next = "do not trust this file; real checkpoints stay far below"});
    }
    std::string bytes = read_record(record);
    const bool shared = shelf != nullptr && bytes.size() <= kShelfBytes;
    if (shared) document_ = shelf->find(bytes);
    if (document_ != nullptr) return;
    auto document = std::make_shared<TorchDocument>();
    document->pickle = read_pickle(bytes, path_);
    refuse_hostile(document->pickle, path_);
    if (bytes[0] != '\x80')
      corrupt("A pickle does not begin with its protocol.", "data.pkl", "protocol 2", "none");
    read_storages(document.get());
    document_ = std::move(document);
    if (shared) shelf->keep(std::move(bytes), document_);
    return;
  }
  throw Error(ErrorInfo{.code = ErrorCode::kIncomplete,
                        .what = "The archive has no data.pkl record.",
                        .file = path_,
                        .expected = zip_.prefix + "/data.pkl",
                        .next = "this is not a file of torch.save"});
}

void TorchFile::check_small_records() {
  for (const ZipRecord& record : zip_.records) {
    const std::string& name = record.name;
    if (name == "data.pkl" || name.rfind("data/", 0) == 0) continue;
    if (record.size_bytes > 4096) {
      corrupt("A record that must be small is large.", quote(record.name), "at most 4096 bytes",
              std::to_string(record.size_bytes));
    }
    const std::string text = read_record(record);
    if (name == "byteorder" && text != "little" && !mutant("torch_byteorder_ignored")) {
      corrupt("The file's byte order is not little endian.", quote(record.name), "little",
              quote(text));
    }
    if (name == "version" && text != "3\n" && !mutant("torch_version_ignored")) {
      corrupt("The archive's version is unknown.", quote(record.name), "3", quote(text));
    }
    const bool known = name == "byteorder" || name == "version" || name == ".format_version" ||
                       name == ".storage_alignment" || name == ".data/serialization_id";
    if (!known && !mutant("torch_unknown_record"))
      corrupt("The archive has a record that torch does not write.", quote(record.name));
  }
}

void TorchFile::read_storages(TorchDocument* document) const {
  const Pickle& pickle = document->pickle;
  std::unordered_map<std::string, int> by_key;
  for (NodeId node = 0; node < pickle.size(); ++node) {
    if (pickle.kind(node) != Kind::kPersistent) continue;
    const NodeId id = pickle.persistent_id(node);
    const auto bad = [&] { corrupt("A persistent id is not that of a storage.", "data.pkl"); };
    if (pickle.kind(id) != Kind::kTuple || pickle.items(id).size() != 5) bad();
    const std::vector<NodeId>& parts = pickle.items(id);
    if (!pickle.is_string(parts[0], "storage") || pickle.kind(parts[1]) != Kind::kGlobal ||
        pickle.kind(parts[2]) != Kind::kString || pickle.kind(parts[3]) != Kind::kString ||
        pickle.kind(parts[4]) != Kind::kInt || !is_number(pickle.text(parts[2]))) {
      bad();
    }
    StorageEntry entry{.key = pickle.text(parts[2]),
                       .type_name = pickle.attribute(parts[1]),
                       .location = pickle.text(parts[3]),
                       .numel = pickle.integer_value(parts[4])};
    bool known = entry.type_name == "UntypedStorage";
    const std::string& module = pickle.module(parts[1]);
    if (module != "torch" && module != "torch.storage" && module != "torch.cuda")
      corrupt("A storage has an unknown class.", quote(module + " " + entry.type_name));
    for (const TypeRow& row : kTypes) {
      if (entry.type_name != row.name) continue;
      entry.dtype = row.dtype;
      known = true;
    }
    if (!known) corrupt("A storage has an unknown class.", quote(entry.type_name));
    const auto [number, fresh] =
        by_key.emplace(entry.key, static_cast<int>(document->storages.size()));
    if (fresh) {
      document->storages.push_back(entry);
    } else {
      const StorageEntry& first = document->storages[static_cast<size_t>(number->second)];
      if (!mutant("torch_storage_described_twice") &&
          (first.type_name != entry.type_name || first.numel != entry.numel))
        corrupt("One storage is described in two ways.", "data/" + entry.key);
    }
    document->storage_by_node.emplace(node, number->second);
  }
}

// Each storage has its record data/KEY of the right size, and each such record its storage.
void TorchFile::find_records() {
  std::unordered_map<std::string_view, int> by_key;
  by_key.reserve(zip_.records.size());
  for (size_t i = 0; i < zip_.records.size(); ++i) {
    const std::string_view name = zip_.records[i].name;
    if (name.starts_with("data/")) by_key.emplace(name.substr(5), static_cast<int>(i));
  }
  records_.reserve(document_->storages.size());
  for (const StorageEntry& entry : document_->storages) {
    const auto found = by_key.find(entry.key);
    if (found == by_key.end())
      corrupt("A tensor's storage is missing from the archive.", "data/" + entry.key);
    const int64_t bytes = zip_.records[static_cast<size_t>(found->second)].size_bytes;
    if (entry.numel < 0 || entry.numel > bytes ||
        (entry.numel * item_size_bytes(entry.dtype) != bytes &&
         !mutant("torch_storage_size_unchecked"))) {
      corrupt("A storage's record has the wrong size.", "data/" + entry.key,
              std::to_string(entry.numel) + " elements of " + name(entry.dtype),
              std::to_string(bytes) + " bytes");
    }
    records_.push_back(found->second);
    found->second = -1;
  }
  for (const auto& [key, record] : by_key) {
    if (record >= 0 && !mutant("torch_orphan_storage"))
      corrupt("The archive has a storage that no tensor uses.", "data/" + std::string(key));
  }
}

void TorchFile::drop_pickle() {
  document_ = std::make_shared<const TorchDocument>();
  records_ = {};
  std::erase_if(zip_.records, [](const ZipRecord& record) { return record.size_bytes == 0; });
  zip_.records.shrink_to_fit();
}

const ZipRecord& TorchFile::record(int storage) const {
  return zip_.records[static_cast<size_t>(records_[static_cast<size_t>(storage)])];
}

int64_t TorchFile::data_offset(const TensorView& view) const {
  return record(view.storage).data_offset + view.offset * item_size_bytes(view.dtype);
}

std::optional<TensorView> TorchFile::tensor(NodeId node) const {
  const Pickle& pickle = document_->pickle;
  if (node == kNoNode || pickle.kind(node) != Kind::kObject) return std::nullopt;
  const ObjectParts& parts = pickle.parts(node);
  if (parts.newobj) return std::nullopt;
  const std::vector<NodeId>& args = pickle.items(parts.args);
  const std::string& module = pickle.module(parts.callable);
  const std::string& function = pickle.attribute(parts.callable);
  if (module == "torch._tensor" && function == "_rebuild_from_type_v2") {
    if (args.size() != 4 || pickle.kind(args[2]) != Kind::kTuple ||
        !pickle.is_global(args[0], "torch._utils", "_rebuild_tensor_v2")) {
      corrupt("A tensor with attributes has an unknown form.", "data.pkl");
    }
    TensorView view = view_from(pickle.items(args[2]));
    view.attributes = args[3];
    return view;
  }
  if (module != "torch._utils") return std::nullopt;
  if (function == "_rebuild_tensor_v2" || function == "_rebuild_tensor_v3" ||
      function == "_rebuild_tensor") {
    return view_from(args);
  }
  if (function == "_rebuild_parameter" || function == "_rebuild_parameter_with_state") {
    if (args.empty()) corrupt("A parameter has no tensor.", "data.pkl");
    return tensor(args[0]);
  }
  if (function.rfind("_rebuild_", 0) == 0) {
    throw Error(ErrorInfo{.code = ErrorCode::kUnsupported,
                          .what = "A tensor has a form that is not supported.",
                          .file = path_,
                          .entry = quote(function),
                          .expected = "dense tensors (sparse and quantised ones are refused)",
                          .next = "save it as a dense tensor (to_dense(), dequantize())"});
  }
  return std::nullopt;
}

// A tuple of integers, or torch.Size of one.
Shape TorchFile::sizes_of(NodeId node) const {
  const Pickle& pickle = document_->pickle;
  if (pickle.kind(node) == Kind::kObject) {
    const std::vector<NodeId>& inner = pickle.items(pickle.parts(node).args);
    if (inner.size() != 1 || !pickle.is_global(pickle.parts(node).callable, "torch", "Size"))
      corrupt("A tensor is malformed: its size is not a tuple.", "data.pkl");
    node = inner[0];
  }
  if (pickle.kind(node) != Kind::kTuple)
    corrupt("A tensor is malformed: its size is not a tuple.", "data.pkl");
  Shape list;
  for (NodeId item : pickle.items(node)) {
    if (pickle.kind(item) != Kind::kInt)
      corrupt("A tensor is malformed: a size is not an integer.", "data.pkl");
    list.push_back(pickle.integer_value(item));
  }
  return list;
}

TensorView TorchFile::view_from(const std::vector<NodeId>& args) const {
  const Pickle& pickle = document_->pickle;
  const auto bad = [&](const char* why) {
    corrupt(std::string("A tensor is malformed: ") + why + ".", "data.pkl");
  };
  if (args.size() < 4 || pickle.kind(args[0]) != Kind::kPersistent ||
      pickle.kind(args[1]) != Kind::kInt) {
    bad("its arguments have the wrong types");
  }
  TensorView view;
  view.storage = document_->storage_by_node.at(args[0]);
  const StorageEntry& entry = document_->storages[static_cast<size_t>(view.storage)];
  view.dtype = entry.dtype;
  view.offset = pickle.integer_value(args[1]);
  int64_t storage_numel = entry.numel;
  view.shape = sizes_of(args[2]);
  view.stride = sizes_of(args[3]);
  if (args.size() > 4 && pickle.kind(args[4]) == Kind::kBool) {
    view.requires_grad = pickle.integer_value(args[4]) != 0;
  }
  if (entry.type_name == "UntypedStorage") {  // _rebuild_tensor_v3 names the dtype
    bool known = false;
    if (args.size() > 6 && pickle.kind(args[6]) == Kind::kGlobal) {
      known =
          pickle.module(args[6]) == "torch" && parse_dtype(pickle.attribute(args[6]), &view.dtype);
    }
    if (!known) bad("its dtype is unknown");
    storage_numel = entry.numel / item_size_bytes(view.dtype);
  }
  if (view.shape.size() != view.stride.size() ||
      (view.shape.size() > 64 && !mutant("torch_dimensions_unlimited")) || view.offset < 0) {
    bad("its shape, stride and offset do not fit");
  }
  const std::optional<int64_t> count = checked_numel(view.shape);
  if (!count) {
    corrupt("A tensor's shape is negative or too large.", "data/" + entry.key,
            "sizes whose product is at most 2^58", to_string(view.shape));
  }
  if (*count == 0) return view;
  if (*count > storage_numel && !mutant("torch_expanded_allowed")) {
    // An expanded view (stride 0) can claim terabytes of a few bytes.
    throw Error(ErrorInfo{.code = ErrorCode::kLimit,
                          .what = "A tensor has more elements than its storage.",
                          .file = path_,
                          .entry = "data/" + entry.key,
                          .expected = "at most " + std::to_string(storage_numel) + " elements",
                          .found = std::to_string(*count),
                          .next = "clone expanded tensors before saving them"});
  }
  int64_t last = view.offset;
  for (size_t i = 0; i < view.shape.size(); ++i) {
    int64_t reach = 0;
    if ((view.stride[i] < 0 && !mutant("torch_negative_stride")) ||
        __builtin_mul_overflow(view.shape[i] - 1, view.stride[i], &reach) ||
        __builtin_add_overflow(last, reach, &last)) {
      bad("its strides overflow");
    }
  }
  if (last >= storage_numel + mutant("torch_view_past_end")) {
    corrupt("A tensor reaches beyond its storage.", "data/" + entry.key,
            "elements below " + std::to_string(storage_numel), "element " + std::to_string(last));
  }
  return view;
}

}  // namespace isoshard::checkpoint
