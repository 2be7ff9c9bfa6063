// The JSON of a manifest as it is read: its known members and its list of files in compact records,
// whatever else stands there as nothing. Takes memory in proportion to what is kept, never to what
// the text could be made into.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "checkpoint/manifest.h"

namespace isoshard::checkpoint {

struct ManifestFault {
  std::string what = "";
  std::string entry = "";
  std::string expected = "";
  std::string found = "";
};

struct ManifestMember {
  bool there = false;
  nlohmann::json::value_t type = nlohmann::json::value_t::discarded;
  std::string text;  // of a string its value, of a number its digits, else the type's name
  uint64_t number = 0;
};

// Faults of members are those of checks made in one place, for the manifest and for its entries.
ManifestFault why_no_text(const ManifestMember& member, const char* key, const std::string& entry);
ManifestFault why_no_count(const ManifestMember& member, const char* key, const std::string& entry);

class ManifestEvents final : public nlohmann::json_sax<nlohmann::json> {
 public:
  // Keeps `most_files` files; more are a fault.
  explicit ManifestEvents(size_t most_files);

  bool is_object = false;
  bool has_others = false;  // members that are not known here
  ManifestMember kind, schema, self_hash, program_version, files;
  std::vector<ManifestFile> listed;  // up to the first entry with a fault
  ManifestFault fault;               // of that entry; `what` is empty where there is none
  std::string key_twice;             // why reading ended early: a known key,
  std::string why;                   // or the JSON itself

  bool null() override { return value(number_of("null", nlohmann::json::value_t::null)); }
  bool boolean(bool) override {
    return value(number_of("boolean", nlohmann::json::value_t::boolean));
  }
  bool number_integer(number_integer_t number) override {
    return value(number_of(std::to_string(number), nlohmann::json::value_t::number_integer));
  }
  bool number_unsigned(number_unsigned_t number) override {
    return value(
        number_of(std::to_string(number), nlohmann::json::value_t::number_unsigned, number));
  }
  bool number_float(number_float_t, const string_t& digits) override {
    return value(number_of(digits, nlohmann::json::value_t::number_float));
  }
  bool string(string_t& text) override {
    return value(number_of(std::move(text), nlohmann::json::value_t::string));
  }
  bool binary(binary_t&) override { return false; }
  bool start_object(size_t) override;
  bool start_array(size_t) override;
  bool end_object() override;
  bool end_array() override;
  bool key(string_t& text) override;
  bool parse_error(size_t at, const std::string&, const nlohmann::json::exception&) override;

 private:
  enum class Place { kManifest, kFiles, kEntry, kOther };

  static ManifestMember number_of(std::string text, nlohmann::json::value_t type,
                                  uint64_t number = 0) {
    return {true, type, std::move(text), number};
  }
  bool value(ManifestMember member);
  bool open(Place place);
  bool begin(nlohmann::json::value_t type);
  bool is_in(Place place) const { return !places_.empty() && places_.back() == place; }
  void end_entry();
  ManifestFault fault_of_entry();
  ManifestMember* member_named(const std::string& text);

  size_t most_files_;
  std::vector<Place> places_;       // from the manifest inwards
  ManifestMember* slot_ = nullptr;  // where the next value goes; null: nowhere
  ManifestMember path_, size_, hash_;
  size_t entries_ = 0;
};

}  // namespace isoshard::checkpoint
