// See hyper.h; keys as deepspeed/runtime/engine.py writes them.
#include "checkpoint/deepspeed/hyper.h"

#include <algorithm>
#include <cstdio>
#include <set>

#include "checkpoint/deepspeed/fields.h"
#include "checkpoint/format/crc.h"
#include "core/error.h"
#include "core/polynomial.h"

namespace isoshard::checkpoint {
namespace {

using nlohmann::json;

class Renderer {
 public:
  explicit Renderer(const TorchFile& document) : document_(document), pickle_(document.pickle()) {}

  json render(NodeId node) {
    if (++visited_ > 2'000'000) {
      throw Error(ErrorInfo{
          .code = ErrorCode::kLimit,
          .what = "A limit against resource bombs was reached: values in the client state.",
          .file = document_.path(),
          .expected = "at most 2000000",
          .next = "look at what the training script passes as client_state"});
    }
    if (const std::optional<TensorView> view = document_.tensor(node)) return tensor(*view);
    switch (pickle_.kind(node)) {
      case Kind::kNone:
        return nullptr;
      case Kind::kBool:
        return pickle_.integer_value(node) != 0;
      case Kind::kInt:
        return pickle_.integer_value(node);
      case Kind::kBigInt:
        return {{"int", hex(pickle_.text(node))}};
      case Kind::kFloat:
        return real(pickle_.real_value(node));
      case Kind::kString:
        return text(node);
      case Kind::kTuple:
        return {{"tuple", list(pickle_.items(node))}};
      case Kind::kList:
        return list(pickle_.items(node));
      case Kind::kDict:
        return mapping(pickle_.items(node));
      case Kind::kGlobal:
        return {{"global", pickle_.module(node) + " " + pickle_.attribute(node)}};
      case Kind::kPersistent:
        return {{"storage", "?"}};
      case Kind::kObject:
        break;
    }
    const ObjectParts& parts = pickle_.parts(node);
    json object = {{"class", render(parts.callable)}, {"args", render(parts.args)}};
    if (!parts.appended.empty()) object["items"] = list(parts.appended);
    if (!parts.set.empty()) object["set"] = mapping(parts.set);
    if (parts.state != kNoNode) object["state"] = render(parts.state);
    return {{"object", object}};
  }

 private:
  static std::string hex(const std::string& bytes) {
    std::string digits;
    for (char c : bytes) {
      char buffer[3];
      std::snprintf(buffer, sizeof buffer, "%02x", static_cast<unsigned char>(c));
      digits += buffer;
    }
    return digits;
  }
  static json real(double value) {
    char buffer[40];
    std::snprintf(buffer, sizeof buffer, "%a", value);
    return {{"float", buffer}};
  }
  json text(NodeId node) const {
    const std::string& value = pickle_.text(node);
    const json candidate = value;
    try {
      (void)candidate.dump();
      return candidate;
    } catch (const json::exception&) {  // not UTF-8
      return {{"bytes", hex(value)}};
    }
  }
  json list(const std::vector<NodeId>& nodes) {
    json result = json::array();
    for (NodeId node : nodes) result.push_back(render(node));
    return result;
  }
  json mapping(const std::vector<NodeId>& entries) {
    // Keys that tag other types below are never taken as names.
    static const std::set<std::string> kTags = {"dict",   "float", "tuple",   "int",   "global",
                                                "object", "bytes", "storage", "tensor"};
    bool plain = true;
    for (size_t i = 0; i < entries.size(); i += 2) {
      plain = plain && pickle_.kind(entries[i]) == Kind::kString &&
              kTags.count(pickle_.text(entries[i])) == 0;
    }
    json result = json::object();
    json pairs = json::array();
    for (size_t i = 0; i + 1 < entries.size(); i += 2) {
      const json key = plain ? text(entries[i]) : render(entries[i]);
      if (plain && key.is_string())
        result[key.get<std::string>()] = render(entries[i + 1]);
      else
        pairs.push_back({key, render(entries[i + 1])});
    }
    return plain && pairs.empty() ? result : json{{"dict", pairs}};
  }
  json tensor(const TensorView& view) const {
    RawCrcs crcs;
    const int64_t item = item_size_bytes(view.dtype);
    const int64_t bytes_total = numel(view.shape) * item;
    const ZipRecord& record = document_.record(view.storage);
    if (record.size_bytes > (64 << 20)) {
      throw Error(ErrorInfo{.code = ErrorCode::kLimit,
                            .what = "A tensor in the client state is very large.",
                            .file = document_.path(),
                            .expected = "at most 64 MiB"});
    }
    std::vector<std::byte> whole(static_cast<size_t>(record.size_bytes));
    document_.file().read_at(record.data_offset, whole);
    if (crc32_of(whole) != record.crc32) {
      throw Error(ErrorInfo{.code = ErrorCode::kCorrupt,
                            .what = "A record's bytes do not fit its CRC: the file is damaged.",
                            .file = document_.path(),
                            .entry = quote(record.name),
                            .next = "restore this file from another copy"});
    }
    for (const FileFragment& f : file_fragments(document_, 0, view)) {
      crcs.update(std::span(whole).subspan(static_cast<size_t>(f.offset_bytes - record.data_offset),
                                           static_cast<size_t>(f.count * item)));
    }
    return {{"tensor",
             {name(view.dtype), view.shape,
              hex16(crc64_ecma_polynomial().finish(crcs.ecma, bytes_total)),
              hex16(crc64_jones_polynomial().finish(crcs.jones, bytes_total))}}};
  }

