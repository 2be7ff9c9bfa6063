// isoshard inspect: what a checkpoint is, from headers alone.
#include <algorithm>
#include <iostream>

#include "checkpoint/deepspeed/experts.h"
#include "checkpoint/deepspeed/name_filter.h"
#include "checkpoint/deepspeed/pipeline.h"
#include "core/error.h"
#include "engine/rank_fields.h"
#include "tools/regular_load.h"
#include "tools/session.h"
#include "tools/target_config.h"

namespace isoshard::tools {
namespace {

using checkpoint::Flavour;
using checkpoint::ParameterState;
using checkpoint::ShardedState;

struct Totals {
  int64_t trained = 0, frozen = 0, elements = 0, bytes = 0;
};

Totals totals_of(const ShardedState& state) {
  Totals totals;
  for (const ParameterState& parameter : state.parameters) {
    (parameter.group < 0 && state.flavour != Flavour::kWeights ? totals.frozen : totals.trained)++;
    totals.elements += numel(parameter.shape);
  }
  for (const checkpoint::SourceFile& file : state.files) totals.bytes += file.bytes().size_bytes();
  return totals;
}

// An optimizer group of experts and others, as stage 0 alone allows it for native MoE.
bool mixes_experts(const ShardedState& state) {
  if (state.expert_layout != checkpoint::ExpertLayout::kNative) return false;
  return std::ranges::any_of(state.groups, [&](const checkpoint::GroupState& group) {
    const auto experts = std::ranges::count_if(group.parameters, [&](int number) {
      const std::string& name = state.parameters[static_cast<size_t>(number)].name;
      return checkpoint::ExpertInfo::expert_number(name).has_value();
    });
    return experts > 0 && experts < static_cast<int64_t>(group.parameters.size());
  });
}

bool is_universal(const ShardedState& state) {
  return state.flavour == Flavour::kUniversal12 || state.flavour == Flavour::kUniversal3;
}

std::vector<std::string> abilities(const ShardedState& state) {
  std::vector<std::string> result = {"digest, diff, show, verify"};
  if (state.flavour == Flavour::kWeights) return result;
  const bool universal = is_universal(state);
  const bool experts = state.expert_layout != checkpoint::ExpertLayout::kNone;
  const bool folded = experts && state.topology.tensor > 1;
  const bool frozen = std::ranges::any_of(
      state.parameters, [](const ParameterState& parameter) { return parameter.group < 0; });
  const bool lossy = state.pipeline.present() && (frozen || !state.buffers.empty());
  if (mixes_experts(state)) return {result[0], "convert --to fp32"};
  if (!universal && !lossy)
    result.push_back(std::string("convert --to universal") + (folded ? " --beyond-deepspeed" : ""));
  result.push_back("convert --to fp32");
  if (folded)
    result.push_back("reshard --to tp=1[,dp=,ep=,stage=], or to its own topology");
  else if (experts)
    result.push_back("reshard --to dp=N[,ep=,stage=]");
  else if (state.pipeline.present())
    result.push_back(state.split_file < 0 ? "reshard --to dp=N[,pp=]"
                                          : "reshard --to dp=N[,tp=,pp=]");
  else if (state.topology.pipeline == 1)  // a pipeline's universal folder lacks its layers' files
    result.push_back("reshard --to dp=N[,sp=,tp=,stage=]");
  return result;
}

std::string target_text(const ShardedState& state) {
  std::string text = "dp=" + std::to_string(state.topology.data) +
                     ",sp=" + std::to_string(state.topology.sequence) +
                     ",tp=" + std::to_string(state.topology.tensor);
  if (state.topology.pipeline > 1 || state.pipeline.present())
    text += ",pp=" + std::to_string(state.topology.pipeline);
  if (state.expert_layout != checkpoint::ExpertLayout::kNone)
    text += ",ep=" + std::to_string(state.topology.expert);
  return text + ",stage=" + std::to_string(state.stage);
}

// Of each pipeline stage: "0 1 2, tied embed".
std::vector<std::string> stages_of(const ShardedState& state) {
  std::vector<std::string> result;
  for (const auto& [layers, keys] : checkpoint::stage_holdings(state)) {
    std::string text;
    for (int layer : layers) text += (text.empty() ? "" : " ") + std::to_string(layer);
    for (const std::string& key : keys) text += (text.empty() ? "tied " : ", tied ") + key;
    result.push_back(std::move(text));
  }
  return result;
}

std::string states_of(const ShardedState& state, const ParameterState& parameter) {
  std::string text;
  for (int leaf : parameter.states) text += (text.empty() ? "" : " ") + state.leaf(leaf).state;
  for (const checkpoint::Scalar& scalar : parameter.scalars)
    text += (text.empty() ? "" : " ") + scalar.name;
  return text;
}

void print_json_form(Session* session, const ShardedState& state, const Totals& totals) {
  nlohmann::json object = {{"kind", "checkpoint"},
                           {"format", name(state.flavour)},
                           {"stage", state.stage},
                           {"tag", state.tag},
                           {"topology", to_string(state.topology)},
                           {"to", target_text(state)},
                           {"ds_version", state.version},
                           {"files", state.files.size()},
                           {"bytes", totals.bytes},
                           {"parameters", totals.trained},
                           {"frozen", totals.frozen},
                           {"buffers", state.buffers.size()},
                           {"elements", totals.elements},
                           {"round_robin", state.round_robin},
                           {"stepped", state.stepped},
                           {"inferred", state.inferred},
                           {"notices", state.notices}};
  if (state.pipeline.present()) object["stages"] = stages_of(state);
  for (const checkpoint::Alias& alias : state.aliases) object["aliases"][alias.name] = alias.target;
  session->print_json(object);
  const checkpoint::NameFilter filter(session->only);
  for (const ParameterState& parameter : state.parameters) {
    if (!filter.matches(parameter.name)) continue;
    session->print_json({{"kind", "parameter"},
                         {"name", parameter.name},
                         {"shape", parameter.shape},
                         {"group", parameter.group},
                         {"dtype", name(parameter.model_dtype)},
                         {"weight_dtype", name(state.leaf(parameter.weight).dtype)},
                         {"states", states_of(state, parameter)}});
  }
}

void print_text(Session* session, const ShardedState& state, const Totals& totals, bool list) {
  session->say("checkpoint   " + quote(state.folder) +
               (state.tag.empty() ? "" : ", tag " + quote(state.tag)));
  session->say(std::string("format       ") + name(state.flavour) +
               (state.version.empty() ? "" : ", written by DeepSpeed " + state.version));
  if (state.flavour != Flavour::kWeights) {
    session->say("topology     " + to_string(state.topology) +
                 " (as --to takes it: " + target_text(state) + ")");
  }
  session->say("files        " + std::to_string(state.files.size()) + ", " +
               human_bytes(totals.bytes));
  session->say("parameters   " + std::to_string(totals.trained) +
               (totals.frozen ? " and " + std::to_string(totals.frozen) + " frozen" : "") + ", " +
               std::to_string(totals.elements) + " elements, in " +
               std::to_string(std::max<size_t>(state.groups.size(), 1)) + " group(s)");
  std::string states;
  for (const ParameterState& parameter : state.parameters) {
    if (states.empty()) states = states_of(state, parameter);
  }
  if (state.flavour != Flavour::kWeights)
    session->say("optimizer    " + (states.empty() ? "never stepped: no state" : states));
  session->say("buffers      " + std::to_string(state.buffers.size()));
  for (const checkpoint::Alias& alias : state.aliases)
    session->say("tied         " + quote(alias.name) + " = " + quote(alias.target));
  const std::vector<std::string> stages = stages_of(state);
  for (size_t stage = 0; stage < stages.size(); ++stage)
    session->say("pp stage " + std::to_string(stage) + "   trained layers " + stages[stage]);
  if (state.round_robin) {
    session->say(
        "round robin  the flat buffers are permuted; DeepSpeed's own converter swaps parameters "
        "here");
  }
  for (const std::string& text : state.inferred) session->say("inferred     " + text);
  for (const std::string& text : abilities(state)) session->say("can          " + text);
  if (!list) return;
  const checkpoint::NameFilter filter(session->only);
  for (const ParameterState& parameter : state.parameters) {
    if (!filter.matches(parameter.name)) continue;
    session->say("  " + quote(parameter.name) + "  " + to_string(parameter.shape) + "  " +
                 name(parameter.model_dtype) +
                 (parameter.group < 0 ? "" : "  group " + std::to_string(parameter.group)) + "  " +
                 states_of(state, parameter));
  }
}

struct Run {
  bool client_state = false;
  std::string config;
  int world = 0;
  RunConfig read;
};

void check_form(const ShardedState& state) {
  const bool universal = is_universal(state);
  if (!universal && state.flavour != Flavour::kWeights) return;
  throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                        .what = "A regular load takes ZeRO checkpoints alone.",
                        .file = state.folder,
                        .expected = "a ZeRO checkpoint",
                        .found = name(state.flavour),
                        .next = universal ? "load it with checkpoint.load_universal, at any degrees"
                                          : "leave --to-config out"});
}

