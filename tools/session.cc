// See session.h.
#include "tools/session.h"

#include <spdlog/sinks/basic_file_sink.h>
#include <spdlog/spdlog.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <memory>
#include <thread>

#include "checkpoint/deepspeed/weights_blueprint.h"
#include "core/error.h"

namespace isoshard::tools {
namespace {

[[noreturn]] void refuse_log(const std::string& path, const std::string& found) {
  throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                        .what = "The log file cannot be used.",
                        .file = path,
                        .expected = "a new file, or a log of isoshard, in a folder that is there",
                        .found = found,
                        .next = "name another with --log-file"});
}

// Appends to a log of ours alone: a mistaken name must not write into a checkpoint.
std::shared_ptr<spdlog::logger> open_log(const std::string& path) {
  const std::filesystem::path file(path);
  const std::filesystem::path folder = file.has_parent_path() ? file.parent_path() : ".";
  std::error_code ignored;
  if (!std::filesystem::is_directory(folder, ignored)) refuse_log(path, "no such folder");
  if (std::filesystem::exists(file, ignored)) {
    if (!std::filesystem::is_regular_file(file, ignored)) refuse_log(path, "no regular file");
    std::ifstream old(file);
    std::string begin;
    std::getline(old, begin);
    if (!begin.empty() && begin.find("[isoshard]") == std::string::npos)
      refuse_log(path, "a file that is no log of isoshard");
  }
  spdlog::set_error_handler([](const std::string& why) { refuse_log("--log-file", why); });
  try {
    return spdlog::basic_logger_mt("isoshard", path);
  } catch (const spdlog::spdlog_ex& error) {
    refuse_log(path, error.what());
  }
}

}  // namespace

void Session::print_json(nlohmann::json object) const {
  object["schema"] = 1;
  std::cout << object.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) << "\n";
}

void Session::log(const std::string& line) const {
  if (log_file.empty()) return;
  std::shared_ptr<spdlog::logger> logger = spdlog::get("isoshard");
  if (logger == nullptr) logger = open_log(log_file);
  logger->info(line);
  logger->flush();
}

void Session::say(const std::string& line) const {
  log(line);
  if (!quiet && !json) std::cout << line << "\n" << std::flush;
}

void Session::notice(const std::string& line) const {
  log(line);
  if (!quiet) std::cerr << line << "\n";
}

checkpoint::ShardedState Session::open(const std::string& source, bool prove) {
  checkpoint::ReadOptions options = read;
  options.prove = prove;
  options.workers = stream_options().workers;
  if (!also.empty() && this->source.empty()) storage.lay_over(source, also);
  this->source = source;
  checkpoint::ShardedState state = checkpoint::read_checkpoint(storage, source, options);
  for (const std::string& text : state.notices) notice("notice: " + text);
  for (const std::string& text : state.doubts) notice("notice: doubtful: " + text);
  std::string foreign;
  int64_t others = -1;
  for (const checkpoint::SourceFile& file : state.files) {
    if (!file.torch || file.torch->zip().torch_dialect) continue;
    if (foreign.empty()) foreign = quote(file.relative);
    ++others;
  }
  if (!foreign.empty()) {
    notice("notice: torch did not write the archive " + foreign +
           (others > 0 ? " nor " + std::to_string(others) + " others" : "") +
           ": another zip program has made it anew; what it holds was checked all the same");
  }
  return state;
}

