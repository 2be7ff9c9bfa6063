// A folder of DeepSpeed, or of weights, opened as a ShardedState. Reads headers and pickles only;
// payloads stay on the disk. Link 7 of the tensor's journey: read back, or refused with a reason.
#pragma once

#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/deepspeed/model_states.h"
#include "checkpoint/deepspeed/source.h"
#include "checkpoint/sharded_state.h"

namespace isoshard::checkpoint {

struct ReadOptions {
  std::string tag;             // --tag
  int sequence_degree = 0;     // --sp; 0: as recorded or inferred
  std::string param_order;     // --param-order FILE, stage 0 only
  bool allow_renamed = false;  // accept a file whose archive prefix names another file
  int workers = 2;
  // Patterns of universal_checkpoint_info that match no name are doubts; otherwise they are told.
  bool strict = true;
  bool prove = true;  // stage 0: read payloads to prove an inferred mapping (inspect does not)
  // Stages 0 to 2: optimizer files stay closed; every parameter is its copy in the model's dtype,
  // and frozen. No meaning at stage 3, where the masters are the only weights, and in other forms.
  bool model_files_only = false;
  // Go on where states are missing, and tell it (convert, inspect and show do): at stage 0 an
  // expert-parallel rank's optimizer file, whose experts have no masters and moments then, and
  // weights in the model's dtype; in a universal folder a state that others of the group have.
  bool lost_experts = false;
  // AutoEP at stage 3 whatever its checkpoint_format says, where all else says who holds what.
  bool any_expert_format = false;
  int64_t moe_max_group_size = 0;  // of the run that saved; 0: DeepSpeed's own (expert_groups.h)
  bool places = true;              // where each element lies; inspect does without it at stage 3
};

// Throws the Error that says what stands at SOURCE where that is neither file nor folder, and at
// its `latest` where that is no file and no tag is named.
void require_source(Storage& storage, const std::string& path, const std::string& tag);

ShardedState read_checkpoint(Storage& storage, const std::string& path, const ReadOptions& options);

// Parts of the above, one a family (each in its own file).
void read_zero(ShardedState* state, Storage& storage, const ReadOptions& options);
void read_universal(ShardedState* state, Storage& storage, const ReadOptions& options);
void read_weights(ShardedState* state, Storage& storage, const SourcePlace& place);

// Weights alone do not tell which tensors are buffers: those named here become buffers.
void name_buffers(ShardedState* state, const std::set<std::string>& names);

// Opens files of the state's folder (paths relative to it), in parallel; returns their numbers in
// the same order. Refuses an archive whose prefix names another file.
std::vector<int> open_files(ShardedState* state, Storage& storage,
                            const std::vector<std::string>& names, const ReadOptions& options);

// The value of a scalar as text: "3" for 3, 3.0 and tensor(3.); hexadecimal floats where not whole;
// "None". Reads the payload of a 0-d tensor and checks its CRC.
std::string scalar_text(const ShardedState& state, NodeRef value);

// All scalars of a parameter as text. Parameters share few values: each is read once.
class ScalarTexts {
 public:
  explicit ScalarTexts(const ShardedState& state) : state_(state) {}  // which outlives this
  std::string of(const std::vector<Scalar>& scalars);                 // "step 3 "

 private:
  const ShardedState& state_;
  std::map<std::pair<int, NodeId>, std::string> texts_;
};

}  // namespace isoshard::checkpoint
