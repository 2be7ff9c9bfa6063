// isoshard: the command line. One verb a file; this one has the list, the exit status and signals.
#include <sys/resource.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <new>
#include <string_view>
#include <vector>

#include "checkpoint/cancel.h"
#include "core/check.h"
#include "core/error.h"
#include "tools/session.h"
#include "tools/version.h"

namespace {

using isoshard::tools::Session;

// Only calls that a signal handler may make.
void say_at_once(const char* text, size_t length) {
  while (length > 0) {
    const ssize_t count = ::write(STDERR_FILENO, text, length);
    if (count <= 0) return;
    text += count;
    length -= static_cast<size_t>(count);
  }
}

// Whether --resume was given, for a handler that has no way to be told.
bool& wants_resume() {
  static bool wants = false;
  return wants;
}

// A second signal ends at once, as the user then wants: nothing is cleaned up, so that what stays
// behind is named.
void on_signal(int number) {
  if (isoshard::checkpoint::cancel_signal().exchange(number) == 0) return;
  const auto say = [](std::string_view text) { say_at_once(text.data(), text.size()); };
  const isoshard::checkpoint::HiddenFolder& left = isoshard::checkpoint::hidden_folder();
  const size_t length = left.length;
  const bool is_replaced =  // the target is published then, and this is what stood there before
      std::string_view(left.text, length).find("/.trash-") != std::string_view::npos;
  const bool goes_on = length > 0 && wants_resume() && !is_replaced;
  say("\nisoshard: Ended at once by a second signal.\n");
  if (length > 0) {
    say("  file:     ");
    say_at_once(left.text, length);
    say(goes_on ? "\n  found:    an unfinished folder, which stays\n"
                : "\n  found:    a folder that was not removed; nothing in it is needed\n");
  }
  say("  safe now: the source was only read; ");
  say(length > 0 && !is_replaced ? "nothing was published"
                                 : "a target is there whole or not at all");
  say("\n  next:     ");
  if (length > 0 && !goes_on) say("delete that folder, then ");
  say("give the same command again");
  say(goes_on                      ? ", with --resume: it goes on from there\n"
      : length > 0 && !is_replaced ? "; or, where it takes --resume, give it with that\n"
                                   : "\n");
  std::_Exit(128 + number);
}

void catch_signals() {
  struct sigaction action {};
  action.sa_handler = on_signal;
  for (int number : {SIGINT, SIGTERM, SIGHUP}) sigaction(number, &action, nullptr);
  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGXFSZ, SIG_IGN);  // a file-size limit becomes an error with a message
}

void raise_file_limit() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
}

void print_error(const Session& session, const isoshard::ErrorInfo& info) {
  session.print_json({{"kind", "error"},
                      {"code", name(info.code)},
                      {"what", info.what},
                      {"file", info.file},
                      {"entry", info.entry},
                      {"expected", info.expected},
                      {"found", info.found},
                      {"safe", info.safe.empty() ? isoshard::kNothingPublished : info.safe},
                      {"next", info.next}});
}

void report(const Session& session, const isoshard::Error& error) {
  if (session.json) print_error(session, error.info());
  std::cerr << "isoshard: " << error.what() << "\n";
  try {
    session.log(error.what());
  } catch (const isoshard::Error&) {
    // The log itself may be what failed.
  }
}

