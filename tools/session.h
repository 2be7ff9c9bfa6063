// What every verb shares: the common flags, where output goes, progress, exit status.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>

#include "checkpoint/deepspeed/reader.h"
#include "checkpoint/overlay_storage.h"
#include "reshard/executor.h"

namespace isoshard::tools {

// Exit status (docs/CONTRACTS.md §1).
enum Status { kDone = 0, kAnswerIsNo = 1, kCouldNot = 2, kOurBug = 70 };

struct Session {
  checkpoint::OverlayStorage storage;
  bool json = false;
  bool quiet = false;
  bool no_progress = false;
  int workers = 0;  // 0: twice as many as there are processors
  std::string max_memory;
  std::string log_file;
  std::vector<std::string> also;  // --also: further folders of the first source
  std::string source;             // the one that is, or was last, read
  std::string expect;             // iso1:…
  std::string only;               // regular expression on parameter names
  checkpoint::ReadOptions read;
  int status = kDone;

  // One JSON object a line, with "schema": 1.
  void print_json(nlohmann::json object) const;
  void say(const std::string& line) const;     // to stdout unless --quiet or --json
  void log(const std::string& line) const;     // to --log-file, if there is one
  void notice(const std::string& line) const;  // to stderr unless --quiet

  checkpoint::ShardedState open(const std::string& source, bool prove = true);
  reshard::StreamOptions stream_options() const;
};

// Flags that every verb takes, and those of verbs that read a checkpoint.
void add_common_flags(CLI::App* verb, Session* session);
void add_source_flags(CLI::App* verb, Session* session);
// --expect with the digest that must be found: iso1: and 64 hexadecimal digits.
void add_expect_flag(CLI::App* verb, Session* session);
void add_only_flag(CLI::App* verb, Session* session);

// A word as a POSIX shell reads it back.
std::string shell_word(const std::string& text);

std::string human_bytes(int64_t bytes);  // "2.4 GB", decimal

void add_verbs(CLI::App* app, Session* session);

// Verbs: each adds a subcommand whose callback sets session->status.
void add_inspect(CLI::App* app, Session* session);
void add_show(CLI::App* app, Session* session);
void add_verify(CLI::App* app, Session* session);
void add_doctor(CLI::App* app, Session* session);
void add_salvage(CLI::App* app, Session* session);
void add_diff(CLI::App* app, Session* session);
void add_digest(CLI::App* app, Session* session);
void add_convert(CLI::App* app, Session* session);
void add_reshard(CLI::App* app, Session* session);
void add_migrate(CLI::App* app, Session* session);
void add_export(CLI::App* app, Session* session);
void add_simulate(CLI::App* app, Session* session);
void add_golden(CLI::App* app, Session* session);
void add_trace(CLI::App* app, Session* session);
void add_deepspeed_aliases(CLI::App* app, Session* session);

}  // namespace isoshard::tools