reshard::StreamOptions Session::stream_options() const {
  reshard::StreamOptions options;
  const int processors = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  // Two a processor: while one waits for the disk another works (docs/PERFORMANCE.md).
  options.workers = workers > 0 ? workers : std::min(2 * processors, 32);
  if (!max_memory.empty()) {
    // A worker holds one chunk of 1 MiB and at most twice that for a cast.
    const int64_t each = 4 << 20, fixed = 32 << 20;
    const int64_t bytes = checkpoint::parse_size(max_memory);
    options.workers =
        static_cast<int>(std::clamp<int64_t>((bytes - fixed) / each, 1, options.workers));
  }
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) == 0) {
    options.open_files =
        static_cast<int>(std::clamp<int64_t>(static_cast<int64_t>(limit.rlim_cur) - 128, 4, 2048));
  }
  if (no_progress || quiet || json) return options;
  const bool terminal = isatty(STDERR_FILENO) != 0;
  const auto began =
      std::make_shared<std::chrono::steady_clock::time_point>(std::chrono::steady_clock::now());
  const auto last = std::make_shared<double>(0);
  options.progress = [terminal, began, last](int64_t done, int64_t total) {
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - *began).count();
    if (!terminal && seconds - *last < 5) return;
    if (seconds < 0.5) return;
    *last = seconds;
    const double rate = static_cast<double>(done) / seconds;
    std::fprintf(stderr, "%s  %3d %%  %s of %s, %s/s%s", terminal ? "\r" : "",
                 total > 0 ? static_cast<int>(100 * done / total) : 100, human_bytes(done).c_str(),
                 human_bytes(total).c_str(), human_bytes(static_cast<int64_t>(rate)).c_str(),
                 terminal ? (done == total ? "\n" : "   ") : "\n");
  };
  return options;
}

std::string shell_word(const std::string& text) {
  const bool plain = !text.empty() && std::ranges::all_of(text, [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
           std::string("_@%+=:,./-").find(c) != std::string::npos;
  });
  if (plain) return text;
  std::string quoted = "'";
  for (char c : text) quoted += c == '\'' ? "'\\''" : std::string(1, c);
  return quoted + "'";
}

std::string human_bytes(int64_t bytes) {
  const char* units[] = {"B", "kB", "MB", "GB", "TB", "PB"};
  double value = static_cast<double>(bytes);
  int unit = 0;
  while (value >= 1000 && unit < 5) {
    value /= 1000;
    ++unit;
  }
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, unit == 0 ? "%.0f %s" : "%.1f %s", value, units[unit]);
  return buffer;
}

void add_common_flags(CLI::App* verb, Session* session) {
  verb->set_help_flag("-h,--help", "This page");
  verb->add_flag("--json", session->json, "One JSON object a line on stdout");
  verb->add_flag("--quiet", session->quiet, "Say nothing that was not asked for");
  verb->add_flag("--no-progress", session->no_progress, "No progress line");
  verb->add_option("--workers", session->workers, "Threads (default: two a processor)")
      ->check(CLI::Range(1, 256));
  verb->add_option("--max-memory", session->max_memory, "Upper bound for buffers, such as 256MB");
  verb->add_option("--log-file", session->log_file, "Also write messages to this file");
}

void add_source_flags(CLI::App* verb, Session* session) {
  add_common_flags(verb, session);
  verb->add_option("--tag,-t", session->read.tag, "Tag to read instead of the one in latest");
  verb->add_option("--sp", session->read.sequence_degree, "Sequence-parallel degree of the source")
      ->check(CLI::Range(1, 1000000));
  verb->add_option("--param-order", session->read.param_order,
                   "Stage 0: file with the parameter names in the optimizer's order");
  verb->add_option("--also", session->also,
                   "A folder with further files of SOURCE, as another node has kept them (repeat)")
      ->expected(1)
      ->take_all();
  verb->add_flag("--allow-renamed", session->read.allow_renamed,
                 "Accept a file that was saved under another name");
  verb->add_flag_callback(
      "--no-strict", [session] { session->read.strict = false; },
      "Go on where universal_checkpoint_info has patterns that match no name");
}

void add_expect_flag(CLI::App* verb, Session* session) {
  const auto is_digest = [](const std::string& text) {
    const std::string hex = text.starts_with("iso1:") ? text.substr(5) : text;
    const bool good =
        hex.size() == 64 && hex.find_first_not_of("0123456789abcdef") == std::string::npos;
    return good ? "" : "--expect must be iso1: and 64 hexadecimal digits, not '" + text + "'";
  };
  verb->add_option("--expect", session->expect,
                   "Exit 1 unless the root or a section has this digest (iso1:…)")
      ->check(is_digest);
}

void add_only_flag(CLI::App* verb, Session* session) {
  verb->add_option("--only", session->only,
                   "Regular expression (RE2), matched anywhere in names: these parameters alone");
}

}  // namespace isoshard::tools
