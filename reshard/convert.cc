// See convert.h. Link 9 of the tensor's journey: compared, bit by bit, with what was read.
#include "reshard/convert.h"

#include <algorithm>
#include <map>

#include "checkpoint/deepspeed/hyper.h"
#include "checkpoint/deepspeed/reader.h"
#include "checkpoint/format/crc.h"
#include "checkpoint/leftover_folder.h"
#include "checkpoint/manifest.h"
#include "checkpoint/publication.h"
#include "checkpoint/small_file.h"
#include "core/cast.h"
#include "core/check.h"
#include "core/error.h"
#include "core/polynomial.h"
#include "reshard/agreement.h"
#include "reshard/manifest_check.h"
#include "reshard/published_target.h"
#include "reshard/report_text.h"
#include "reshard/source_manifest.h"
#include "reshard/team.h"

namespace isoshard::reshard {

using checkpoint::Flavour;
using checkpoint::Leaf;
using checkpoint::ShardedState;
using nlohmann::json;

namespace {

[[noreturn]] void refuse_mismatch(const std::string& what, const std::string& entry,
                                  const std::string& expected, const std::string& found) {
  throw Error(ErrorInfo{
      .code = ErrorCode::kMismatch,
      .what = what,
      .entry = entry,
      .expected = expected,
      .found = found,
      .safe = "nothing was published; the source was only read",
      .next = "check memory and disk of this machine, then run again; report it if it repeats"});
}

std::string crc_text(const LeafCrc& crc) {
  return checkpoint::hex16(crc.ecma) + checkpoint::hex16(crc.jones);
}

// The CRC that a leaf's bytes have after a cast, by a pass of its own over the source.
LeafCrc cast_crc(const ShardedState& state, const Leaf& leaf, DType dtype) {
  checkpoint::RawCrcs crcs;
  const int64_t item = item_size_bytes(leaf.dtype), step = (1 << 20) / item;
  std::vector<std::byte> source, target;
  for (const checkpoint::FileFragment& f : leaf.fragments) {
    for (int64_t at = 0; at < f.count; at += step) {
      const int64_t count = std::min(step, f.count - at);
      source.resize(static_cast<size_t>(count * item));
      target.resize(static_cast<size_t>(count * item_size_bytes(dtype)));
      state.files[static_cast<size_t>(f.file)].bytes().read_at(f.offset_bytes + at * item, source);
      cast(leaf.dtype, source, dtype, target);
      crcs.update(target);
    }
  }
  const int64_t bytes = leaf.size_elements() * item_size_bytes(dtype);
  return {true, crc64_ecma_polynomial().finish(crcs.ecma, bytes),
          crc64_jones_polynomial().finish(crcs.jones, bytes)};
}

constexpr const char* kWeightsOnly = "absent: this format holds weights only";

// Present in the source, read or not.
bool is_there(const SectionDigest& section) {
  return section.absent.empty() || section.absent == kNotRead;
}

// Weights files: every tensor is the source's leaf of that name, as it is or cast.
json compare_weights(const ShardedState& source, const Digest& source_digest,
                     const ShardedState& target, const Digest& target_digest) {
  std::map<std::string, int> originals;
  for (const checkpoint::ParameterState& parameter : source.parameters)
    originals[parameter.name] = parameter.weight;
  for (const checkpoint::BufferState& buffer : source.buffers) originals[buffer.name] = buffer.leaf;
  std::map<std::string, const LeafLine*> lines;
  for (const LeafLine& line : source_digest.leaves) {
    if (line.state == "weight" || line.state == "buffer") lines[line.name] = &line;
  }
  bool cast_any = false, cast_buffer = false;
  for (const LeafLine& line : target_digest.leaves) {
    const auto found = lines.find(line.name);
    if (found == lines.end())
      refuse_mismatch("The output holds a tensor that the source does not.", quote(line.name),
                      "absent", "present");
    const LeafLine& original = *found->second;
    LeafCrc expected = original.crc;
    if (original.dtype != line.dtype) {
      expected = cast_crc(source, source.leaf(originals[line.name]), line.dtype);
      (original.state == "buffer" ? cast_buffer : cast_any) = true;
    }
    if (original.shape != line.shape || expected != line.crc)
      refuse_mismatch("The output differs from the source.", quote(line.name), crc_text(expected),
                      crc_text(line.crc));
    lines.erase(found);
  }
  json result = {{"weights", cast_any ? "cast" : "equal"},
                 {"buffers", cast_buffer ? "cast" : "equal"}};
  for (const auto& [name, line] : lines) result["missing"].push_back(name);
  if (source.buffers.empty()) result.erase("buffers");
  std::map<std::string, std::string> aliases;
  for (const checkpoint::Alias& alias : target.aliases) aliases[alias.name] = alias.target;
  for (const checkpoint::Alias& alias : source.aliases) {
    if (target.find_parameter(alias.target) != nullptr && aliases[alias.name] != alias.target)
      refuse_mismatch("A tied name was lost.", quote(alias.name), quote(alias.target),
                      quote(aliases[alias.name]));
  }
  for (const SectionDigest& section : source_digest.sections) {
    if (!result.contains(section.section) && is_there(section))
      result[section.section] = kWeightsOnly;
  }
  return result;
}

// Hyper-parameters without what the caller allowed to be left behind.
void compare_hyper(const ShardedState& source, const ShardedState& target,
                   const std::set<std::string>& dropped) {
  json expected = checkpoint::hyper_json(source), found = checkpoint::hyper_json(target);
  for (const std::string& key : dropped) {
    expected.erase(key);
    found.erase(key);
  }
  if (expected != found)
    refuse_mismatch("The output differs from the source.", "hyper", expected.dump().substr(0, 200),
                    found.dump().substr(0, 200));
}

// The leftover is handed on whole: options are shared, and there is one of it.
std::unique_ptr<checkpoint::LeftoverFolder> taken(
    const std::shared_ptr<checkpoint::LeftoverFolder>& leftover) {
  if (leftover == nullptr) return nullptr;
  return std::make_unique<checkpoint::LeftoverFolder>(std::move(*leftover));
}

class Conversion {
 public:
  Conversion(Storage& storage, const ShardedState& state, const ReshardPlan& plan,
             const ConvertOptions& options)
      : storage_(storage),
        state_(state),
        plan_(plan),
        options_(options),
        team_(options.stream.team) {
    CHECK(team_ == nullptr || !options.resume, "a team does not resume");
    on_first_rank(team_, [&] {
      staged_.emplace(storage, options.target, options.overwrite, taken(options.leftover));
      path_ = staged_->path();
    });
    if (team_ != nullptr) broadcast_text(*team_, &path_);
  }

