// JSON by nlohmann-json's SAX interface, so that duplicate keys are seen.
#include "checkpoint/format/safetensors.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "core/error.h"
#include "core/mutant.h"
#include "core/utf8.h"

namespace isoshard::checkpoint {
namespace {

using nlohmann::json;

struct Name {
  const char* text;
  DType dtype;
};

constexpr Name kNames[] = {{"F64", DType::kFloat64},        {"F32", DType::kFloat32},
                           {"F16", DType::kFloat16},        {"BF16", DType::kBFloat16},
                           {"I64", DType::kInt64},          {"I32", DType::kInt32},
                           {"I16", DType::kInt16},          {"I8", DType::kInt8},
                           {"U8", DType::kUInt8},           {"BOOL", DType::kBool},
                           {"U16", DType::kUInt16},         {"U32", DType::kUInt32},
                           {"U64", DType::kUInt64},         {"F8_E4M3", DType::kFloat8E4M3FN},
                           {"F8_E5M2", DType::kFloat8E5M2}, {"C64", DType::kComplex64}};

[[noreturn]] void corrupt(const ReadableFile& file, const std::string& what,
                          const std::string& entry = "header", const std::string& expected = "",
                          const std::string& found = "") {
  throw Error(ErrorInfo{.code = ErrorCode::kCorrupt,
                        .what = what,
                        .file = file.path(),
                        .entry = entry,
                        .expected = expected,
                        .found = found,
                        .next = "restore this file from another copy"});
}

// Estimates of what a header takes in memory while it is read: some 160,000 tensors fit.
constexpr int64_t kHeaderBytes = 40'000'000;  // the format allows 100,000,000
constexpr int64_t kMemoryBytes = 128'000'000;
constexpr int64_t kKeyBytes = 150;
constexpr int64_t kValueBytes = 48;

[[noreturn]] void limit(const ReadableFile& file, const std::string& what, int64_t most) {
  throw Error(ErrorInfo{.code = ErrorCode::kLimit,
                        .what = "A limit against resource bombs was reached: " + what + ".",
                        .file = file.path(),
                        .entry = "header",
                        .expected = "at most " + std::to_string(most) + " bytes",
                        .next =
                            "do not trust this file; real models stay far below, or are sharded "
                            "over several files"});
}

// Reads the text once before anything is built of it, so that duplicate keys, lists in lists, depth
// and memory are refused as they come. (The library's callback for the same purpose looks through
// all earlier tensors after each one.)
class Watch final : public nlohmann::json_sax<json> {
 public:
  explicit Watch(const ReadableFile& file) : file_(file) {}

  bool null() override { return value(0); }
  bool boolean(bool) override { return value(0); }
  bool number_integer(number_integer_t) override { return value(0); }
  bool number_unsigned(number_unsigned_t) override { return value(0); }
  bool number_float(number_float_t, const string_t&) override { return value(0); }
  bool string(string_t& text) override { return value(text.size()); }
  bool binary(binary_t&) override { return value(0); }
  bool start_object(size_t) override { return start({}); }
  bool start_array(size_t) override { return start({.is_list = true}); }
  bool end_object() override { return end(); }
  bool end_array() override { return end(); }
  bool key(string_t& text) override {
    charge(kKeyBytes, text.size());
    if (!open_.back().keys.insert(text).second && !mutant("safetensors_key_twice"))
      corrupt(file_, "The header has a key twice.", quote(text));
    return true;
  }
  bool parse_error(size_t at, const std::string&, const json::exception&) override {
    corrupt(file_, "The header is not a JSON object.", "header, byte " + std::to_string(at));
  }