  const TorchFile& document_;
  const Pickle& pickle_;
  int64_t visited_ = 0;
};

json loss_scaler(const ShardedState& state) {
  const json none = {{"cur_scale", {{"float", "0x1p+0"}}}, {"dynamic", false}};
  const int file = state.optim_files.empty() ? state.model_files[0] : state.optim_files[0];
  const TorchFile& document = state.document(file);
  const Pickle& pickle = document.pickle();
  const Fields fields(document);
  NodeId holder = pickle.root;
  if (state.flavour == Flavour::kZero0) holder = fields.maybe(holder, "optimizer");
  if (state.flavour == Flavour::kZero12 || state.flavour == Flavour::kZero3 ||
      state.flavour == Flavour::kBf16Optimizer) {
    holder = fields.maybe(holder, "optimizer_state_dict");
  }
  if (holder == kNoNode || !pickle.is_mapping(holder)) return none;
  json result = none;
  if (state.flavour == Flavour::kZero0) {
    const NodeId scale = pickle.find(holder, "cur_scale");
    if (scale == kNoNode) return none;
    result["cur_scale"] = python_json(document, scale);
    result["dynamic"] = fields.truth(holder, "dynamic_loss_scale");
    if (!result["dynamic"].get<bool>()) return result;
    for (const char* key : {"cur_iter", "last_overflow_iter", "scale_factor", "scale_window"}) {
      if (const NodeId value = pickle.find(holder, key); value != kNoNode)
        result[key] = python_json(document, value);
    }
    return result;
  }
  const NodeId state_dict = fields.state_of(pickle.find(holder, "loss_scaler"));
  if (state_dict == kNoNode) return none;
  result = python_json(document, state_dict);
  return result;
}

}  // namespace

json python_json(const TorchFile& document, NodeId node) { return Renderer(document).render(node); }

bool is_engine_key(const std::string& key) {
  static const std::set<std::string> kKeys = {"module",
                                              "buffer_names",
                                              "optimizer",
                                              "param_shapes",
                                              "frozen_param_shapes",
                                              "shared_params",
                                              "frozen_param_fragments",
                                              "lr_scheduler",
                                              "data_sampler",
                                              "random_ltd",
                                              "sparse_tensor_module_names",
                                              "skipped_steps",
                                              "global_steps",
                                              "global_samples",
                                              "dp_world_size",
                                              "mp_world_size",
                                              "checkpoint_parallel_dimensions",
                                              "ds_config",
                                              "ds_version",
                                              "universal_checkpoint_info",
                                              "num_experts",
                                              "ds_autoep_layers",
                                              "autoep_layers",
                                              "folding"};
  return kKeys.count(key) != 0;
}

json client_state_json(const TorchFile& document) {
  json result = json::object();
  const Fields fields(document);
  const std::vector<NodeId>& entries = fields.pickle().entries(fields.root());
  for (size_t i = 0; i + 1 < entries.size(); i += 2) {
    if (fields.pickle().kind(entries[i]) != Kind::kString) {
      result["(key " + python_json(document, entries[i]).dump() + ")"] =
          python_json(document, entries[i + 1]);
    } else if (!is_engine_key(fields.pickle().text(entries[i]))) {
      result[python_json(document, entries[i]).dump()] = python_json(document, entries[i + 1]);
    }
  }
  return result;
}

json hyper_json(const ShardedState& state) {
  if (state.model_files.empty()) return json::object();
  const TorchFile& document = state.document(state.model_files[0]);
  const Fields fields(document);
  json result = {{"client_state", client_state_json(document)},
                 {"loss_scaler", loss_scaler(state)}};
  for (const char* key : {"global_samples", "global_steps", "skipped_steps"}) {
    if (const NodeId value = fields.maybe(fields.root(), key); value != kNoNode)
      result["counters"][key] = python_json(document, value);
  }
  for (const char* key : {"lr_scheduler", "data_sampler", "random_ltd"}) {
    const NodeId value = fields.maybe(fields.root(), key);
    result[key] = value == kNoNode ? json(nullptr) : python_json(document, value);
  }
  for (const GroupState& group : state.groups) {
    const TorchFile& holder = state.document(group.hyper.file);
    json entry = python_json(holder, group.hyper.node);
    entry.erase("params");
    std::vector<std::string> names;
    for (int number : group.parameters)
      names.push_back(state.parameters[static_cast<size_t>(number)].name);
    std::sort(names.begin(), names.end());
    entry["names"] = names;
    result["param_groups"].push_back(entry);
  }
  return result;
}

}  // namespace isoshard::checkpoint