  ConvertResult run() {
    try {
      write_and_publish();
    } catch (const Error& error) {
      if (error.info().code == ErrorCode::kInterrupted) tell_how_to_go_on(error);
      throw;
    }
    on_first_rank(team_, [&] { move_pointer(); });
    return std::move(result_);
  }

 private:
  void write_and_publish() {
    if (staged_ && staged_->in_place()) {
      phase(
          "Folders cannot be renamed here: files get their final names, MANIFEST.json comes last");
    }
    phase("Moving " + std::to_string(plan_.bytes_to_write()) + " bytes into " +
          std::to_string(plan_.targets.size()) + " files");
    StreamOptions stream = options_.stream;
    stream.digest = digested_leaves(
        state_, options_.weights_only ? Sections::kWeightsAndBuffers : Sections::kAll);
    stream.sync_files = syncs_each_file();
    if (staged_ && staged_->resumed()) take_up(&stream);
    const bool look = options_.doubt != ConvertOptions::Doubt::kDoNotLook;
    std::optional<Agreement> agreement;
    std::optional<SourceManifest> manifest;
    on_each_rank(team_, [&] {
      if (!look) return;
      agreement.emplace(state_).ask(&stream);
      manifest.emplace(storage_, state_).ask(!options_.weights_only, &stream);
    });
    result_.stream = execute(storage_, state_, plan_, path_, stream);
    result_.forced = options_.forced;
    on_each_rank(team_, [&] {
      if (!look) return;
      doubt("The source is not as its MANIFEST.json says. ",
            manifest->judge(stream, result_.stream));
      doubt("The source does not agree with itself. ", agreement->judge(stream, result_.stream));
    });
    result_.source = make_digest(state_, result_.stream.leaves);
    if (options_.verify != VerifyMode::kStream)
      read_back();
    else
      trust_stream();
    on_first_rank(team_, [&] {
      write_papers();
      phase("Publishing " + options_.target);
      staged_->publish();
    });
    share_certificate();
  }

