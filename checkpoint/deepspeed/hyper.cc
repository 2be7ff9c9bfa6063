// See hyper.h; keys as deepspeed/runtime/engine.py writes them.
#include "checkpoint/deepspeed/hyper.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <set>

#include "checkpoint/deepspeed/fields.h"
#include "checkpoint/format/crc.h"
#include "core/error.h"
#include "core/hex_float.h"
#include "core/polynomial.h"

namespace isoshard::checkpoint {
namespace {

using nlohmann::json;

// What one canonical JSON has cost so far. References make a graph of a few bytes stand for a tree
// of any size, so that values and text are counted as they are written, not as they are stored.
struct Spent {
  static constexpr int64_t kMostValues = 400'000;
  static constexpr int64_t kMostTextBytes = 32 << 20;
  static constexpr int64_t kMostTensorBytes = 64 << 20;  // of one tensor

  int64_t values = 0;
  int64_t text_bytes = 0;
  int64_t tensor_bytes = 0;
};

class Renderer {
 public:
  Renderer(const TorchFile& document, std::string entry, Spent* spent)
      : document_(document), pickle_(document.pickle()), entry_(std::move(entry)), spent_(*spent) {}

  json render(NodeId node) {
    charge("values", &spent_.values, 1, Spent::kMostValues);
    if (const std::optional<TensorView> view = document_.tensor(node)) return tensor(node, *view);
    switch (pickle_.kind(node)) {
      case Kind::kNone:
        return nullptr;
      case Kind::kBool:
        return pickle_.integer_value(node) != 0;
      case Kind::kInt:
        return pickle_.integer_value(node);
      case Kind::kBigInt:
        charge_text(2 * pickle_.text(node).size());
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
        charge_text(pickle_.module(node).size() + pickle_.attribute(node).size());
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
    return {{"object", std::move(object)}};
  }

 private:
  void charge(const char* what, int64_t* spent, int64_t amount, int64_t most) const {
    if (!__builtin_add_overflow(*spent, amount, spent) && *spent <= most) return;
    throw Error(ErrorInfo{
        .code = ErrorCode::kLimit,
        .what = std::string("A limit against resource bombs was reached: ") + what + ".",
        .file = document_.path(),
        .entry = entry_,
        .expected = "at most " + std::to_string(most) + ", shared objects counted each time",
        .next =
            "look at what the training script passes as client_state; a checkpoint needs less"});
  }
  void charge_text(size_t bytes) const {
    charge("bytes of text", &spent_.text_bytes, static_cast<int64_t>(bytes), Spent::kMostTextBytes);
  }
  static std::string hex(const std::string& bytes) {
    std::string digits;
    for (char c : bytes) {
      char buffer[3];
      std::snprintf(buffer, sizeof buffer, "%02x", static_cast<unsigned char>(c));
      digits += buffer;
    }
    return digits;
  }
  static json real(double value) { return {{"float", hex_float(value)}}; }
  json text(NodeId node) const {
    const std::string& value = pickle_.text(node);
    charge_text(value.size());
    json candidate = value;
    try {
      (void)candidate.dump();
      return candidate;
    } catch (const json::exception&) {  // not UTF-8
      charge_text(value.size());
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
      json key = plain ? text(entries[i]) : render(entries[i]);
      if (plain && key.is_string())
        result[key.get<std::string>()] = render(entries[i + 1]);
      else
        pairs.push_back({std::move(key), render(entries[i + 1])});
    }
    return plain && pairs.empty() ? result : json{{"dict", std::move(pairs)}};
  }
  json tensor(NodeId node, const TensorView& view) {
    const auto [known, fresh] = tensors_.emplace(node, nullptr);
    if (fresh) known->second = read_tensor(view);
    return known->second;
  }
  json read_tensor(const TensorView& view) const {
    RawCrcs crcs;
    const int64_t item = item_size_bytes(view.dtype);
    const int64_t bytes_total = numel(view.shape) * item;
    const ZipRecord& record = document_.record(view.storage);
    int64_t this_one = 0;
    charge("bytes of one tensor", &this_one, record.size_bytes, Spent::kMostTensorBytes);
    // Each view reads its whole storage; views of one storage are few in real files.
    charge("bytes of tensors", &spent_.tensor_bytes, record.size_bytes,
           Spent::kMostTensorBytes + 2 * document_.file().size_bytes());
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
  std::string entry_;
  Spent& spent_;
  std::map<NodeId, json> tensors_;
};

json loss_scaler(const ShardedState& state, Spent* spent) {
  const json none = {{"cur_scale", {{"float", "0x1p+0"}}}, {"dynamic", false}};
  const int file = state.optim_files.empty() ? state.model_files[0] : state.optim_files[0];
  const TorchFile& document = state.document(file);
  const Pickle& pickle = document.pickle();
  const Fields fields(document);
  const auto value_of = [&](NodeId node) {
    return Renderer(document, "loss_scaler", spent).render(node);
  };
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
    result["cur_scale"] = value_of(scale);
    result["dynamic"] = fields.truth(holder, "dynamic_loss_scale");
    if (!result["dynamic"].get<bool>()) return result;
    for (const char* key : {"cur_iter", "last_overflow_iter", "scale_factor", "scale_window"}) {
      if (const NodeId value = pickle.find(holder, key); value != kNoNode)
        result[key] = value_of(value);
    }
    return result;
  }
  const NodeId state_dict = fields.state_of(pickle.find(holder, "loss_scaler"));
  if (state_dict == kNoNode) return none;
  result = value_of(state_dict);
  return result;
}

json client_state(const TorchFile& document, Spent* spent) {
  json result = json::object();
  const Fields fields(document);
  const Pickle& pickle = fields.pickle();
  const std::vector<NodeId>& entries = pickle.entries(fields.root());
  for (size_t i = 0; i + 1 < entries.size(); i += 2) {
    const bool named = pickle.kind(entries[i]) == Kind::kString;
    if (named && is_engine_key(pickle.text(entries[i]))) continue;
    const std::string entry = named ? quote(pickle.text(entries[i]).substr(0, 200)) : "(key)";
    Renderer renderer(document, "client state " + entry, spent);
    const std::string key = renderer.render(entries[i]).dump();
    result[named ? key : "(key " + key + ")"] = renderer.render(entries[i + 1]);
  }
  return result;
}

}  // namespace

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

namespace {

bool of_experts(const json& group) {
  return group.is_object() && group.value("moe", json(false)) == json(true);
}

// The loss scaler, and each group with the names of its parameters.
json optimizer_part(const ShardedState& state, Spent* spent) {
  json result = {{"loss_scaler", loss_scaler(state, spent)}};
  for (const GroupState& group : state.groups) {
    const TorchFile& holder = state.document(group.hyper.file);
    json entry = Renderer(holder, "param_groups", spent).render(group.hyper.node);
    entry.erase("params");
    // "ep_size_4": the degree is the topology's, and stale after a load elsewhere.
    if (of_experts(entry)) entry.erase("name");
    std::vector<std::string> names;
    for (int number : group.parameters)
      names.push_back(state.parameters[static_cast<size_t>(number)].name);
    std::sort(names.begin(), names.end());
    entry["names"] = names;
    result["param_groups"].push_back(std::move(entry));
  }
  return result;
}

// Groups of experts that differ in nothing but their parameters, one behind the other, become one:
// where it is split depends on the expert-parallel degree.
void join_groups_of_experts(json* groups) {
  json joined = json::array();
  std::vector<std::vector<std::string>> names;
  for (json& group : *groups) {
    const std::vector<std::string> own = group["names"];
    group.erase("names");
    if (joined.empty() || !of_experts(group) || joined.back() != group) {
      joined.push_back(std::move(group));
      names.emplace_back();
    }
    names.back().insert(names.back().end(), own.begin(), own.end());
  }
  for (size_t i = 0; i < names.size(); ++i) {
    std::sort(names[i].begin(), names[i].end());
    joined[i]["names"] = std::move(names[i]);
  }
  *groups = std::move(joined);
}

}  // namespace

json optimizer_json(const ShardedState& state) {
  Spent spent;
  return optimizer_part(state, &spent);
}

json client_state_json(const TorchFile& document) {
  Spent spent;
  return client_state(document, &spent);
}

json hyper_json(const ShardedState& state) {
  if (state.model_files.empty()) return json::object();
  const TorchFile& document = state.document(state.model_files[0]);
  const Fields fields(document);
  Spent spent;
  const auto value_of = [&spent](const TorchFile& holder, NodeId node, const char* entry) {
    return Renderer(holder, entry, &spent).render(node);
  };
  json result = json::object();
  result["client_state"] = client_state(document, &spent);
  for (const char* key : {"global_samples", "global_steps", "skipped_steps"}) {
    if (const NodeId value = fields.maybe(fields.root(), key); value != kNoNode)
      result["counters"][key] = value_of(document, value, key);
  }
  for (const char* key : {"lr_scheduler", "data_sampler", "random_ltd"}) {
    const NodeId value = fields.maybe(fields.root(), key);
    result[key] = value == kNoNode ? json(nullptr) : value_of(document, value, key);
  }
  result.update(optimizer_part(state, &spent));
  if (result.contains("param_groups")) join_groups_of_experts(&result["param_groups"]);
  return result;
}

}  // namespace isoshard::checkpoint
