// isoshard export: a folder that from_pretrained loads, proven equal to the checkpoint's weights.
#include <set>

#include "checkpoint/deepspeed/hf_experts.h"
#include "checkpoint/deepspeed/model_states.h"
#include "checkpoint/deepspeed/side_files.h"
#include "checkpoint/deepspeed/weights_blueprint.h"
#include "core/error.h"
#include "tools/conversion.h"
#include "tools/session.h"

namespace isoshard::tools {
namespace {

using checkpoint::ShardedState;

struct ExportFlags {
  std::string source, target, to = "hf", dtype = "model", config, max_shard_size = "5GB";
  bool no_config = false;
  ConversionFlags common;
};

[[noreturn]] void refuse(const std::string& what, const std::string& file, const std::string& found,
                         const std::string& next) {
  throw Error(ErrorInfo{.code = ErrorCode::kUnsupported,
                        .what = what,
                        .file = file,
                        .found = found,
                        .safe = "nothing was written",
                        .next = next});
}

bool is_number(const std::string& text) {
  return !text.empty() && text.find_first_not_of("0123456789") == std::string::npos;
}

// Why no model of Hugging Face has such a name; empty if one may.
std::string why_foreign(const std::string& name) {
  if (is_number(name.substr(0, name.find('.'))) || name.starts_with("tied_modules."))
    return "a pipeline names its parameters by layer number, not as the model does";
  if (name.find(".deepspeed_moe.") != std::string::npos)
    return "native MoE of DeepSpeed has names of its own";
  if (name.ends_with(".experts.w1"))
    return "AutoEP stacks experts under names of its own; export the checkpoint, not its weights";
  for (const char* front : {"module.", "_forward_module.", "base_model.model."}) {
    if (name.starts_with(front)) return "a wrapper's prefix stands before the model's own names";
  }
  return "";
}

// from_pretrained would leave such weights at random.
void refuse_foreign_names(const ShardedState& state) {
  for (const checkpoint::ParameterState& parameter : state.parameters) {
    const std::string why = why_foreign(parameter.name);
    if (why.empty()) continue;
    refuse("from_pretrained would not find this weight: " + why + ".", state.folder,
           quote(parameter.name),
           "--no-config writes the weights alone, --force goes on if the model has such names");
  }
}

// The number of layers that the names count, where they count one list of layers; 0 otherwise.
int64_t layers_in_names(const ShardedState& state) {
  std::set<std::string> lists;
  std::set<int64_t> numbers;
  for (const checkpoint::ParameterState& parameter : state.parameters) {
    const std::string& name = parameter.name;
    for (const char* list : {"layers.", "h.", "layer.", "blocks."}) {
      const size_t at = name.find(list);
      if (at == std::string::npos || (at > 0 && name[at - 1] != '.')) continue;
      const size_t begin = at + std::char_traits<char>::length(list);
      const std::string number = name.substr(begin, name.find('.', begin) - begin);
      if (!is_number(number) || number.size() > 6) continue;
      lists.insert(name.substr(0, begin));
      numbers.insert(std::stoll(number));
      break;
    }
  }
  return lists.size() == 1 ? static_cast<int64_t>(numbers.size()) : 0;
}

void tell_layers(Session* session, const ShardedState& state, const nlohmann::json& config) {
  const int64_t found = layers_in_names(state);
  for (const nlohmann::json& holder : {config, config.value("text_config", nlohmann::json())}) {
    for (const char* key : {"num_hidden_layers", "n_layer", "num_layers"}) {
      if (!holder.is_object() || !holder.contains(key) || !holder[key].is_number_integer())
        continue;
      if (found == 0 || holder[key] == found) return;
      session->notice("notice: config.json says " + std::string(key) + " " + holder[key].dump() +
                      ", the checkpoint has " + std::to_string(found) +
                      " layers: from_pretrained would leave what is missing at random");
      return;
    }
  }
}

void refuse_excluded(const ShardedState& state) {
  const bool zero =
      state.flavour == checkpoint::Flavour::kZero12 || state.flavour == checkpoint::Flavour::kZero3;
  if (!zero || state.stage < 2 || state.topology.pipeline > 1) return;
  if (checkpoint::read_model_states(state, state.model_files[0]).has_frozen_shapes) return;
  refuse(
      "The checkpoint was saved with exclude_frozen_parameters: frozen weights are not in it, "
      "and from_pretrained would leave them at random.",
      state.folder, "frozen_param_shapes: None", "--force goes on if the model has none");
}

// Of the tied names those that the config lets from_pretrained tie again are stored once, the
// others with bytes of their own.
void settle_ties(Session* session, ShardedState* state, const nlohmann::json& config) {
  const auto tied = [](const nlohmann::json& holder) {
    return holder.is_object() && holder.contains("tie_word_embeddings") &&
           holder["tie_word_embeddings"] == true;
  };
  const bool says = tied(config) || (config.contains("text_config") && tied(config["text_config"]));
  std::vector<std::string> apart;
  for (const checkpoint::Alias& alias : state->aliases) {
    const std::string both = alias.name + " " + alias.target;
    const bool head =
        both.find("lm_head") != std::string::npos || both.find("embed_out") != std::string::npos;
    if (!says || !head) apart.push_back(alias.name);
  }
  for (const std::string& name : apart)
    session->notice("notice: " + quote(name) +
                    " is tied, and config.json does not say so: it is written with bytes of its "
                    "own");
  checkpoint::untie(state, apart);
}

// The model's config and the folder it lies in; both empty with --no-config.
struct ModelFolder {
  std::string path;
  nlohmann::json config;
};

ModelFolder find_model(Session* session, const ExportFlags& flags, const ShardedState& state) {
  if (flags.no_config) return {};
  std::string folder = flags.config;
  if (folder.empty()) folder = checkpoint::folder_of_config(session->storage, state);
  if (folder.empty()) folder = checkpoint::parent_folder(state.folder);
  return {folder, checkpoint::read_model_config(session->storage, folder)};
}

std::string text_of(const nlohmann::json& config, const char* key) {
  const bool there = config.is_object() && config.contains(key) && config[key].is_string();
  return there ? config[key].get<std::string>() : "";
}

// What is no weight, under the names it has.
std::vector<checkpoint::FileBlueprint> side_blueprints(Session* session, const ModelFolder& model,
                                                       const std::string& dtypes,
                                                       ShardedState* state,
                                                       nlohmann::json* certificate) {
  const std::vector<std::string> names =
      checkpoint::side_files(session->storage, model.path, model.config);
  std::string list;
  for (const std::string& name : names) {
    list += (list.empty() ? "" : ", ") + name;
    (*certificate)["carried"].push_back(name);
  }
  session->say("carried      " + list);
  const char* key = model.config.contains("dtype") ? "dtype" : "torch_dtype";
  const std::string recorded = text_of(model.config, key);
  if (!recorded.empty() && dtypes.find(recorded) == std::string::npos) {
    session->notice("notice: config.json says " + std::string(key) + " " + quote(recorded) +
                    ", the weights are " + dtypes +
                    ": from_pretrained casts them unless it is given another dtype");
  }
  return checkpoint::copy_side_files(state, session->storage, model.path, names);
}

void tell_files(Session* session, const ShardedState& state, const ExportFlags& flags,
                nlohmann::json* certificate) {
  const bool optimizer = !state.optim_files.empty();
  const std::string text =
      std::to_string(state.files.size()) + " files opened, " +
      std::to_string(state.optim_files.size()) + " of the optimizer" +
      (optimizer && flags.dtype == "model" ? ", which holds the only weights there are" : "");
  session->say("source       " + text);
  (*certificate)["source"]["files_opened"] = state.files.size();
  (*certificate)["source"]["optimizer_files_opened"] = state.optim_files.size();
  if (!optimizer)
    (*certificate)["source"]["weights"] =
        "the model's own copies, in its dtype; not compared with "
        "the optimizer's masters";
}

// "bfloat16", or several.
std::string dtypes_of(const std::vector<checkpoint::FileBlueprint>& files) {
  std::set<std::string> names;
  for (const checkpoint::FileBlueprint& file : files) {
    for (const checkpoint::StorageFill& fill : file.storages) names.insert(name(fill.dtype));
  }
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

// --overwrite would exchange it whole.
void refuse_config_in_target(Session* session, const ExportFlags& flags) {
  if (!is_inside(session->storage.canonical(flags.config),
                 session->storage.canonical(flags.target)))
    return;
  throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                        .what = "The folder of the config is the target, or inside it.",
                        .file = flags.config,
                        .safe = "nothing was written",
                        .next = "name another target"});
}

void run_export(Session* session, const ExportFlags& flags) {
  if (flags.no_config && !flags.config.empty())
    throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                          .what = "--config and --no-config contradict each other."});
  refuse_overlap(session, flags.source, flags.target);
  if (!flags.config.empty()) refuse_config_in_target(session, flags);
  session->read.model_files_only = flags.dtype == "model";
  ShardedState state = open_to_convert(session, flags.source, flags.common);
  const ModelFolder model = find_model(session, flags, state);
  nlohmann::json certificate = source_certificate(state, flags.source);
  reshard::ConvertOptions options = conversion_options(session, flags.common, flags.target);
  refuse_doubtful(session, state, flags.common, &options);
  tell_files(session, state, flags, &certificate);
  if (state.expert_layout == checkpoint::ExpertLayout::kAutoEp) {
    const std::vector<std::string> renamed =
        checkpoint::name_experts_for_hf(&state, text_of(model.config, "model_type"));
    session->say("renamed      " + std::to_string(renamed.size()) +
                 " tensors of AutoEP layers, as the certificate lists");
    for (const std::string& text : renamed) certificate["renamed"].push_back(text);
  }
  if (!flags.common.force) refuse_excluded(state);
  if (!flags.no_config) {
    if (!flags.common.force) refuse_foreign_names(state);
    tell_layers(session, state, model.config);
    settle_ties(session, &state, model.config);
  }
  checkpoint::TargetFiles made = checkpoint::weights_blueprints(
      state, {.max_shard_bytes = checkpoint::parse_size(flags.max_shard_size),
              .model_dtype = flags.dtype == "model"});
  const std::string dtypes = dtypes_of(made.files);
  session->say("weights      " + dtypes);
  for (const std::string& text : made.skipped) certificate["skipped"].push_back(text);
  certificate["target"]["format"] = "Hugging Face model folder, " + dtypes;
  options.weights_only = true;
  certificate["buffers"] = nlohmann::json::array();
  for (const checkpoint::BufferState& buffer : state.buffers)
    certificate["buffers"].push_back(buffer.name);
  if (!flags.no_config) {
    std::vector<checkpoint::FileBlueprint> side =
        side_blueprints(session, model, dtypes, &state, &certificate);
    made.files.insert(made.files.end(), std::make_move_iterator(side.begin()),
                      std::make_move_iterator(side.end()));
  }
  options.certificate = std::move(certificate);
  finish_conversion(session, state, std::move(made.files), flags.common, &options);
}

}  // namespace

void add_export(CLI::App* app, Session* session) {
  auto flags = std::make_shared<ExportFlags>();
  CLI::App* verb =
      app->add_subcommand("export", "The model's weights as a folder that from_pretrained loads");
  verb->add_option("SOURCE", flags->source)->required();
  verb->add_option("TARGET", flags->target, "A folder")->required();
  verb->add_option("--to", flags->to)->check(CLI::IsMember({"hf"}))->capture_default_str();
  verb->add_option("--dtype", flags->dtype,
                   "model: as the model computes, at stages 0 to 2 without opening the optimizer's "
                   "files; fp32: the masters")
      ->check(CLI::IsMember({"model", "fp32"}))
      ->capture_default_str();
  verb->add_option("--config", flags->config,
                   "Folder with config.json and the tokenizer's files (default: beside the tag "
                   "folder, then in it)");
  verb->add_flag("--no-config", flags->no_config, "Weights alone");
  verb->add_option("--max-shard-size", flags->max_shard_size, "Size of one file")
      ->capture_default_str();
  add_conversion_flags(verb, &flags->common);
  add_source_flags(verb, session);
  verb->callback([session, flags] { run_export(session, *flags); });
}

}  // namespace isoshard::tools
