// See shallow_json.h. The text is read twice: once to refuse it before anything is built of it, and
// once to build. (The library's callback for the same purpose looks through all earlier members of
// a list after each object in it.)
#include "checkpoint/shallow_json.h"

#include <set>
#include <vector>

#include "core/error.h"
#include "core/mutant.h"

namespace isoshard::checkpoint {
namespace {

using nlohmann::json;

constexpr int64_t kKeyBytes = 150, kValueBytes = 48;  // what one takes, without its text

class Watch final : public nlohmann::json_sax<json> {
 public:
  explicit Watch(const JsonLimits& limits) : limits_(limits) {}

  const std::string& why() const { return why_; }
  const std::string& key_twice() const { return key_twice_; }

  bool null() override { return charge(kValueBytes, 0); }
  bool boolean(bool) override { return charge(kValueBytes, 0); }
  bool number_integer(number_integer_t) override { return charge(kValueBytes, 0); }
  bool number_unsigned(number_unsigned_t) override { return charge(kValueBytes, 0); }
  bool number_float(number_float_t, const string_t&) override { return charge(kValueBytes, 0); }
  bool string(string_t& text) override { return charge(kValueBytes, text.size()); }
  bool binary(binary_t&) override { return charge(kValueBytes, 0); }
  bool start_object(size_t) override { return start(); }
  bool start_array(size_t) override { return start(); }
  bool end_object() override { return end(); }
  bool end_array() override { return end(); }
  bool key(string_t& text) override {
    if (!charge(kKeyBytes, text.size())) return false;
    if (keys_.back().insert(text).second || mutant("json_key_twice")) return true;
    key_twice_ = text.substr(0, 100);
    why_ = "the key " + quote(key_twice_) + " twice in one object";
    return false;
  }
  bool parse_error(size_t at, const std::string&, const json::exception&) override {
    why_ = "no JSON at byte " + std::to_string(at);
    return false;
  }

 private:
  bool charge(int64_t bytes, size_t text_bytes) {
    memory_bytes_ += bytes + static_cast<int64_t>(text_bytes);
    if (memory_bytes_ <= limits_.memory_bytes) return true;
    why_ = "more values than fit into " + std::to_string(limits_.memory_bytes) + " bytes";
    return false;
  }
  bool start() {
    if (!charge(kValueBytes, 0)) return false;
    keys_.emplace_back();
    if (keys_.size() <= static_cast<size_t>(limits_.levels) || mutant("json_depth_unlimited"))
      return true;
    why_ = "nested deeper than " + std::to_string(limits_.levels) + " levels";
    return false;
  }
  bool end() {
    keys_.pop_back();
    return true;
  }

  const JsonLimits& limits_;
  std::vector<std::set<std::string>> keys_;  // of the open objects; a list has none
  int64_t memory_bytes_ = 0;
  std::string why_, key_twice_;
};

}  // namespace

ShallowJson read_shallow_json(const std::string& text, const JsonLimits& limits) {
  {
    Watch watch(limits);
    json::sax_parse(text, &watch);
    if (!watch.why().empty())
      return {json(json::value_t::discarded), watch.why(), watch.key_twice()};
  }
  return {json::parse(text, nullptr, false), "", ""};
}

json parse_shallow_json(const std::string& text, const std::string& file) {
  ShallowJson read = read_shallow_json(text);
  if (read.why.empty()) return std::move(read.value);
  throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                        .what = "The JSON file cannot be used.",
                        .file = file,
                        .expected = "JSON with each key once",
                        .found = read.why,
                        .safe = "nothing was written",
                        .next = "mend the file"});
}

}  // namespace isoshard::checkpoint
