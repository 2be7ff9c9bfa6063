// What can be saved of a damaged checkpoint: every tensor all of whose bytes are proven good, as
// safetensors, and a list of the others with the reason. Link 7 of the tensor's journey, for a
// checkpoint that the other commands refuse.
//
//   TARGET/weights/    masters in fp32, frozen parameters and buffers, as convert --to fp32 has
//   them TARGET/exp_avg/ …  each state of the optimizer, in its own dtype TARGET/copies/     the
//   model's own copies, in its dtype, of weights whose master is lost TARGET/partial/…   with
//   --partial: the same folders; elements that are lost are NaN TARGET/salvage.json,
//   certificate.json, MANIFEST.json
//
// Proven means: the fragments lie in records whose CRC is right, in files whose header is whole and
// agrees with the others'. Two saves of the same step that were mixed look good file by file; where
// masters and copies of them differ it is told (`disagreements`).
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "reshard/executor.h"
#include "reshard/survey.h"

namespace isoshard::reshard {

// Elements [begin, begin + count) of a tensor, row-major.
struct LostRange {
  int64_t begin = 0;
  int64_t count = 0;
  std::string file;
  std::string why;
};

struct SalvagedTensor {
  enum class Status { kExported, kCopy, kPartial, kLost };
  std::string name;
  std::string state;  // "weight", "buffer", or as the optimizer has it
  std::string kind;   // of a weight: master, frozen, model (there is no master); otherwise empty
  Shape shape;
  DType dtype = DType::kFloat32;
  Status status = Status::kExported;
  std::string in;    // folder of TARGET; empty: not there
  std::string from;  // where another than the first copy was taken, and which
  int leaf = -1;     // the one that stands in `in`
  // With --partial, of a tensor that is good in part: its folder and its leaf.
  std::string partial_in;
  int partial_leaf = -1;
  int parameter = -1;
  std::vector<LostRange> lost;                    // of the first copy
  std::vector<std::pair<int64_t, int64_t>> kept;  // begin, count; of a tensor that is not whole
};

const char* name(SalvagedTensor::Status status);

// A number of the optimizer for a group's parameters, such as step.
struct SalvagedNumber {
  std::string name;
  std::string value;
  int group = 0;
  bool proven = true;
};

struct Salvage {
  checkpoint::ShardedState state;
  std::vector<SurveyedFile> files;
  std::vector<SalvagedTensor> tensors;
  std::vector<SalvagedNumber> numbers;
  std::vector<std::string> disagreements;  // tensors that are good and differ from their copies
  bool model_files_only = false;           // no optimizer file could be read

  int64_t count(SalvagedTensor::Status status) const;
  // Every tensor and number is there, and nothing contradicts it.
  bool complete() const;
};

// Reads all files once. Throws Error where nothing can be salvaged: no names and shapes, a form
// that is not covered, two saves in one folder.
Salvage take_stock(Storage& storage, const std::string& source,
                   const checkpoint::ReadOptions& options, bool partial);

struct SalvageOptions {
  std::string target;
  bool overwrite = false;
  int64_t max_shard_bytes = 5'000'000'000;
  std::string program;
  StreamOptions stream;
};

// Blueprints of the tensors, by folder. With partial tensors, lost elements come from a file of
// NaN that is added to the state.
std::vector<checkpoint::FileBlueprint> salvage_files(Salvage* salvage, int64_t max_shard_bytes);

// The text of salvage.json, less its line end.
nlohmann::json salvage_report(const Salvage& salvage, const std::string& program);

// Writes and publishes; every file is read back and its hash compared before it is published.
StreamResult write_salvage(Storage& storage, const Salvage& salvage, const ReshardPlan& plan,
                           const SalvageOptions& options);

}  // namespace isoshard::reshard
