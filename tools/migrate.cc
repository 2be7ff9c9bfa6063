// isoshard migrate: native MoE to AutoEP by a map of names, proven equal before it appears.
#include "checkpoint/deepspeed/expert_groups.h"
#include "checkpoint/deepspeed/migration.h"
#include "checkpoint/deepspeed/source.h"
#include "core/error.h"
#include "tools/conversion.h"
#include "tools/session.h"

namespace isoshard::tools {
namespace {

struct MigrateFlags {
  std::string source, target, to = "autoep", names;
  int64_t moe_max_group_size = checkpoint::kMoeMaxGroupSize;
  ConversionFlags common;
};

void run_migrate(Session* session, const MigrateFlags& flags) {
  refuse_overlap(session, flags.source, flags.target);
  checkpoint::NameMap names(read_small_file(session->storage, flags.names, 1 << 20), flags.names);
  checkpoint::ShardedState state = open_to_convert(session, flags.source, flags.common);
  nlohmann::json certificate = source_certificate(state, flags.source);
  reshard::ConvertOptions options = conversion_options(session, flags.common, flags.target);
  refuse_doubtful(session, state, flags.common, &options);
  const checkpoint::Migration migration =
      checkpoint::migrate_to_autoep(&state, &names, flags.moe_max_group_size);
  session->say("layers       " + std::to_string(migration.layers.size()) + " of " +
               std::to_string(migration.layers.at(0).experts) + " experts, " +
               std::to_string(migration.renamed.size()) +
               " names changed, as the certificate lists");
  for (const std::string& text : migration.renamed) certificate["renamed"].push_back(text);
  certificate["target"]["format"] = "universal (ZeRO-1/2 form), AutoEP";
  certificate["synthesised"] = {
      "ds_autoep_layers, universal_checkpoint_info: from the map of names and the recorded "
      "topology"};
  point_latest_universal(flags.common, flags.target, &options);
  options.certificate = std::move(certificate);
  checkpoint::TargetFiles files = checkpoint::migration_blueprints(state, migration);
  finish_conversion(session, state, std::move(files.files), flags.common, &options);
}

}  // namespace

void add_migrate(CLI::App* app, Session* session) {
  auto flags = std::make_shared<MigrateFlags>();
  CLI::App* verb = app->add_subcommand(
      "migrate", "Native MoE to AutoEP: experts stacked, with moments, in the universal form");
  verb->add_option("SOURCE", flags->source)->required();
  verb->add_option("TARGET", flags->target,
                   "The universal folder itself; isoshard reshard makes ZeRO files of it")
      ->required();
  verb->add_option("--to", flags->to)->check(CLI::IsMember({"autoep"}))->capture_default_str();
  verb->add_option("--names", flags->names,
                   "JSON file: which names become which (docs/formats/parallel.md)")
      ->required();
  verb->add_option("--moe-max-group-size", flags->moe_max_group_size,
                   "Elements of a rank by which the run splits its groups of experts")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 50))
      ->capture_default_str();
  add_conversion_flags(verb, &flags->common);
  add_source_flags(verb, session);
  verb->callback([session, flags] { run_migrate(session, *flags); });
}

}  // namespace isoshard::tools