// Whether a regular load in a config's run finds what it looks for.
void print_answer(Session* session, const Run& run, nlohmann::json answer) {
  const bool fits = answer["fits"].get<bool>();
  if (!fits) session->status = kAnswerIsNo;
  if (session->json) {
    answer["kind"] = "regular_load";
    return session->print_json(answer);
  }
  const auto list = [&](const nlohmann::json& texts) {
    std::string joined;
    for (const nlohmann::json& text : texts)
      joined += (joined.empty() ? "" : "; ") + text.get<std::string>();
    return joined;
  };
  session->say("loads in     " + quote(run.config) + " on " + std::to_string(run.world) +
               " ranks: " + (fits ? "nothing that was compared speaks against it" : "NO"));
  for (const nlohmann::json& text : answer["differs"])
    session->say("             " + text.get<std::string>());
  session->say("             not compared: " + list(answer["not_compared"]));
  for (const char* key : {"command", "next"}) {
    if (!answer[key].get<std::string>().empty())
      session->say("             " + answer[key].get<std::string>());
  }
}

// Of the first rank: client_state of save_checkpoint, as JSON; what JSON has no word for is its
// kind's name in angle brackets.
void print_client_state(Session* session, const ShardedState& state) {
  if (state.model_files.empty()) {
    throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                          .what = "There are no model files, which hold the client state.",
                          .file = state.folder,
                          .found = name(state.flavour),
                          .next = "name the checkpoint that was saved"});
  }
  const checkpoint::Fields fields(state.document(state.model_files[0]));
  const engine::Json client = engine::client_state(fields, {.clean_client_state = true});
  // In ASCII: a terminal is shown no text of a file as it stands.
  const std::string text = client.dump(-1, ' ', true, nlohmann::detail::error_handler_t::replace);
  if (session->json) {
    return session->print_json({{"kind", "client_state"}, {"value", nlohmann::json::parse(text)}});
  }
  session->say("client state " + text);
}