  // The first rank alone has written it.
  void share_certificate() {
    if (team_ == nullptr) return;
    std::string text = result_.certificate.dump();
    broadcast_text(*team_, &text);
    result_.certificate = json::parse(text);
  }

  bool syncs_each_file() const { return plan_.targets.size() <= 64; }

  // The papers of the run that was interrupted go too: this one's come last, as always.
  void take_up(StreamOptions* stream) {
    std::set<std::string> files;
    for (const TargetFile& target : plan_.targets) files.insert(target.path());
    const int64_t removed = checkpoint::keep_only(storage_, path_, files);
    phase("Going on from what an interrupted command has left" +
          (removed == 0
               ? ""
               : "; removed from it what is no file of this one: " + std::to_string(removed)));
    storage_.sync_everything(path_);  // at once, where each file by itself takes longer
    stream->resume = result_.resumed = true;
  }

  [[noreturn]] void tell_how_to_go_on(const Error& error) {
    ErrorInfo info = error.info();
    if (!staged_ || staged_->in_place()) throw Error(std::move(info));
    if (!options_.resume || !has_written()) {
      info.next =
          "give the same command again; it starts from the beginning. One with --resume "
          "keeps what it has written when it is interrupted";
      throw Error(std::move(info));
    }
    staged_->keep();
    info.safe =
        "nothing was published; the source was only read; what was written lies in " + quote(path_);
    info.next = "give the same command again, with --resume: it goes on from there";
    throw Error(std::move(info));
  }

  // Whether a file of the plan is there: without one there is nothing to go on from.
  bool has_written() const {
    return std::ranges::any_of(plan_.targets, [&](const TargetFile& target) {
      return storage_.is_file(path_ + "/" + target.path());
    });
  }

  void phase(const std::string& text) const {
    if (options_.phase) options_.phase(text);
  }

  void doubt(const std::string& what, const std::vector<std::string>& findings) {
    if (findings.empty()) return;
    std::string text;
    for (const std::string& finding : findings) text += (text.empty() ? "" : "\n") + finding;
    text = moved_in(text, 2);
    if (options_.doubt == ConvertOptions::Doubt::kGoOn) {
      phase("Going on (--force). " + what + text);
      result_.forced.insert(result_.forced.end(), findings.begin(), findings.end());
      return;
    }
    throw Error(ErrorInfo{
        .code = ErrorCode::kMismatch,
        .what = what + text,
        .file = state_.folder,
        .safe = "nothing was published; the source was only read",
        .next = "isoshard verify says all that is known; isoshard convert or reshard with --force "
                "goes on from the masters"});
  }

  // The folder is there by now; a failure here must say so.
  void move_pointer() {
    try {
      place_beside(storage_, options_);
    } catch (const Error& error) {
      ErrorInfo info = error.info();
      info.safe = options_.target + " is published, whole and verified; only the pointer " +
                  (options_.side_files.empty() ? "is" : "and some files beside it are") + " not";
      info.next =
          options_.latest_path.empty()
              ? "copy the files beside the source yourself"
              : "write " + quote(options_.latest_text) + " into " + options_.latest_path +
                    " yourself, or give the command again with --resume: it does what is left";
      throw Error(std::move(info));
    }
  }