isoshard::Error memory_exhausted(const std::string& source) {
  rlimit limit{};
  const bool limited = getrlimit(RLIMIT_AS, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY;
  return isoshard::Error(isoshard::ErrorInfo{
      .code = isoshard::ErrorCode::kLimit,
      .what = "Memory is exhausted.",
      .file = source,
      .found = limited ? "a limit of " + std::to_string(limit.rlim_cur) + " bytes (ulimit -v)"
                       : "no limit is set: the machine has no more",
      .safe = "the source was only read; a target is there whole or not at all",
      .next = "give --workers 1, raise the limit, or use a machine with more memory"});
}

const char* kHelp = R"(isoshard: the same state, whatever the shards

  isoshard inspect SOURCE          what it is, what can be done with it, what is missing
  isoshard verify SOURCE           VERIFIED, COMPLETE, SUSPECT, INCOMPLETE, CORRUPT or HOSTILE
  isoshard diff A B                the first difference, totals, and what the values are
  isoshard digest SOURCE           one value for one state, whatever its topology and format
  isoshard convert SOURCE TARGET --to universal|fp32

  isoshard reshard SOURCE TARGET --to dp=4[,sp=,tp=,ep=,pp=,stage=]
  isoshard migrate SOURCE TARGET --to autoep --names FILE
  isoshard export SOURCE TARGET    a folder that from_pretrained loads
  isoshard salvage SOURCE TARGET   what still verifies of a damaged one, and a list of the rest
  isoshard doctor CHECKPOINT       known faults of other programs; --clean: what was left behind
  isoshard show SOURCE NAME        one tensor: values, and which bytes of which file hold them
  isoshard plan convert …          or reshard, export: bytes, files, memory, before any work
  isoshard simulate                train, save, reshard, resume on made-up topologies, bit for bit
  isoshard trace                   every call between simulated ranks, for eyes and for Perfetto
                                   (replay: one of its cases; topologies: by name)
  isoshard golden --out DIR        a checkpoint from a seed, and what must be in it, as HDF5
  isoshard ds_to_universal …       and zero_to_fp32 …: with DeepSpeed's own flags

SOURCE: a save folder with latest, a tag folder, a universal folder, a Trainer checkpoint-N, or an
fp32 file or folder. Each verb has --help. Exit status: 0 done or yes, 1 the answer is no, 2 could
not, 70 our own bug. Read and written: ZeRO 0 to 3, BF16_Optimizer, Ulysses, AutoTP, AutoEP, native
MoE, pipelines. docs/SUPPORT.md says what is not, and is refused by name.
)";

bool was_given(int argc, char** argv, std::string_view flag) {
  return std::any_of(argv, argv + argc, [&](const char* a) { return flag == a; });
}

// Whether --json was given, for a handler that has no way to be told.
bool& wants_json() {
  static bool wants = false;
  return wants;
}

// Where memory does not even suffice for a message: one that is there already, with the same parts.
int fail_without_memory() {
  const auto say = [](int file, std::string_view text) {
    static_cast<void>(!::write(file, text.data(), text.size()));
  };
  say(STDERR_FILENO,
      "isoshard: Memory is exhausted.\n  entry:    the whole command\n"
      "  found:    not even room for a longer message\n"
      "  safe now: the source was only read; a target is there whole or not at all\n"
      "  next:     raise the limit (ulimit -v) or use a machine with more memory; isoshard doctor "
      "--clean beside the target removes what was left\n");
  if (!wants_json()) return isoshard::tools::kCouldNot;
  say(STDOUT_FILENO,
      R"line({"schema":1,"kind":"error","code":"limit","what":"Memory is exhausted.",)line"
      R"line("file":"","entry":"the whole command","expected":"",)line"
      R"line("found":"not even room for a longer message",)line"
      R"line("safe":"the source was only read; a target is there whole or not at all",)line"
      R"line("next":"raise the limit (ulimit -v) or use a machine with more memory; isoshard )line"
      R"line(doctor --clean beside the target removes what was left"})line"
      "\n");
  return isoshard::tools::kCouldNot;
}

// Memory may end in a destructor too (that of a JSON value needs some), and from there no exception
// comes out.
[[noreturn]] void on_terminate() {
  try {
    if (const std::exception_ptr failure = std::current_exception())
      std::rethrow_exception(failure);
  } catch (const std::bad_alloc&) {
    std::_Exit(fail_without_memory());
  } catch (...) {
    // Our own bug: the abort below leaves what a debugger needs.
  }
  std::abort();
}

