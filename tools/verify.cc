// isoshard verify: one word, and the evidence for it.
#include "reshard/verify.h"

#include <iostream>

#include "core/error.h"
#include "reshard/report_text.h"
#include "tools/replica_report.h"
#include "tools/session.h"

namespace isoshard::tools {
namespace {

using reshard::count_of;
using reshard::Verdict;
using reshard::Verification;

constexpr size_t kLabelWidth = 16;

// A label, and a text whose further lines stand under its first.
std::string labelled(const std::string& label, const std::string& text) {
  return "  " + label + std::string(kLabelWidth - label.size(), ' ') +
         reshard::moved_in(text, kLabelWidth + 2) + "\n";
}

std::string copies_text(const reshard::CopyReport& copies) {
  const char* nouns[] = {"master", "restated tensor", "tied name", "replica"};
  std::string text;
  for (int kind = 0; kind < 4; ++kind) {
    if (copies.pairs[kind] == 0) continue;
    text += (text.empty() ? "" : ", ") + count_of(copies.pairs[kind], nouns[kind]);
  }
  if (text.empty()) return "nothing is stored twice";
  const size_t differing = copies.differences.size();
  return text + ", " + count_of(copies.elements, "element") + ": " +
         (differing == 0 ? "all agree, cast to the copy's dtype"
                         : std::to_string(differing) + (differing == 1 ? " differs" : " differ"));
}

void print_text(const Verification& v) {
  const auto print = [](const std::string& label, const std::string& text) {
    if (!text.empty()) std::cout << labelled(label, text);
  };
  for (const reshard::Finding& finding : v.findings) print(name(finding.verdict), finding.text);
  print("form", v.description);
  if (v.read_whole) {
    print("read",
          count_of(v.files, "file") + ", " + count_of(v.bytes_read, "byte") +
              (v.records == 0 ? "" : ", " + count_of(v.records, "record") + " with the right CRC"));
    print("copies", copies_text(v.copies));
  } else if (v.files > 0) {
    print("read", "the headers of " + count_of(v.files, "file") + "; not all payloads");
  }
  if (v.replicas) {
    print("replicas", replica_table(*v.replicas));
    for (const std::string& text : v.replicas->uncompared) print("not compared", text);
  }
  if (v.deep) print("deep", deep_text(*v.deep));
  if (v.digest) print("digest", "iso1:" + v.digest->root);
  print("manifest", v.manifest);
  print("certificate", v.certificate);
  for (const std::string& text : v.inferred) print("inferred", text);
  for (const std::string& text : v.not_verified) print("not verified", text);
  for (const std::string& text : v.notices) print("notice", text);
}

void print_json(Session* session, const std::string& source, const Verification& v) {
  nlohmann::json object = {{"kind", "verification"},
                           {"source", source},
                           {"folder", v.folder},
                           {"verdict", name(v.verdict)},
                           {"form", v.description},
                           {"files", v.files},
                           {"bytes_read", v.bytes_read},
                           {"records", v.records},
                           {"read_whole", v.read_whole},
                           {"manifest", v.manifest},
                           {"certificate", v.certificate},
                           {"inferred", v.inferred},
                           {"not_verified", v.not_verified},
                           {"notices", v.notices},
                           {"findings", nlohmann::json::array()}};
  if (v.digest) object["digest"] = "iso1:" + v.digest->root;
  object["copies"] = {{"masters", v.copies.pairs[0]},  {"restated", v.copies.pairs[1]},
                      {"tied", v.copies.pairs[2]},     {"replicas", v.copies.pairs[3]},
                      {"elements", v.copies.elements}, {"differing", nlohmann::json::array()}};
  for (const reshard::CopyDifference& d : v.copies.differences) {
    object["copies"]["differing"].push_back({{"name", d.pair.name},
                                             {"index", d.index},
                                             {"original", d.original},
                                             {"expected", d.expected},
                                             {"found", d.found},
                                             {"differing", d.differing},
                                             {"elements", d.total}});
  }
  for (const reshard::Finding& finding : v.findings) {
    object["findings"].push_back({{"verdict", name(finding.verdict)}, {"text", finding.text}});
  }
  if (!session->expect.empty()) object["expect"] = session->expect;
  if (v.deep) object["deep"] = deep_json(*v.deep);
  if (v.replicas) {
    object["replicas"] = replica_counts(*v.replicas);
    object["not_compared"] = v.replicas->uncompared;
    for (const reshard::ReplicaDifference& difference : v.replicas->differences)
      session->print_json(replica_json(difference));
  }
  session->print_json(object);
}

struct VerifyFlags {
  std::string source;
  bool replicas = false;
  bool deep = false;
};

void run_verify(Session* session, const VerifyFlags& flags) {
  const std::string& source = flags.source;
  if (!session->also.empty()) session->storage.lay_over(source, session->also);
  session->source = source;
  reshard::VerifyOptions options{.replicas = flags.replicas || flags.deep,
                                 .deep = flags.deep,
                                 .read = session->read,
                                 .stream = session->stream_options()};
  const Verification v = reshard::verify(session->storage, source, options);
  if (session->json) {
    print_json(session, source, v);
  } else {
    std::cout << name(v.verdict) << "  " << source << "\n";
    if (!session->quiet) print_text(v);
  }
  if (v.verdict > Verdict::kComplete) session->status = kAnswerIsNo;
  if (session->expect.empty() || (v.digest && reshard::has_digest(*v.digest, session->expect)))
    return;
  session->notice("digest differs from --expect " + session->expect);
  session->status = kAnswerIsNo;
}

}  // namespace

void add_verify(CLI::App* app, Session* session) {
  auto flags = std::make_shared<VerifyFlags>();
  CLI::App* verb = app->add_subcommand(
      "verify", "A verdict: VERIFIED, COMPLETE, SUSPECT, INCOMPLETE, CORRUPT or HOSTILE");
  verb->add_option("SOURCE", flags->source)->required();
  verb->add_flag("--replicas", flags->replicas,
                 "Compare what is stored more than once copy by copy, bit for bit, and say which "
                 "copy is alone");
  verb->add_flag("--deep", flags->deep,
                 "The strictest form, for audits: --replicas; every file from the disk (its pages "
                 "dropped first) and twice, to the same digest; the files that no reader needs; a "
                 "certificate's digests against the source's. Reads all bytes twice");
  add_expect_flag(verb, session);
  add_source_flags(verb, session);
  verb->callback([session, flags] { run_verify(session, *flags); });
}

}  // namespace isoshard::tools
