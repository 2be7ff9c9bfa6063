// The files of a damaged tag folder, each looked at alone: which header is whole, which record's
// CRC is right. Then the folder is shown to the ordinary reader with stand-ins (stand_in.h) for
// files that are torn or lost, so that everything that it checks across files is still checked.
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "checkpoint/deepspeed/inventory.h"
#include "checkpoint/deepspeed/reader.h"
#include "checkpoint/deepspeed/source.h"
#include "checkpoint/format/torn_file.h"
#include "reshard/stand_in.h"

namespace isoshard::reshard {

struct SurveyedFile {
  enum class Health {
    kWhole,    // its header and every record's CRC
    kDamaged,  // its header; records in `damage` are not proven
    kTorn,     // the directory is gone or does not fit; found again by local headers
    kLost,     // damaged beyond that, or refused
    kHostile,
    kMissing,
  };
  std::string name;  // in the folder
  Health health = Health::kWhole;
  std::string why;  // it is not whole
  std::vector<Damage> damage;
  std::shared_ptr<checkpoint::TorchFile> torch;  // as the reader sees it
  bool has_header() const { return health <= Health::kTorn; }
  void give_up(const ErrorInfo& reason);  // it is lost, or hostile
};

const char* name(SurveyedFile::Health health);

class Survey {
 public:
  // Throws the Error that says why nothing can be made of the folder: no model file with names and
  // shapes, a form that salvage does not cover, or what reading the disk throws.
  Survey(Storage& storage, const checkpoint::SourcePlace& place,
         const checkpoint::ReadOptions& options);

  // Reads the folder; a file whose contents prove wrong on the way is given up, and told.
  checkpoint::ShardedState read();

  const std::vector<SurveyedFile>& files() const { return files_; }
  const SurveyedFile* find(const std::string& name) const;
  bool model_files_only() const { return options_.model_files_only; }
  // Parameters that the optimizer has, as the model files say; not frozen ones.
  const std::set<std::string>& optimized() const { return optimized_; }

 private:
  struct Place {
    bool optim = false;
    int mp = 0;
    int rank = 0;  // of the partition group
  };
  // What a file's records give, before siblings have lent their numbers.
  struct Look {
    SurveyedFile file;
    std::optional<checkpoint::TornFile> torn;  // needs a stand-in
    std::shared_ptr<const ReadableFile> bytes;
  };

  void look_at(const std::vector<std::string>& names);
  void survey_zero();
  void survey_universal();
  void stand_in_for_state(SurveyedFile* lost);
  bool add_lacking(const checkpoint::ShardedState& state);
  void expect_listed();
  bool lose_state(const ErrorInfo& info);
  void name_optimized(const SurveyedFile& model);
  Look look(const std::string& name);
  void look_into(Look* look, const std::string& path);
  void check_records(Look* look);
  void put_together(Look* look);
  // Empty where no rank has it. It counts as lost.
  std::string borrowed_number(const std::string& name, size_t key, int64_t size_bytes) const;
  std::string commonest(const Look& look, int64_t size_bytes) const;
  void expect_files(const checkpoint::Inventory& inventory);
  void expect(const std::string& name, Place place);
  void require(const std::string& name);  // it is missing where it was not looked at
  void stand_in_for_lost();
  void replace(SurveyedFile* file, const Place& place);
  void show(SurveyedFile* file, StandIn made);
  void refuse_without_sibling(const SurveyedFile& file) const;
  void refuse_too_much() const;
  const SiblingForm& form_of(const SurveyedFile& sibling);
  const SurveyedFile* sibling_of(const Place& place) const;
  checkpoint::ModelStates model_states_of(const SurveyedFile& file) const;
  const checkpoint::ModelStates& model_of(int mp);
  void add(SurveyedFile file);
  void refuse_borrowed_shapes(const ErrorInfo& info) const;
  SurveyedFile& file(const std::string& name) { return files_[numbers_.at(name)]; }

  Storage& base_;
  std::string folder_;
  checkpoint::ReadOptions options_;
  StandInStorage shown_;
  checkpoint::PickleShelf shelf_;  // ranks often have the same pickle
  std::vector<SurveyedFile> files_;
  std::map<std::string, size_t> numbers_;          // by name, in files_
  std::map<std::string, size_t> namesakes_;        // universal: of each state, one with a header
  std::map<int, checkpoint::ModelStates> models_;  // by mp rank, for shapes alone
  // By file, which they keep, so that no other takes its address.
  std::map<const checkpoint::TorchFile*, SiblingForm> forms_;
  std::set<const void*> counted_;  // pickles, and what was made of them
  int64_t held_bytes_ = 0;         // by stand-ins
  size_t missing_ = 0;
  std::set<std::string> optimized_;
  std::map<std::string, Place> places_;  // of files that the checkpoint consists of
  bool stage3_ = false;
  bool universal_ = false;
  bool layers_ = false;   // of a pipeline
  bool experts_ = false;  // native MoE or AutoEP
  int ranks_ = 1;         // of the partition group
};

}  // namespace isoshard::reshard