int run(int argc, char** argv, Session* session) {
  CLI::App app{"isoshard"};
  app.set_version_flag("--version", isoshard::tools::version_text());
  app.set_help_flag("");
  bool help = false;
  app.add_flag("-h,--help", help, "This page");
  app.require_subcommand(0, 1);
  std::string about;
  CLI::App* page = app.add_subcommand("help", "This page");
  page->add_option("VERB", about, "The page of one verb");
  page->callback([&] { help = true; });
  isoshard::tools::add_verbs(&app, session);
  try {
    app.parse(argc, argv);
  } catch (const CLI::CallForHelp&) {
    std::cout << app.get_subcommands().at(0)->help();
    return isoshard::tools::kDone;
  } catch (const CLI::CallForVersion&) {
    std::cout << isoshard::tools::version_text() << "\n";
    return isoshard::tools::kDone;
  } catch (const CLI::ParseError& error) {
    const auto asked = app.get_subcommands();
    const std::string next =
        asked.empty() ? "isoshard help" : "isoshard " + asked[0]->get_name() + " --help";
    if (wants_json()) {
      print_error(*session,
                  {.code = isoshard::ErrorCode::kUsage, .what = error.what(), .next = next});
    }
    std::cerr << "isoshard: " << error.what() << "\n  next: " << next << "\n";
    return isoshard::tools::kCouldNot;
  }
  for (CLI::App* verb : app.get_subcommands([](CLI::App*) { return true; })) {
    if (!help || verb->get_name() != about) continue;
    std::cout << verb->help();
    return isoshard::tools::kDone;
  }
  if (help && !about.empty()) {
    std::cerr << "isoshard: there is no such verb: " << isoshard::quote(about)
              << "\n  next: isoshard help\n";
    return isoshard::tools::kCouldNot;
  }
  if (help || app.get_subcommands().empty()) {
    std::cout << kHelp;
    return help ? isoshard::tools::kDone : isoshard::tools::kCouldNot;
  }
  return session->status;
}

int guarded_run(int argc, char** argv) {
  Session session;
  catch_signals();
  raise_file_limit();
  // --snake_case is taken for --kebab-case.
  for (int i = 1; i < argc; ++i) {
    if (argv[i][0] != '-' || argv[i][1] != '-') continue;
    const std::string verb = argc > 1 ? argv[1] : "";
    if (verb == "ds_to_universal" || verb == "zero_to_fp32") break;
    for (char* c = argv[i]; *c != '\0' && *c != '='; ++c) *c = *c == '_' ? '-' : *c;
  }
  // `plan VERB …` is `VERB … --dry-run`.
  std::vector<char*> arguments(argv, argv + argc);
  static char dry_run[] = "--dry-run";
  static char help[] = "help";
  const bool is_plan = argc > 1 && std::string(argv[1]) == "plan";
  if (is_plan && (argc == 2 || argv[2][0] == '-')) {
    arguments = {argv[0], help};
  } else if (is_plan) {
    arguments.erase(arguments.begin() + 1);
    arguments.push_back(dry_run);
  }
  try {
    const int status = run(static_cast<int>(arguments.size()), arguments.data(), &session);
    std::cout.flush();
    if (std::cout) return status;
    throw isoshard::Error(isoshard::ErrorInfo{
        .code = isoshard::ErrorCode::kNoSpace,
        .what = "The answer could not be written to the standard output.",
        .safe = "the source was only read; a target that was asked for is published",
        .next = "give it a place with room: a file on another disk, or a pipe that stays open"});
  } catch (const isoshard::Error& error) {
    report(session, error);
    const int signal = isoshard::checkpoint::cancel_signal();
    return error.info().code == isoshard::ErrorCode::kInterrupted ? 128 + signal
                                                                  : isoshard::tools::kCouldNot;
  } catch (const isoshard::CheckFailure& failure) {
    std::cerr << "isoshard: this is our own bug, please report this line:\n  " << failure.what()
              << "\n";
    return isoshard::tools::kOurBug;
  } catch (const std::bad_alloc&) {
    // Until the command line is read, its words are all that is known.
    session.json = wants_json();
    if (session.source.empty() && argc > 2 && argv[2][0] != '-') session.source = argv[2];
    report(session, memory_exhausted(session.source));
    return isoshard::tools::kCouldNot;
  } catch (const std::exception& failure) {
    std::cerr << "isoshard: this is our own bug, please report this line:\n  unexpected: "
              << failure.what() << "\n";
    return isoshard::tools::kOurBug;
  }
}

}  // namespace

int main(int argc, char** argv) {
  wants_json() = was_given(argc, argv, "--json");
  wants_resume() = was_given(argc, argv, "--resume");
  std::set_terminate(on_terminate);
  try {
    return guarded_run(argc, argv);
  } catch (const std::bad_alloc&) {
    return fail_without_memory();
  }
}
