// isoshard digest: one line a section, after a first line for the root.
#include "reshard/digest.h"

#include <iostream>

#include "checkpoint/deepspeed/name_filter.h"
#include "core/error.h"
#include "tools/session.h"

namespace isoshard::tools {
namespace {

struct DigestFlags {
  std::string source;
  bool leaves = false;
};

std::string strip(const std::string& text) {
  return text.rfind("iso1:", 0) == 0 ? text.substr(5) : text;
}

void run_digest(Session* session, const DigestFlags& flags) {
  checkpoint::ShardedState state = session->open(flags.source);
  std::vector<std::string> left_out;
  if (!session->only.empty())
    state = checkpoint::select_names(std::move(state), session->only, &left_out);
  const reshard::Digest digest =
      reshard::compute_digest(session->storage, state, session->stream_options());
  int64_t tensors = 0, elements = 0;
  for (const reshard::SectionDigest& section : digest.sections) {
    tensors += section.tensors;
    elements += section.elements;
  }
  if (session->json) {
    nlohmann::json object = {{"kind", "digest"}, {"root", "iso1:" + digest.root}};
    for (const reshard::SectionDigest& s : digest.sections) {
      object["sections"][s.section] = s.absent.empty() ? nlohmann::json{{"digest", "iso1:" + s.hex},
                                                                        {"tensors", s.tensors},
                                                                        {"elements", s.elements}}
                                                       : nlohmann::json{{"absent", s.absent}};
    }
    if (!session->expect.empty()) object["expect"] = session->expect;
    if (!session->expect.empty()) object["found"] = reshard::has_digest(digest, session->expect);
    session->print_json(object);
  } else {
    std::cout << "iso1:" << digest.root << "  root  " << tensors << "  " << elements << "\n";
    for (const reshard::SectionDigest& s : digest.sections) {
      if (s.absent.empty())
        std::cout << "iso1:" << s.hex << "  " << s.section << "  " << s.tensors << "  "
                  << s.elements << "\n";
      else
        std::cout << "absent: " << s.absent << "  " << s.section << "\n";
    }
    if (flags.leaves) {
      for (const reshard::LeafLine& leaf : digest.leaves) std::cout << reshard::leaf_line(leaf);
    }
  }
  if (session->expect.empty()) return;
  if (!reshard::has_digest(digest, session->expect)) {
    session->notice("digest differs from --expect iso1:" + strip(session->expect));
    session->status = kAnswerIsNo;
  }
}

}  // namespace

void add_digest(CLI::App* app, Session* session) {
  auto flags = std::make_shared<DigestFlags>();
  CLI::App* verb = app->add_subcommand(
      "digest", "One value for one state, whatever its topology, format and files");
  verb->add_option("SOURCE", flags->source)->required();
  add_expect_flag(verb, session);
  verb->add_flag("--leaves", flags->leaves, "Also print every leaf's canonical line");
  add_source_flags(verb, session);
  add_only_flag(verb, session);
  verb->callback([session, flags] { run_digest(session, *flags); });
}

}  // namespace isoshard::tools