  // A moment ago it was written here: there is no file that the user could restore, and the next
  // output of this machine may be no better.
  void read_back() {
    try {
      reread();
    } catch (const Error& error) {
      ErrorInfo info = error.info();
      const bool differs = info.code == ErrorCode::kCorrupt || info.code == ErrorCode::kMismatch ||
                           info.code == ErrorCode::kIncomplete || info.code == ErrorCode::kHostile;
      if (!differs) throw;
      info.what = "The output does not read back as it was written. " + info.what;
      info.next =
          "look for disk, network or memory failures in the kernel log (dmesg), then give the "
          "command again, or choose a target on another disk";
      throw Error(std::move(info));
    }
  }

  void reread() {
    phase("Reading the output once more and comparing its digest");
    ShardedState target;
    on_each_rank(team_, [&] {
      for (const TargetFile& file : plan_.targets) {
        if (options_.verify == VerifyMode::kDisk) storage_.drop_cache(path_ + "/" + file.path());
      }
      target = checkpoint::read_checkpoint(storage_, path_,
                                           {.tag = "", .param_order = "", .lost_experts = true});
    });
    // A later reader learns them from the certificate, which is not written yet.
    if (target.flavour == Flavour::kWeights) {
      checkpoint::name_buffers(&target,
                               options_.certificate.value("buffers", std::set<std::string>()));
    }
    StreamOptions stream = options_.stream;
    stream.digest = digested_leaves(target);
    stream.whole_files = every_file(target);
    const StreamResult read = digest_leaves(storage_, target, stream);
    on_each_rank(team_, [&] {
      result_.target = make_digest(target, read.leaves);
      const FileCrcs whole = file_crcs(target, stream, read);
      for (const FileHash& file : result_.stream.files) check_file(file, whole);
      sections_ =
          compare_sections(state_, result_.source, target, result_.target, options_.dropped);
      check_missing();
    });
  }

  // A tensor may be missing only where the plan said so.
  void check_missing() {
    const json said = options_.certificate.value("skipped", json::array());
    for (const json& name : sections_.value("missing", json::array())) {
      const std::string mark = quote(name.get<std::string>()) + ":";
      const bool known = std::ranges::any_of(
          said, [&](const json& text) { return text.get<std::string>().starts_with(mark); });
      if (!known)
        refuse_mismatch("A tensor of the source is missing from the output.", mark, "present",
                        "absent");
    }
    sections_.erase("missing");
  }

  void check_file(const FileHash& file, const FileCrcs& whole) {
    LeafCrc found;
    if (const auto crc = whole.find(file.path); crc != whole.end()) {
      found = crc->second;
    } else {  // a small text file that no reader opens
      const std::string text = read_small_file(storage_, path_ + "/" + file.path, 1 << 28);
      checkpoint::RawCrcs crcs;
      crcs.update(std::as_bytes(std::span(text)));
      const auto bytes = static_cast<int64_t>(text.size());
      found = {true, crc64_ecma_polynomial().finish(crcs.ecma, bytes),
               crc64_jones_polynomial().finish(crcs.jones, bytes)};
    }
    const LeafCrc expected{true, file.ecma, file.jones};
    if (found != expected)
      refuse_mismatch("A file reads back differently from what was written.", quote(file.path),
                      crc_text(expected), crc_text(found));
  }

  // --verify=stream: the plan's cover was checked; every byte written was digested on the way.
  void trust_stream() {
    result_.target = result_.source;
    for (const SectionDigest& section : result_.source.sections) {
      const bool held =
          !options_.weights_only || section.section == "weights" || section.section == "buffers";
      if (!is_there(section)) continue;
      sections_[section.section] = held ? "planned: not read back (--verify=stream)" : kWeightsOnly;
    }
  }

