// One open file of a checkpoint, as a rank reads it: values by node, with every record that is read
// compared with its CRC.
#pragma once

#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "checkpoint/deepspeed/fields.h"
#include "core/storage.h"

namespace isoshard::engine {

class RankReader {
 public:
  RankReader(Storage& storage, const std::string& path) : file_(storage, path), fields_(file_) {}

  const checkpoint::Fields& fields() const { return fields_; }
  checkpoint::NodeId need(checkpoint::NodeId mapping, const std::string& key) const {
    return fields_.need(mapping, key);
  }
  int64_t integer(checkpoint::NodeId mapping, const std::string& key) const {
    return fields_.integer(need(mapping, key), key);
  }
  // A contiguous tensor's values; `count` is how many there must be, otherwise Error(kMismatch).
  // Error(kCorrupt) where its record is damaged.
  std::vector<float> values(checkpoint::NodeId node, int64_t count, const std::string& what);

 private:
  checkpoint::TorchFile file_;
  checkpoint::Fields fields_;
  std::set<int> checked_;
};

// Reads a record whole; Error(kCorrupt) where it does not have the CRC that its archive says.
void check_record(const checkpoint::TorchFile& file, const checkpoint::ZipRecord& record);

// Key, value, key, value, … of a dict; `what` names it in the Error(kCorrupt) of another value.
const std::vector<checkpoint::NodeId>& entries_of(const checkpoint::Fields& fields,
                                                  checkpoint::NodeId node, const std::string& what);
checkpoint::NodeId item_of(const checkpoint::Fields& fields, checkpoint::NodeId list, size_t number,
                           const std::string& what);

// Values of the pickle that JSON has; others are their kind's name in angle brackets. Shared values
// are written out each time, so that a small pickle can mean a great deal: `left` says how many
// values there may be.
nlohmann::ordered_json json_of(const checkpoint::Pickle& pickle, checkpoint::NodeId node, int depth,
                               int64_t* left);

}  // namespace isoshard::engine
