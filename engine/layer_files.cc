// See layer_files.h.
#include "engine/layer_files.h"

#include <map>

#include "checkpoint/deepspeed/pipeline.h"
#include "core/check.h"
#include "core/error.h"
#include "engine/pickled.h"
#include "engine/rank_reader.h"

namespace isoshard::engine {

std::pair<std::string, std::string> place_in_layers(const TrainedParameter& parameter) {
  const std::string& name = parameter.module_name;
  const int layer = checkpoint::layer_in_name(name);
  if (layer != checkpoint::kNoLayer) {
    return {checkpoint::layer_file_name(layer, 0, 1), name.substr(name.find('.') + 1)};
  }
  const std::string key = checkpoint::tied_key(name);
  CHECK(!key.empty(), name + " is of no layer");
  return {checkpoint::layer_file_name(0, 0, 1), name.substr(("tied_modules." + key + ".").size())};
}

std::vector<LayerPlace> layers_with_files(const TrainingState& state, const RankPlace& place) {
  std::vector<LayerPlace> layers;
  if (!state.pipeline_module) return layers;
  for (size_t i = 0; i < state.parameters.size(); ++i) {
    const int layer = checkpoint::layer_in_name(state.parameters[i].module_name);
    if (layer == checkpoint::kNoLayer && place.at.pipeline > 0) continue;
    const int number = layer == checkpoint::kNoLayer ? 0 : layer;
    if (layers.empty() || layers.back().layer != number) layers.push_back({number, {}});
    layers.back().parameters.push_back(static_cast<int>(i));
  }
  return layers;
}

void check_layers(Storage& storage, const std::string& folder, const TrainingState& state,
                  bool strict) {
  std::map<std::string, RankReader> files;
  for (const TrainedParameter& p : state.parameters) {
    const auto [name, local] = place_in_layers(p);
    RankReader& file = files.try_emplace(name, storage, folder + "/" + name).first->second;
    const checkpoint::Fields& fields = file.fields();
    if (!strict && fields.maybe(fields.root(), local) == checkpoint::kNoNode) continue;
    const Shape found = fields.tensor(file.need(fields.root(), local), local).shape;
    if (found == p.shape) continue;
    throw Error(ErrorInfo{.code = ErrorCode::kMismatch,
                          .what = "A layer of the checkpoint has another shape (DeepSpeed: "
                                  "RuntimeError, \"size mismatch\").",
                          .file = folder + "/" + name,
                          .entry = quote(p.module_name),
                          .expected = to_string(p.shape),
                          .found = to_string(found),
                          .next = "name the checkpoint of this model"});
  }
}

checkpoint::FileBlueprint layer_file(const TrainingState& state, const LayerPlace& layer,
                                     bool exclude_frozen) {
  checkpoint::TorchBuilder builder;
  std::vector<checkpoint::NodeId> items;
  std::string file;
  for (const int number : layer.parameters) {
    const TrainedParameter& p = state.parameters[static_cast<size_t>(number)];
    const auto [name, local] = place_in_layers(p);
    file = name;
    if (p.frozen() && exclude_frozen) continue;
    items.push_back(builder.pickle.string(local));
    items.push_back(builder.tensor(
        {.shape = p.shape, .storage = value_storage(&builder, p.values, state.dtype)}));
  }
  return builder.finish(file, builder.pickle.ordered_dict(std::move(items)));
}

}  // namespace isoshard::engine