void run_inspect(Session* session, const std::string& source, bool list, Run run) {
  if (run.config.empty() && run.world != 0) {
    throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                          .what = "--world goes with --to-config.",
                          .next = "leave --world out"});
  }
  if (!run.config.empty()) run.read = read_run_config(session, run.config);
  session->read.places = !run.config.empty();       // a reshard is planned
  session->read.lost_experts = run.config.empty();  // what is missing is told, or refused
  const ShardedState state = session->open(source, /*prove=*/false);
  const checkpoint::NameFilter filter(session->only);
  const bool matched = std::ranges::any_of(
      state.parameters, [&](const ParameterState& p) { return filter.matches(p.name); });
  if (!session->only.empty() && !matched) checkpoint::refuse_unmatched(session->only, state.folder);
  nlohmann::json answer;
  if (!run.config.empty()) {
    check_form(state);
    answer = regular_load(session, state, run.read, share_world(state, run.read, run.world));
  }
  const Totals totals = totals_of(state);
  if (session->json)
    print_json_form(session, state, totals);
  else
    print_text(session, state, totals, list || !session->only.empty());
  if (!run.config.empty()) print_answer(session, run, answer);
  if (run.client_state) print_client_state(session, state);
}

}  // namespace

void add_inspect(CLI::App* app, Session* session) {
  auto source = std::make_shared<std::string>();
  auto list = std::make_shared<bool>(false);
  auto run = std::make_shared<Run>();
  CLI::App* verb = app->add_subcommand(
      "inspect", "What a checkpoint is and what can be done with it; reads headers only");
  verb->add_option("SOURCE", *source)->required();
  verb->add_flag("--parameters", *list, "List every parameter");
  verb->add_option(
      "--to-config", run->config,
      "A DeepSpeed config: would a regular load in its run find what it looks for? (status 1: no)");
  verb->add_option("--world", run->world, "Number of ranks for --to-config");
  verb->add_flag(
      "--clean-client-state", run->client_state,
      "Print what the training script gave to save_checkpoint, without DeepSpeed's keys");
  add_source_flags(verb, session);
  add_only_flag(verb, session);
  verb->callback([session, source, list, run] { run_inspect(session, *source, *list, *run); });
}

}  // namespace isoshard::tools
