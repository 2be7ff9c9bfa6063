// isoshard diff: the first difference, totals, and what the differing values are.
#include "reshard/diff.h"

#include <algorithm>
#include <iostream>
#include <map>

#include "checkpoint/deepspeed/name_filter.h"
#include "core/error.h"
#include "reshard/flat_picture.h"
#include "reshard/tensor_values.h"
#include "tools/session.h"

namespace isoshard::tools {
namespace {

using checkpoint::Flavour;
using checkpoint::ShardedState;
using reshard::Difference;
using reshard::DiffReport;
using reshard::SectionOutcome;
using Verdict = SectionOutcome::Verdict;

constexpr size_t kShownLines = 200;
constexpr size_t kShownHyper = 40;

struct DiffFlags {
  std::string a, b, svg;
  int64_t ulp = 0;
};

std::string index_text(const Difference& difference) {
  return difference.first->index.empty() ? "" : " at " + to_string(difference.first->index);
}

// Of hyper the name is a path whose parts are printable already.
std::string name_text(const Difference& difference) {
  return difference.section == "hyper" ? difference.name : reshard::plain_name(difference.name);
}

std::string count_text(const SectionOutcome& section) {
  const char* what = section.section == "buffers" ? " buffers"
                     : section.section == "hyper" ? " settings"
                                                  : " parameters";
  return std::to_string(section.different) + " of " + std::to_string(section.names) + what;
}

// One line: what, how much, where first, both values and bits, and what B's values are.
std::string line_of(const Difference& d) {
  std::string text = "  " + name_text(d) + "  " + d.state + "  ";
  if (!d.first) return text + d.explanation;
  const bool leaf = !d.first->a_bits.empty();
  if (!leaf) {
    text += "A " + d.first->a + ", B " + d.first->b;
    return d.section == "hyper" ? text : text + "  " + d.explanation;
  }
  text += std::to_string(d.different) + " of " + std::to_string(d.total) + " differ, first" +
          index_text(d) + ": A " + d.first->a + " (" + d.first->a_bits + "), B " + d.first->b +
          " (" + d.first->b_bits + ")";
  return text + (d.explained ? "; B = " : "; ") + d.explanation;
}

// Optimizer states that differ as their parameter's weight does are named on its line.
std::vector<std::string> lines_of(const DiffReport& report) {
  std::map<std::pair<std::string, std::string>, size_t> weight_lines;  // (name, explanation)
  std::vector<std::string> lines;
  std::map<size_t, std::string> likewise;
  for (const Difference& d : report.differences) {
    const auto known = weight_lines.find({d.name, d.explanation});
    if (d.explained && known != weight_lines.end()) {
      std::string& states = likewise[known->second];
      states += (states.empty() ? "" : ", ") + d.state;
      continue;
    }
    if (d.explained && d.section == "weights") weight_lines[{d.name, d.explanation}] = lines.size();
    lines.push_back(line_of(d));
  }
  for (const auto& [line, states] : likewise) lines[line] += "; likewise " + states;
  return lines;
}

std::string verdict_line(const DiffReport& report) {
  bool cast = false, absent = false;
  for (const SectionOutcome& s : report.sections) {
    cast = cast || s.verdict == Verdict::kCast;
    absent = absent || s.verdict == Verdict::kAbsent;
  }
  if (report.equal()) {
    return std::string(absent ? "equal in all that both hold" : "equal") +
           (cast ? "; where dtypes differ, after a cast" : "");
  }
  const Difference& first = report.differences.front();
  return "different, first in " + name_text(first) + " (" + first.section + ")" +
         (first.first ? index_text(first) : "");
}

std::string totals_line(const DiffReport& report) {
  std::string text;
  for (const SectionOutcome& s : report.sections) {
    if (s.verdict != Verdict::kDifferent) continue;
    const bool first = text.empty();
    std::string count = count_text(s);
    const bool parameters = s.section != "buffers" && s.section != "hyper";
    if (!first && parameters) count = count.substr(0, count.rfind(' '));
    text += (first ? "" : ", ") + count + (first ? " differ" : "") + " (" + s.section + ")";
  }
  return text;
}

void print_text(Session* session, const DiffReport& report) {
  session->say(verdict_line(report));
  size_t hyper = 0, shown = 0, hidden = 0;
  for (const Difference& d : report.differences) hyper += d.section == "hyper";
  const std::vector<std::string> lines = lines_of(report);
  const size_t values = lines.size() - hyper;  // hyper comes last
  for (size_t i = 0; i < lines.size(); ++i) {
    const bool show = i < values ? shown < kShownLines : i - values < kShownHyper;
    hidden += !show;
    shown += show;
    if (show) session->say(lines[i]);
  }
  if (hidden > 0) session->say("  … " + std::to_string(hidden) + " further lines; --json has all");
  if (!report.equal()) session->say(totals_line(report));
  for (const SectionOutcome& s : report.sections) {
    if (s.verdict == Verdict::kDifferent) continue;
    if (s.verdict == Verdict::kAbsent) {
      session->say("absent: " + s.note + "  " + s.section);
      continue;
    }
    const std::string note = s.note.empty() ? "" : " (" + s.note + ")";
    session->say(std::string(name(s.verdict)) + ": " + s.section + note);
  }
  if (!report.reason.empty()) session->say("reason: " + report.reason);
  if (!report.right.empty()) session->say("evidence: " + report.right);
}

void print_json_form(Session* session, const DiffReport& report) {
  for (const Difference& d : report.differences) {
    nlohmann::json object = {
        {"kind", "diff"},   {"section", d.section},         {"name", d.name},
        {"state", d.state}, {"different", d.different},     {"total", d.total},
        {"first", nullptr}, {"explanation", d.explanation}, {"explained", d.explained}};
    if (d.first) {
      object["first"] = {{"index", d.first->index},
                         {"a", d.first->a},
                         {"b", d.first->b},
                         {"a_bits", d.first->a_bits},
                         {"b_bits", d.first->b_bits}};
    }
    session->print_json(std::move(object));
  }
  nlohmann::json total = {{"kind", "diff_total"},
                          {"equal", report.equal()},
                          {"different", report.differences.size()},
                          {"reason", report.reason},
                          {"evidence", report.right},
                          {"sections", nlohmann::json::object()}};
  for (const SectionOutcome& s : report.sections) {
    total["sections"][s.section] = {{"verdict", name(s.verdict)},
                                    {"note", s.note},
                                    {"names", s.names},
                                    {"different", s.different}};
  }
  session->print_json(std::move(total));
}

// The picture of A's flat buffers, or of B's where only B has any.
void write_picture(Session* session, const std::string& path, const ShardedState& a,
                   const ShardedState& b) {
  const auto is_flat = [](const ShardedState& state) {
    return state.flavour == Flavour::kZero12 || state.flavour == Flavour::kBf16Optimizer;
  };
  const std::string svg = reshard::flat_picture(is_flat(a) || !is_flat(b) ? a : b);
  const std::unique_ptr<WritableFile> file = session->storage.create(path);
  file->write_at(0, std::as_bytes(std::span(svg)));
  file->close();
  session->notice("picture: " + path);
}

void run_diff(Session* session, const DiffFlags& flags) {
  const ShardedState a = session->open(flags.a), b = session->open(flags.b);
  if (!flags.svg.empty()) write_picture(session, flags.svg, a, b);
  const DiffReport report =
      reshard::diff(session->storage, a, b,
                    {.stream = session->stream_options(), .ulp = flags.ulp, .only = session->only});
  const bool compared = std::ranges::any_of(
      report.sections, [](const auto& s) { return s.section != "hyper" && s.names > 0; });
  if (!session->only.empty() && !compared) checkpoint::refuse_unmatched(session->only, "");
  if (session->json)
    print_json_form(session, report);
  else
    print_text(session, report);
  if (!report.equal()) session->status = kAnswerIsNo;
}

}  // namespace

void add_diff(CLI::App* app, Session* session) {
  auto flags = std::make_shared<DiffFlags>();
  CLI::App* verb = app->add_subcommand(
      "diff",
      "The first difference of two checkpoints, totals, and what B's values are in terms of A's");
  verb->add_option("A", flags->a)->required();
  verb->add_option("B", flags->b, "Any form: ZeRO of any stage and topology, universal, fp32")
      ->required();
  verb->add_option("--svg", flags->svg, "Draw the flat partitions of a stage 1 or 2 source");
  verb->add_option("--ulp", flags->ulp, "Take floating values this close for equal")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 62));
  add_source_flags(verb, session);
  add_only_flag(verb, session);
  verb->callback([session, flags] { run_diff(session, *flags); });
}

}  // namespace isoshard::tools
