// See verify.h. Link 8 of the tensor's journey: judged before it is loaded.
#include "reshard/verify.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>

#include "checkpoint/deepspeed/source.h"
#include "checkpoint/manifest.h"
#include "checkpoint/publication.h"
#include "checkpoint/shallow_json.h"
#include "core/error.h"
#include "core/mutant.h"
#include "reshard/agreement.h"
#include "reshard/certificate_words.h"
#include "reshard/manifest_check.h"
#include "reshard/not_verified.h"
#include "reshard/other_tags.h"
#include "reshard/rank_values.h"
#include "reshard/report_text.h"
#include "reshard/weights_inventory.h"

namespace isoshard::reshard {
namespace {

using checkpoint::Flavour;
using checkpoint::ShardedState;
using checkpoint::SourcePlace;
using nlohmann::json;

constexpr const char* kUnfinished =
    "The folder holds the mark of a command of isoshard that did not finish.";
constexpr int64_t kCertificateBytes = int64_t{1} << 26;

class Verifier {
 public:
  Verifier(Storage& storage, const std::string& source, const VerifyOptions& options)
      : storage_(storage), source_(source), options_(options) {}

  Verification run() {
    if (find_place()) {
      if (options_.deep && !single_file_) result_.deep = drop_pages(storage_, place_.folder);
      read_manifest();
      read_state();
      if (state_) read_everything();
      if (manifest_) judging([this] { compare_manifest(); });
      if (manifest_holds_ && result_.digest) judging([this] { compare_certificate(); });
      if (result_.read_whole && !mutant("verify_without_copies"))
        judging([this] { compare_copies(); });
      if (options_.replicas) judging([this] { compare_replicas(); });
      if (options_.deep) read_again();
      if (state_) look_for_oddities();
      if (state_) say_what_is_not_verified(*state_, manifest_holds_, options_.replicas, &result_);
    }
    decide();
    if (result_.verdict >= Verdict::kIncomplete) tell_other_tags();
    return std::move(result_);
  }

 private:
  void decide() {
    result_.verdict = manifest_holds_ ? Verdict::kVerified : Verdict::kComplete;
    for (const Finding& finding : result_.findings) {
      result_.verdict = mutant("verify_last_finding") ? finding.verdict
                                                      : std::max(result_.verdict, finding.verdict);
    }
  }
  void find(Verdict verdict, const std::string& text) {
    result_.findings.push_back({verdict, text});
  }
  bool in_folder(const std::string& name) const {
    return storage_.is_file(checkpoint::join(place_.folder, name));
  }
  void judge(const Error& error);
  template <typename Work>
  void judging(const Work& work) {
    try {
      work();
    } catch (const Error& error) {
      judge(error);
    }
  }
  bool find_place();
  void tell_leftovers();
  void tell_other_tags();
  void read_manifest();
  void read_state();
  void describe();
  void read_everything();
  void compare_manifest();
  void compare_certificate();
  void tell_history(const json& certificate);
  void compare_sections(const json& digests);
  void compare_with_source(const json& certificate);
  void compare_copies();
  void compare_replicas();
  void read_again();
  void look_for_oddities();
  void look_for_model_files();
  void look_at_weights();

