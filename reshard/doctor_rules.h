// What the rules of doctor.h share: the folder with its files as far as each could be opened.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint/deepspeed/source.h"
#include "core/error.h"
#include "reshard/doctor.h"

namespace isoshard::reshard {

inline constexpr const char* kTornFault =
    "DeepSpeed writes latest and every file in place, before other ranks are done (errata 24, 60)";

// A file of the checkpoint's folder, with the Error where it is no archive that can be read.
struct PatientFile {
  std::string relative;
  std::shared_ptr<checkpoint::TorchFile> torch;
  std::optional<ErrorInfo> refusal;
};

struct Patient {
  Storage& storage;
  std::string source;  // where its pointer is lost, the folder of that
  const DoctorOptions& options;
  checkpoint::SourcePlace place = {};
  std::optional<checkpoint::ShardedState> state = {};  // where the reader takes it
  std::optional<ErrorInfo> refusal = {};               // where it does not
  std::vector<PatientFile> files = {};                 // only then; sorted by path
  Diagnosis result = {};

  std::string path_of(const std::string& relative) const {
    return checkpoint::join(place.folder, relative);
  }
  bool has(const std::string& rule, const std::string& file = "") const;
  // Notes what `rules` could not look at. To be called where the Error is caught; goes on with it
  // where the user has interrupted.
  void pass_over(const std::string& rules, const Error& error);
};

// Files of a folder that the reader refuses (doctor_files.cc).
void look_for_torn_files(Patient* patient);
void look_for_mixed_steps(Patient* patient);
void look_for_missing_shards(Patient* patient);
void look_for_code(Patient* patient);  // of any folder
void look_for_renamed_ranks(Patient* patient);
void look_for_padding(Patient* patient);

// A state that the reader takes (doctor_state.cc).
void look_for_missing_model_files(Patient* patient);
void look_for_missing_weights(Patient* patient);
void look_for_zero_moments(Patient* patient);
void look_for_swapped_values(Patient* patient);  // round-robin and rank-order; reads payloads

// What stands at the front of a file, found from its first byte on (doctor_tail.cc): a whole
// archive, which may be less than the file, or one whose records go on behind the file's end.
// Reads headers and data.pkl.
struct ArchiveFront {
  std::optional<int64_t> whole_bytes;
  bool cut_short = false;
};
ArchiveFront archive_front(const ReadableFile& file);

// What the end of a file says of the archive that it belongs to.
enum class ArchiveTail {
  kNone,     // no end record stands there
  kOther,    // one does, and its directory does not count from the file's first byte, or that is
             // not known: an archive that was appended looks so
  kInPlace,  // its directory counts from the file's first byte: it began where this file begins
};
// `whole_bytes`: how much of the file is known to be another archive, from its first byte on; 0 if
// nothing is.
ArchiveTail archive_tail(const ReadableFile& file, int64_t whole_bytes);

// A whole archive in two pieces, the first and the last bytes of a file (doctor_split.cc). Reads
// payloads, up to 1 GiB, where such an archive may be. Nothing for one that was appended whole.
struct SplitArchive {
  int64_t front_bytes = 0;
  int64_t back_bytes = 0;
  bool older = false;  // what lies between the pieces is the end of another archive
};
std::optional<SplitArchive> split_archive(const ReadableFile& file);

// The ranks 0 … count−1 in the order of their names as text: 0, 1, 10, 11, 2, … With `digits` 2
// names are written 00, 01, … so that only ranks of three digits change places.
std::vector<int> alphabetical_ranks(int count, int digits);

}  // namespace isoshard::reshard
