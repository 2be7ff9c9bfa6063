// The files of single experts at stage 0: what each expert-parallel rank's module holds of them, in
// registration order.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "checkpoint/deepspeed/zero0_files.h"

namespace isoshard::checkpoint {

class ExpertTensors {
 public:
  // The experts of a native layer, by their numbers: each one's entries in its file's order.
  struct NativeLayer {
    std::string path;
    std::map<int64_t, std::vector<ModuleEntry>> experts;
  };

  // `files` are open. Throws Error(kIncomplete, kMismatch) where they are not the experts that the
  // model file counts, or not alike.
  ExpertTensors(const ShardedState& state, const ModelStates& model, const ExpertInfo& experts,
                std::vector<int> files);

  const std::vector<NativeLayer>& layers() const { return layers_; }  // in their order
  // What rank `rank` of `ranks` holds; they divide the experts of every layer.
  std::vector<ExpertBlock> blocks_of(int rank, int ranks) const;
  // The name that this rank's module gives an expert.
  std::string local_name(const std::string& name, int rank, int ranks) const;

 private:
  void read(std::vector<int> files);
  void check_native() const;
  void check_module() const;
  static std::string shapes_of(const NativeLayer& layer, int64_t id);
  ExpertBlock stacks_of(const ExpertLayer& layer, int rank) const;

  const ShardedState& state_;
  const ModelStates& model_;
  const ExpertInfo& experts_;
  const Fields fields_;
  const size_t files_;
  std::vector<NativeLayer> layers_;
  std::map<std::string, ModuleEntry> slices_;  // AutoEP: "prefix.w1.3"
};

}  // namespace isoshard::checkpoint