  Storage& storage_;
  const std::string& source_;
  const VerifyOptions& options_;
  Verification result_;
  SourcePlace place_;
  bool single_file_ = false;
  std::optional<checkpoint::Manifest> manifest_;
  bool manifest_holds_ = false;
  std::optional<ShardedState> state_;
  FileCrcs file_crcs_;  // empty unless all was read
  std::vector<TensorSet> replica_sets_;
  std::vector<LeafCrc> leaf_crcs_;  // likewise
};

void Verifier::judge(const Error& error) {
  const std::optional<Verdict> verdict = verdict_of(error.info().code);
  if (!verdict) throw error;
  find(*verdict, error.what());
}

// False when what the pointer file names is not there or not safe. A source that is not there at
// all is the caller's mistake and no verdict.
bool Verifier::find_place() {
  const std::string& tag = options_.read.tag;
  checkpoint::require_source(storage_, source_, tag);
  try {
    place_ = checkpoint::resolve_source(storage_, source_, tag);
  } catch (const Error& error) {
    if (storage_.is_directory(source_) && checkpoint::is_unfinished(storage_, source_)) {
      find(Verdict::kIncomplete, kUnfinished);
      return false;
    }
    const bool pointer = storage_.is_file(checkpoint::join(source_, "latest")) ||
                         storage_.is_file(checkpoint::join(source_, "latest_universal"));
    if (!tag.empty() || (error.info().code == ErrorCode::kNotFound && !pointer)) throw;
    judge(error);
    return false;
  }
  single_file_ = storage_.is_file(source_);
  result_.folder = place_.folder;
  if (single_file_) return true;
  tell_leftovers();
  return true;
}

// A parent folder that may not be listed is no reason to stop.
void Verifier::tell_leftovers() {
  try {
    const std::string parent = checkpoint::parent_folder(place_.folder);
    for (const std::string& leftover : checkpoint::leftovers(storage_, parent)) {
      result_.notices.push_back("beside it lies " + quote(leftover) +
                                ", which an interrupted command has left, or one still at work");
    }
  } catch (const Error& error) {
    if (error.info().code == ErrorCode::kInterrupted) throw;
  }
}

void Verifier::tell_other_tags() {
  const bool found = !place_.folder.empty();
  const std::string folder = found ? place_.save_folder : save_folder_of(storage_, source_);
  if (folder.empty()) return;
  state_.reset();  // nothing asks for it any more
  const std::string text = tell(other_tags(storage_, folder, place_.tag, options_.read));
  if (!text.empty()) result_.notices.push_back(text);
}

void Verifier::read_manifest() {
  const std::string path = checkpoint::join(place_.folder, checkpoint::kManifestName);
  result_.manifest = "none: the folder was written by another program";
  if (single_file_) {
    result_.manifest = "not looked for: a single file was named";
  } else if (in_folder(checkpoint::kManifestName) &&
             !checkpoint::is_unfinished(storage_, place_.folder)) {
    try {
      manifest_ = checkpoint::parse_manifest(
          read_small_file(storage_, path, checkpoint::kLargestManifestBytes), path);
      result_.manifest.clear();
    } catch (const Error& error) {
      result_.manifest = "damaged";
      judge(error);
    }
  } else if (checkpoint::is_unfinished(storage_, place_.folder)) {
    result_.manifest = "missing";
    find(Verdict::kIncomplete, kUnfinished);
  } else if (in_folder("certificate.json") && !mutant("unfinished_folder_unsaid")) {
    result_.manifest = "missing";
    find(Verdict::kIncomplete,
         "The folder was written by isoshard and has no MANIFEST.json, which is written last: the "
         "command that wrote it did not finish, or the copy of the folder did not.");
  }
}

void Verifier::read_state() {
  checkpoint::ReadOptions read = options_.read;
  read.prove = false;  // compare_copies does it for every stage, and goes on after a difference
  read.workers = options_.stream.workers;
  judging([&] { state_ = checkpoint::read_checkpoint(storage_, source_, read); });
  if (!state_) return;
  describe();
  result_.files = static_cast<int64_t>(state_->files.size());
  result_.notices.insert(result_.notices.end(), state_->notices.begin(), state_->notices.end());
  result_.inferred = state_->inferred;
}

void Verifier::describe() {
  result_.description = name(state_->flavour);
  if (state_->flavour == Flavour::kWeights) return;
  result_.description += ", " + to_string(state_->topology) + ", tag " + quote(state_->tag);
  if (!state_->version.empty()) result_.description += ", DeepSpeed " + quote(state_->version);
}

// One pass: every file whole, so that every record's CRC and every manifest's hash comes with it.
void Verifier::read_everything() {
  StreamOptions stream = options_.stream;
  stream.digest = digested_leaves(*state_);
  if (options_.replicas) {
    replica_sets_ = replica_sets(*state_);
    for (const TensorSet& set : replica_sets_)
      stream.digest.insert(stream.digest.end(), set.leaves.begin(), set.leaves.end());
    std::ranges::sort(stream.digest);
    const auto repeated = std::ranges::unique(stream.digest);
    stream.digest.erase(repeated.begin(), repeated.end());
  }
  stream.whole_files = every_file(*state_);
  judging([&] {
    const StreamResult read = digest_leaves(storage_, *state_, stream);
    result_.bytes_read = read.bytes_read;
    file_crcs_ = file_crcs(*state_, stream, read);
    result_.digest = make_digest(*state_, read.leaves);
    result_.read_whole = true;
    leaf_crcs_ = read.leaves;
  });
  for (const checkpoint::SourceFile& file : state_->files) {
    if (!file.torch || !result_.read_whole) continue;
    for (const checkpoint::ZipRecord& record : file.torch->zip().records) {
      result_.records += record.size_bytes > 0;
    }
  }
}

void Verifier::compare_manifest() {
  const ManifestReport report =
      check_manifest(storage_, place_.folder, *manifest_, file_crcs_, options_.stream.workers);
  const std::string files = count_of(manifest_->files.size(), "file");
  if (report.earlier_save) {
    result_.manifest =
        "of an earlier save: every checkpoint file it lists has been written anew "
        "since; judged as another program's folder";
    result_.notices.push_back("MANIFEST.json and certificate.json speak of an earlier save");
    return;
  }
  manifest_holds_ = report.holds();
  result_.manifest = manifest_holds_ ? files + " listed, each with its size and hash, and no other"
                                     : "does not hold";
  if (!report.missing.empty()) {
    find(Verdict::kIncomplete, with_details(count_of(report.missing.size(), "file") + " of the " +
                                                files + " in the manifest missing.",
                                            report.missing));
  }
  if (!report.differing.empty()) {
    find(Verdict::kCorrupt,
         with_details(count_of(report.differing.size(), "file") + " of the " + files +
                          " in the manifest changed since the folder was published.",
                      report.differing));
  }
  if (!report.unlisted.empty()) {
    find(Verdict::kSuspect, with_details(count_of(report.unlisted.size(), "file") +
                                             " in the folder not listed in the manifest.",
                                         report.unlisted));
  }
  if (!report.unchecked.empty()) {
    find(Verdict::kSuspect,
         with_details("The manifest has hashes of a kind that is not known here.",
                      report.unchecked));
  }
}

// The certificate's own hash stands in the manifest; here its digests are made again.
void Verifier::compare_certificate() {
  const std::string path = checkpoint::join(place_.folder, "certificate.json");
  if (!in_folder("certificate.json")) return;
  const json certificate =
      checkpoint::read_shallow_json(read_small_file(storage_, path, kCertificateBytes)).value;
  if (certificate.is_object()) tell_history(certificate);
  const json digests = member_of(certificate, "target", "digests");
  const bool target = certificate.is_object() && certificate.contains("target");
  if (certificate.is_object() && digests.is_null() &&
      (!target || certificate["target"].is_object())) {
    result_.certificate = "has no digests of this folder: it was written with --verify=stream";
    return;
  }
  if (!digests.is_object()) {
    find(Verdict::kCorrupt, "certificate.json is not what isoshard writes.");
    return;
  }
  compare_sections(digests);
  if (options_.deep) compare_with_source(certificate);
}

// What it calls equal to the source has the source's digest, which it names too.
void Verifier::compare_with_source(const json& certificate) {
  const json sections = certificate.value("sections", json::object());
  const json source = member_of(certificate, "source", "digests");
  if (!sections.is_object() || !source.is_object()) return;
  std::vector<std::string> wrong;
  size_t equal = 0;
  for (const SectionDigest& section : result_.digest->sections) {
    if (section.hex.empty() || sections.value(section.section, json()) != json("equal")) continue;
    const json said = source.value(section.section, json());
    if (said == json("iso1:" + section.hex))
      ++equal;
    else if (said.is_string() && said.get<std::string>().starts_with("iso1:"))
      wrong.push_back(section.section + ": the source had " + quote(said.get<std::string>()));
  }
  if (equal > 0)
    result_.certificate += "; " + count_of(equal, "section") + " as the source had them";
  if (wrong.empty()) return;
  find(Verdict::kCorrupt,
       with_details("The certificate calls sections equal to the source that are not.", wrong));
}

// What its makers knew and went on from: the folder is as it was made, not better.
void Verifier::tell_history(const json& certificate) {
  for (const char* list : {"forced", "lossy"}) {
    for (const json& text : certificate.value(list, json::array())) {
      if (text.is_string())
        result_.notices.push_back("it was made with doubts, says certificate.json (" +
                                  std::string(list) +
                                  "): " + sentence_of_file(text.get<std::string>()));
    }
  }
}

void Verifier::compare_sections(const json& digests) {
  std::vector<std::string> wrong;
  json rest = digests;
  size_t equal = 0;
  for (const SectionDigest& section : result_.digest->sections) {
    const std::string found = stated(section);
    const json said = rest.value(section.section, json());
    rest.erase(section.section);
    if (said == found || mutant("certificate_any_digest")) {
      ++equal;
    } else {
      wrong.push_back(section.section + ": " + found + ", the certificate says " +
                      (said.is_string() ? quote(said.get<std::string>()) : "nothing"));
    }
  }
  for (const auto& [section, said] : rest.items()) {
    wrong.push_back(quote(section) + ": nothing, the certificate has it");
  }
  if (wrong.empty()) {
    result_.certificate = count_of(equal, "section digest") + " computed again, all as it says";
    return;
  }
  result_.certificate = "does not fit";
  find(Verdict::kCorrupt,
       with_details("The digests differ from those of certificate.json.", wrong));
}

void Verifier::compare_copies() {
  std::vector<std::string> orphans;
  const std::vector<CopyPair> pairs = copy_pairs(*state_, &orphans);
  result_.copies = reshard::compare_copies(*state_, pairs, options_.stream.workers);
  CopyReport told = result_.copies;
  if (options_.replicas) {  // compare_replicas() tells these
    std::erase_if(told.differences,
                  [this](const CopyDifference& d) { return in_a_set(*state_, d.pair); });
  }
  for (const std::string& text : tell_differences(*state_, told, orphans))
    find(Verdict::kSuspect, text);
  for (const std::string& reason : result_.copies.uncompared) {
    result_.not_verified.push_back("a copy: " + reason);
  }
}

// From the disk once more: bytes that come out otherwise each time have no CRC to blame.
void Verifier::read_again() {
  if (!result_.deep) result_.deep.emplace();
  if (!result_.read_whole) return;
  if (!single_file_) drop_pages(storage_, place_.folder);
  StreamOptions stream = options_.stream;
  stream.digest = digested_leaves(*state_);
  stream.whole_files = every_file(*state_);
  judging([&] {
    const StreamResult read = digest_leaves(storage_, *state_, stream);
    const FileCrcs again = file_crcs(*state_, stream, read);
    for (const auto& [path, crc] : file_crcs_) {
      const auto second = again.find(path);
      if (second != again.end() && second->second == crc) continue;
      find(Verdict::kCorrupt, "Read twice, " + quote(path) +
                                  " gave other bytes the second time: look for a failing disk or "
                                  "memory, or for a program that writes to it now.");
    }
    result_.deep->twice = make_digest(*state_, read.leaves).root == result_.digest->root;
    if (!result_.deep->twice)
      find(Verdict::kCorrupt, "Read twice, the second digest differs from the first.");
  });
  if (single_file_) return;
  std::set<std::string> known;
  for (const checkpoint::SourceFile& file : state_->files) {
    if (file.inside) known.insert(file.relative);
  }
  judging([&] { result_.deep->other_files = read_other_files(storage_, place_.folder, known); });
}

// Copy by copy; also where the folder as a whole was refused, for that may be the reason.
void Verifier::compare_replicas() {
  ReplicaReport report;
  const int workers = options_.stream.workers;
  if (state_) {
    if (!result_.read_whole) replica_sets_ = replica_sets(*state_);
    judging([&] { compare_sets(*state_, replica_sets_, leaf_crcs_, workers, &report); });
    compare_dtypes(*state_, &report);
    if (result_.read_whole) add_pairs(*state_, result_.copies, workers, &report);
  }
  if (place_.kind != SourcePlace::Kind::kWeights)
    judging([&] { compare_rank_values(storage_, place_.folder, &report); });
  ReplicaTexts texts = tell_replicas(report);
  for (const std::string& text : texts.findings) find(Verdict::kSuspect, text);
  for (std::string& text : texts.notices) result_.notices.push_back(std::move(text));
  result_.replicas = std::move(report);
}

void Verifier::look_for_oddities() {
  for (const std::string& text : state_->doubts) find(Verdict::kSuspect, text + ".");
  look_for_model_files();
  std::vector<std::string> foreign;
  for (const checkpoint::SourceFile& file : state_->files) {
    if (file.torch && !file.torch->zip().torch_dialect) foreign.push_back(quote(file.relative));
  }
  if (!foreign.empty()) {
    find(Verdict::kSuspect,
         with_details("Archives that torch did not write: another zip program has made them anew.",
                      foreign));
  }
  if (state_->flavour != Flavour::kWeights || single_file_) return;
  judging([this] { look_at_weights(); });
}

// isoshard reads such a folder; DeepSpeed, whose ranks open a file each, cannot resume from it.
void Verifier::look_for_model_files() {
  const size_t there = state_->model_files.size(), ranks = state_->optim_files.size();
  if (state_->flavour != Flavour::kZero3 || there >= ranks || mutant("missing_models_unsaid"))
    return;
  find(Verdict::kIncomplete, "Model files of " + count_of(ranks - there, "rank") +
                                 " are missing, which DeepSpeed needs to resume; convert --to fp32 "
                                 "and reshard do without.");
}

void Verifier::look_at_weights() {
  const WeightsInventory inventory = take_weights_inventory(storage_, *state_);
  if (!inventory.missing.empty() && !mutant("weights_index_unchecked")) {
    find(Verdict::kIncomplete,
         with_details("Parts of the weights are missing.", inventory.missing));
  }
  if (!inventory.odd.empty()) {
    find(Verdict::kSuspect,
         with_details("The index of the weights does not fit the files.", inventory.odd));
  }
  if (!inventory.has_index && state_->files.size() > 1) {
    result_.notices.push_back("the weights lie in several files without an index");
  }
}

}  // namespace

Verification verify(Storage& storage, const std::string& source, const VerifyOptions& options) {
  return Verifier(storage, source, options).run();
}

}  // namespace isoshard::reshard