  void write_papers() {
    json certificate = options_.certificate;
    certificate["schema"] = 1;
    certificate["kind"] = "isoshard-certificate";
    certificate["sections"] = sections_;
    certificate["verify"] = options_.verify == VerifyMode::kStream   ? "stream"
                            : options_.verify == VerifyMode::kReread ? "reread"
                                                                     : "disk";
    for (const SectionDigest& section : result_.source.sections)
      certificate["source"]["digests"][section.section] = stated(section);
    if (options_.verify != VerifyMode::kStream) {
      for (const SectionDigest& section : result_.target.sections)
        certificate["target"]["digests"][section.section] = stated(section);
    }
    if (!result_.forced.empty()) certificate["forced"] = result_.forced;
    for (const char* list : {"lossy", "inferred", "synthesised", "dropped", "skipped"}) {
      if (!certificate.contains(list)) certificate[list] = json::array();
    }
    const std::string text = certificate.dump(1) + "\n";
    checkpoint::Manifest manifest;
    manifest.program_version = certificate.value("program", "");
    for (const FileHash& file : result_.stream.files) {
      manifest.files.push_back(manifest_file(file));
    }
    checkpoint::write_new_file(storage_, path_ + "/certificate.json", text);
    staged_->settle();
    // A long sync comes before the manifest: who is killed in it can be gone on from.
    if (!staged_->in_place() && !syncs_each_file()) storage_.sync_everything(path_);
    manifest.files.push_back({"certificate.json", static_cast<int64_t>(text.size()),
                              "sha256:" + checkpoint::sha256_hex(text)});
    checkpoint::write_new_file(storage_, path_ + "/" + checkpoint::kManifestName,
                               checkpoint::to_json(manifest));
    result_.certificate = std::move(certificate);
  }

  Storage& storage_;
  const ShardedState& state_;
  const ReshardPlan& plan_;
  const ConvertOptions& options_;
  Communicator* team_;                              // null: this process alone
  std::optional<checkpoint::StagedFolder> staged_;  // of the first rank
  std::string path_;                                // its folder
  ConvertResult result_;
  json sections_ = json::object();
};

}  // namespace

json compare_sections(const ShardedState& source, const Digest& source_digest,
                      const ShardedState& target, const Digest& target_digest,
                      const std::set<std::string>& dropped) {
  if (target.flavour == Flavour::kWeights)
    return compare_weights(source, source_digest, target, target_digest);
  json result = json::object();
  for (const SectionDigest& section : source_digest.sections) {
    if (!section.absent.empty()) continue;
    const SectionDigest* other = find_section(target_digest, section.section);
    if (other == nullptr || !other->absent.empty())
      refuse_mismatch("A section of the state is missing from the output.", section.section,
                      "iso1:" + section.hex, "absent");
    if (section.section == "hyper" && !dropped.empty()) {
      compare_hyper(source, target, dropped);
      result[section.section] = "equal but for what was dropped by name";
      continue;
    }
    if (other->hex != section.hex)
      refuse_mismatch("The output differs from the source.", section.section, "iso1:" + section.hex,
                      "iso1:" + other->hex);
    result[section.section] = "equal";
  }
  for (const SectionDigest& section : target_digest.sections) {
    const SectionDigest* other = find_section(source_digest, section.section);
    if (section.absent.empty() && (other == nullptr || !other->absent.empty()))
      refuse_mismatch("The output holds a section that the source does not.", section.section,
                      "absent", "iso1:" + section.hex);
  }
  return result;
}

ConvertResult convert(Storage& storage, const ShardedState& state, const ReshardPlan& plan,
                      const ConvertOptions& options) {
  return Conversion(storage, state, plan, options).run();
}

}  // namespace isoshard::reshard