 private:
  struct Container {
    bool is_list = false;
    int values = 0;                // of a list
    std::set<std::string> keys{};  // of an object
  };
  void charge(int64_t bytes, size_t text_bytes) {
    memory_bytes_ += bytes + static_cast<int64_t>(text_bytes);
    if (memory_bytes_ > kMemoryBytes && !mutant("safetensors_memory_unlimited"))
      limit(file_, "memory for the header", kMemoryBytes);
  }
  bool value(size_t text_bytes) {
    charge(kValueBytes, text_bytes);
    if (!open_.empty() && open_.back().is_list && ++open_.back().values > 100)
      corrupt(file_, "A list in the header is too long.");
    return true;
  }
  bool start(Container container) {
    charge(kValueBytes, 0);
    if (open_.size() > 3) corrupt(file_, "The header is nested too deeply.");
    if (!open_.empty() && open_.back().is_list && !mutant("safetensors_lists_in_lists"))
      corrupt(file_, "A list in the header holds a list or an object.");
    open_.push_back(std::move(container));
    return true;
  }
  bool end() {
    open_.pop_back();
    return true;
  }

  const ReadableFile& file_;
  std::vector<Container> open_;
  int64_t memory_bytes_ = 0;
};

json parse_strict(const ReadableFile& file, const std::string& text) {
  {
    Watch watch(file);
    json::sax_parse(text, &watch);
  }
  return json::parse(text);  // begins with '{', as header_text() saw
}

// A list of integers: nlohmann-json alone would take 1.5 and true for 1.
Shape integers(const ReadableFile& file, const std::string& name, const json& value) {
  const bool whole =
      value.is_array() && std::all_of(value.begin(), value.end(), [](const json& item) {
        return (item.is_number_integer() ||
                (mutant("safetensors_fractions") && item.is_number())) &&
               (!item.is_number_unsigned() || item.get<uint64_t>() <= INT64_MAX);
      });
  if (!whole)
    corrupt(file, "A tensor's shape or data_offsets are not integers.", quote(name), "",
            value.dump().substr(0, 200));
  return value.get<Shape>();
}

}  // namespace

namespace {

// The header's text; its length stands in the first 8 bytes.
std::string header_text(const ReadableFile& file) {
  if (file.size_bytes() < 8)
    corrupt(file, "The file is too short.", "header", "at least 8 bytes",
            std::to_string(file.size_bytes()));
  uint64_t length = 0;
  file.read_at(0, std::as_writable_bytes(std::span(&length, 1)));
  if (length > 100'000'000 || static_cast<int64_t>(length) > file.size_bytes() - 8) {
    corrupt(file, "The header's length is impossible.", "header",
            "at most the file's size and 100000000", std::to_string(length));
  }
  if (static_cast<int64_t>(length) > kHeaderBytes) limit(file, "size of the header", kHeaderBytes);
  std::string text(length, '\0');
  file.read_at(8, std::as_writable_bytes(std::span(text)));
  if (text.empty() || text[0] != '{') corrupt(file, "The header does not begin with '{'.");
  if (text.find('\0') != std::string::npos && !mutant("safetensors_nul_allowed"))
    corrupt(file, "The header has a NUL byte.");
  return text;
}

}  // namespace

SafetensorsIndex read_safetensors(const ReadableFile& file) {
  const std::string text = header_text(file);
  const json header = parse_strict(file, text);
  const int64_t data = 8 + static_cast<int64_t>(text.size());
  SafetensorsIndex index;
  std::map<int64_t, std::pair<int64_t, SafetensorsEntry>> by_begin;
  std::vector<SafetensorsEntry> empty;
  for (const auto& [name, value] : header.items()) {
    if (name == "__metadata__") {
      if (!value.is_object()) corrupt(file, "Metadata that is not an object of texts.");
      for (const auto& [key, entry] : value.items()) {
        if (!entry.is_string()) corrupt(file, "Metadata that is not text.", quote(key));
        index.metadata.emplace_back(key, entry.get<std::string>());
      }
      continue;
    }
    const std::string why = why_unsafe_name(name);
    if (!why.empty() && !mutant("safetensors_name_unchecked"))
      corrupt(file, "A tensor name cannot be used: " + why + ".", quote(name));
    try {
      SafetensorsEntry entry{.name = name, .shape = integers(file, name, value.at("shape"))};
      bool known = false;
      for (const Name& row : kNames) {
        if (value.at("dtype").get<std::string>() != row.text) continue;
        entry.dtype = row.dtype;
        known = true;
      }
      if (!known)
        corrupt(file, "A tensor has an unknown dtype.", quote(name), "",
                quote(value.at("dtype").get<std::string>()));
      const Shape offsets = integers(file, name, value.at("data_offsets"));
      if (offsets.size() != 2) corrupt(file, "A tensor has not two data_offsets.", quote(name));
      const int64_t begin = offsets[0], end = offsets[1];
      const std::optional<int64_t> count = checked_numel(entry.shape);
      if (!count)
        corrupt(file, "A tensor's shape is negative or too large.", quote(name),
                "sizes whose product is at most 2^58", to_string(entry.shape));
      const int64_t bytes = *count * item_size_bytes(entry.dtype);
      if (begin < 0 || end < begin || end > file.size_bytes() - data ||
          (end - begin != bytes && !mutant("safetensors_shape_unchecked"))) {
        corrupt(file, "A tensor's offsets do not fit its shape or the file.", quote(name),
                std::to_string(bytes) + " bytes",
                std::to_string(begin) + " to " + std::to_string(end));
      }
      entry.offset_bytes = data + begin;
      if (bytes == 0)
        empty.push_back(entry);
      else if (!by_begin.emplace(begin, std::pair(end, entry)).second &&
               !mutant("safetensors_shared_bytes"))
        corrupt(file, "Two tensors share bytes.", quote(name));
    } catch (const json::exception&) {
      corrupt(file, "A tensor's entry lacks dtype, shape or data_offsets.", quote(name));
    }
  }
  int64_t cursor = 0;
  for (auto& [begin, item] : by_begin) {
    if (begin != cursor && !mutant("safetensors_hole_allowed"))
      corrupt(file, "Tensors overlap or leave a hole.", quote(item.second.name),
              std::to_string(cursor), std::to_string(begin));
    cursor = item.first;
    index.entries.push_back(std::move(item.second));
  }
  if (cursor != file.size_bytes() - data && !mutant("safetensors_tail_allowed"))
    corrupt(file, "Bytes follow the last tensor, or are missing.", "data", std::to_string(cursor),
            std::to_string(file.size_bytes() - data));
  index.entries.insert(index.entries.end(), empty.begin(), empty.end());
  return index;
}

std::string safetensors_head(const SafetensorsIndex& index) {
  nlohmann::ordered_json header;
  for (const auto& [key, value] : index.metadata) header["__metadata__"][key] = value;
  int64_t cursor = 0;
  for (const SafetensorsEntry& entry : index.entries) {
    const int64_t bytes = numel(entry.shape) * item_size_bytes(entry.dtype);
    const char* dtype = nullptr;
    for (const Name& row : kNames) {
      if (row.dtype == entry.dtype) dtype = row.text;
    }
    if (dtype == nullptr)
      throw Error(ErrorInfo{.code = ErrorCode::kUnsupported,
                            .what = "safetensors cannot hold this dtype.",
                            .entry = quote(entry.name),
                            .found = name(entry.dtype),
                            .next = "use --format bin"});
    header[entry.name] = {
        {"dtype", dtype}, {"shape", entry.shape}, {"data_offsets", {cursor, cursor + bytes}}};
    cursor += bytes;
  }
  std::string text = header.is_null() ? "{}" : header.dump();
  while (text.size() % 8 != 0 && !mutant("safetensors_head_unpadded")) text += ' ';
  std::string head;
  for (int i = 0; i < 8; ++i) head += static_cast<char>((text.size() >> (8 * i)) & 0xFF);
  return head + text;
}

}  // namespace isoshard::checkpoint
