// See survey.h: what a damaged number, such as a step, is read as. It counts as lost all the same.
#include <algorithm>

#include "checkpoint/deepspeed/names.h"
#include "checkpoint/deepspeed/source.h"
#include "checkpoint/format/record_proof.h"
#include "reshard/survey.h"

namespace isoshard::reshard {

using checkpoint::FileName;
using checkpoint::TornStorage;
using checkpoint::why_unproven;
using checkpoint::ZipRecord;

// The storage of a 0-d tensor in a sibling's file, of the same mp rank first: ranks share their
// step.
std::string Survey::borrowed_number(const std::string& name, size_t key, int64_t size_bytes) const {
  const FileName own = checkpoint::parse_file_name(name);
  for (const bool same_mp : {true, false}) {
    for (const SurveyedFile& other : files_) {
      const FileName kin = checkpoint::parse_file_name(other.name);
      if (other.name == name || kin.kind != own.kind || (kin.mp == own.mp) != same_mp ||
          !other.torch ||
          (universal_ && checkpoint::base_name(other.name) != checkpoint::base_name(name)))
        continue;
      for (const ZipRecord& record : other.torch->zip().records) {
        if (record.name != "data/" + std::to_string(key) || record.size_bytes != size_bytes)
          continue;
        if (!why_unproven(other.torch->file(), record).empty()) continue;
        std::string bytes(static_cast<size_t>(size_bytes), '\0');
        other.torch->file().read_at(record.data_offset, std::as_writable_bytes(std::span(bytes)));
        return bytes;
      }
    }
  }
  return "";
}

// What most proven storages of that size hold in the file; zeros where there is none.
std::string Survey::commonest(const Look& look, int64_t size_bytes) const {
  std::map<std::string, size_t> held;
  for (const TornStorage& storage : look.torn->storages) {
    if (!storage.record || !storage.why.empty() || storage.size_bytes != size_bytes) continue;
    std::string bytes(static_cast<size_t>(size_bytes), '\0');
    look.bytes->read_at(storage.record->data_offset, std::as_writable_bytes(std::span(bytes)));
    ++held[bytes];
  }
  const auto most =
      std::ranges::max_element(held, {}, [](const auto& each) { return each.second; });
  return most == held.end() ? std::string(static_cast<size_t>(size_bytes), '\0') : most->first;
}

}  // namespace isoshard::reshard
