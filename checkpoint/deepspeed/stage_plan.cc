// See stage_plan.h.
#include "checkpoint/deepspeed/stage_plan.h"

#include <algorithm>
#include <charconv>
#include <functional>
#include <limits>

#include "checkpoint/deepspeed/names.h"
#include "checkpoint/deepspeed/pipeline.h"
#include "core/error.h"
#include "core/pipeline_rules.h"

namespace isoshard::checkpoint {
namespace {

constexpr int kMostInferred = 1024;  // layers; the balanced rule takes the square of them
constexpr int kNoLayer = -1;         // of a tied module's parameter

using Uses = std::map<std::string, std::set<int>>;  // layers that use a tied module, by key

// 3 for "3.up.weight".
int layer_of(const std::string& name) {
  int layer = 0;
  const char* end = name.data() + name.size();
  const auto [rest, error] = std::from_chars(name.data(), end, layer);
  return error == std::errc() && rest != end && *rest == '.' ? layer : kNoLayer;
}

std::string list_text(const std::vector<int>& numbers) {
  std::string text;
  for (int number : numbers) text += (text.empty() ? "" : ",") + std::to_string(number);
  return text;
}

// A way to explain the source's stages, and what it makes of the target's.
struct Explanation {
  std::vector<int> parts;
  std::string why;
  StagePlan plan;
};

class StagePlanner {
 public:
  StagePlanner(const ShardedState& state, int stages, const StageOptions& options)
      : state_(state), stages_(stages), options_(options) {
    for (int file : state.pipeline.layer_files) {
      const std::string& name = state.files[static_cast<size_t>(file)].relative;
      files_.insert(static_cast<int>(layer_in_file_name(name).value_or(0)));
    }
    last_ = files_.empty() ? 0 : *files_.rbegin();
    for (const std::vector<int>& held : state.pipeline.held) {
      std::pair<int, int> range = {std::numeric_limits<int>::max(), kNoLayer};
      std::set<std::string> keys;
      for (int number : held) {
        const int layer = layer_of(name(number));
        if (layer == kNoLayer) keys.insert(tied_key(name(number)));
        if (layer == kNoLayer) continue;
        range = {std::min(range.first, layer), std::max(range.second, layer)};
      }
      ranges_.push_back(range);
      keys_.push_back(std::move(keys));
    }
  }

  StagePlan run(std::vector<std::string>* inferred);

 private:
  const std::string& name(int number) const {
    return state_.parameters[static_cast<size_t>(number)].name;
  }
  [[noreturn]] void refuse(ErrorCode code, const std::string& what, const std::string& entry,
                           const std::string& expected, const std::string& found,
                           const std::string& next) const;
  void check_order() const;
  void check_options() const;
  std::vector<int> sizes() const;
  void each_uses(int layers, const std::function<void(const Uses&)>& found) const;
  bool fits_source(const Uses& uses) const;
  bool fits_source(const Uses& uses, const std::vector<int>& parts) const;
  std::vector<int64_t> weights(int layers, const Uses& uses) const;
  void explain();
  void add(const std::vector<int>& parts, const Uses& uses, const std::string& why);
  StagePlan plan(const std::vector<int>& parts, const Uses& uses) const;

  const ShardedState& state_;
  const int stages_;
  const StageOptions& options_;
  std::set<int> files_;  // layers that have one
  int last_ = 0;
  // By stage of the source: its first and last layer with parameters, and its tied modules.
  std::vector<std::pair<int, int>> ranges_;
  std::vector<std::set<std::string>> keys_;
  std::vector<Explanation> explanations_;  // that give different targets
};

void StagePlanner::refuse(ErrorCode code, const std::string& what, const std::string& entry,
                          const std::string& expected, const std::string& found,
                          const std::string& next) const {
  throw Error(ErrorInfo{.code = code,
                        .what = what,
                        .file = state_.folder,
                        .entry = entry,
                        .expected = expected,
                        .found = found,
                        .next = next});
}

// named_parameters() of a PipelineModule: tied modules first, then the layers. Only in this order
// is it known how the parameters of a new stage follow each other.
void StagePlanner::check_order() const {
  for (const std::vector<int>& held : state_.pipeline.held) {
    std::map<int, int> reached;  // layer by group
    for (int number : held) {
      const ParameterState& parameter = state_.parameters[static_cast<size_t>(number)];
      const int layer = layer_of(parameter.name);
      if (layer == kNoLayer && tied_key(parameter.name).empty())
        refuse(ErrorCode::kUnsupported, "A parameter belongs to no layer of the pipeline.",
               quote(parameter.name), "a layer's number, or tied_modules", parameter.name,
               "keep pp=" + std::to_string(state_.topology.pipeline));
      const auto [at, fresh] = reached.emplace(parameter.group, layer);
      if (layer < at->second)
        refuse(ErrorCode::kUnsupported,
               "The optimizer's parameters do not stand in the order of the layers; the order of "
               "other stages is not known.",
               quote(parameter.name), "tied modules first, then layer by layer",
               "behind layer " + std::to_string(at->second),
               "keep pp=" + std::to_string(state_.topology.pipeline));
      at->second = layer;
    }
  }
}

void StagePlanner::check_options() const {
  const std::vector<int>& parts = options_.parts;
  const auto at_fault = [&](const std::string& flag, const std::string& expected,
                            const std::string& found) {
    refuse(ErrorCode::kUsage, "The stages are not said as the checkpoint has its layers.", flag,
           expected, found, "give what PipelineModule.parts and .layers of the target are");
  };
  if (!parts.empty()) {
    const bool rising = std::ranges::adjacent_find(parts, std::greater_equal()) == parts.end();
    if (static_cast<int>(parts.size()) != stages_ + 1 || parts[0] != 0 || !rising)
      at_fault(
          "--pp-parts",
          std::to_string(stages_ + 1) + " rising numbers from 0, for pp=" + std::to_string(stages_),
          list_text(parts));
    if (parts.back() <= last_)
      at_fault("--pp-parts", "an end behind layer " + std::to_string(last_), list_text(parts));
    if (options_.layers > 0 && options_.layers != parts.back())
      at_fault("--num-layers", std::to_string(parts.back()) + " as --pp-parts ends",
               std::to_string(options_.layers));
  }
  if (options_.layers > 0 && options_.layers <= last_)
    at_fault("--num-layers", "more than " + std::to_string(last_) + ", the last layer with a file",
             std::to_string(options_.layers));
  for (const auto& [key, layers] : options_.tied) {
    const auto known = [&](const std::set<std::string>& keys) { return keys.contains(key); };
    if (std::ranges::none_of(keys_, known))
      at_fault("--tied-layers", "a module under tied_modules", quote(key));
    const auto found = state_.pipeline.tied_layers.find(key);
    for (int layer : found == state_.pipeline.tied_layers.end() ? std::set<int>() : found->second) {
      if (!layers.contains(layer))
        at_fault("--tied-layers " + key,
                 "layer " + std::to_string(layer) + ", whose file holds it, among them",
                 list_text({layers.begin(), layers.end()}));
    }
    for (int layer : layers) {
      const bool own = files_.contains(layer) && (found == state_.pipeline.tied_layers.end() ||
                                                  !found->second.contains(layer));
      if (layer < 0 || own)
        at_fault("--tied-layers " + key, "layers without a file of another module",
                 std::to_string(layer));
    }
    if (!fits_source({{key, layers}}))
      at_fault("--tied-layers " + key, "layers of those stages of the source that hold it",
               list_text({layers.begin(), layers.end()}));
  }
}

// Numbers of layers that are possible: some at the end may have no file, and mostly none or one
// (a head tied to the embedding, a cast of the logits).
std::vector<int> StagePlanner::sizes() const {
  if (!options_.parts.empty()) return {options_.parts.back()};
  if (options_.layers > 0) return {options_.layers};
  int least = last_ + 1;
  for (const auto& [key, layers] : options_.tied)
    if (!layers.empty()) least = std::max(least, *layers.rbegin() + 1);
  return {least, least + 1, least + 2};
}

// Every way in which tied modules may be used by layers without a file: a module is used at least
// twice, and once in each stage that holds it.
void StagePlanner::each_uses(int layers, const std::function<void(const Uses&)>& found) const {
  std::vector<Uses> ways = {{}};
  std::set<std::string> keys;
  for (const std::set<std::string>& some : keys_) keys.insert(some.begin(), some.end());
  for (const std::string& key : keys) {
    const auto filed = state_.pipeline.tied_layers.find(key);
    const std::set<int> base =
        filed == state_.pipeline.tied_layers.end() ? std::set<int>() : filed->second;
    std::vector<std::set<int>> choices;
    if (const auto told = options_.tied.find(key); told != options_.tied.end()) {
      choices = {told->second};
    } else if (base.size() > 1 && fits_source({{key, base}})) {
      choices = {base};
    } else {
      for (int layer = 0; layer < std::min(layers, kMostInferred); ++layer) {
        if (files_.contains(layer)) continue;
        choices.push_back(base);
        choices.back().insert(layer);
      }
    }
    std::vector<Uses> more;
    for (const Uses& way : ways) {
      for (const std::set<int>& choice : choices) {
        if (choice.empty() || *choice.rbegin() >= layers || !fits_source({{key, choice}})) continue;
        more.push_back(way);
        more.back()[key] = choice;
      }
    }
    ways = std::move(more);
    if (ways.size() > 256)
      refuse(ErrorCode::kUsage, "Too many layers may use the tied modules.", quote(key),
             "--tied-layers KEY=0,5", "many layers without a file", "say which layers use them");
  }
  for (const Uses& way : ways) found(way);
}

// A stage of the source holds a tied module where a layer of it uses the module. Where a stage ends
// is known only up to the layers without parameters.
bool StagePlanner::fits_source(const Uses& uses) const {
  for (const auto& [key, layers] : uses) {
    for (size_t s = 0; s < ranges_.size(); ++s) {
      const int after = s == 0 ? kNoLayer : ranges_[s - 1].second;
      const int before = s + 1 < ranges_.size() && ranges_[s + 1].second != kNoLayer
                             ? ranges_[s + 1].first
                             : std::numeric_limits<int>::max();
      const auto may = [&](int layer) { return layer > after && layer < before; };
      const auto must = [&](int layer) {
        return layer >= ranges_[s].first && layer <= ranges_[s].second;
      };
      const bool holds = keys_[s].contains(key);
      if (holds ? std::ranges::none_of(layers, may) : std::ranges::any_of(layers, must))
        return false;
    }
  }
  return true;
}

// The same for stages whose ends are known.
bool StagePlanner::fits_source(const Uses& uses, const std::vector<int>& parts) const {
  for (size_t s = 0; s < ranges_.size(); ++s) {
    const auto inside = [&](int layer) { return layer >= parts[s] && layer < parts[s + 1]; };
    if (ranges_[s].second != kNoLayer && (!inside(ranges_[s].first) || !inside(ranges_[s].second)))
      return false;
    for (const auto& [key, layers] : uses) {
      if (std::ranges::any_of(layers, inside) != keys_[s].contains(key)) return false;
    }
  }
  return true;
}

// Trained elements of each layer; those of a tied module count in each layer that uses it.
std::vector<int64_t> StagePlanner::weights(int layers, const Uses& uses) const {
  std::vector<int64_t> result(static_cast<size_t>(layers), 0);
  for (const ParameterState& parameter : state_.parameters) {
    if (parameter.group < 0) continue;
    const int64_t count = numel(parameter.shape);
    if (const int layer = layer_of(parameter.name); layer != kNoLayer && layer < layers)
      result[static_cast<size_t>(layer)] += count;
    const auto tied = uses.find(tied_key(parameter.name));
    if (tied == uses.end()) continue;
    for (int layer : tied->second) result[static_cast<size_t>(layer)] += count;
  }
  return result;
}

void StagePlanner::explain() {
  for (int layers : sizes()) {
    each_uses(layers, [&](const Uses& uses) {
      if (!options_.parts.empty()) return add(options_.parts, uses, "--pp-parts");
      if (stages_ == 1) return add({0, layers}, uses, "one stage");
      if (layers > kMostInferred) return;
      for (const char* method : {"uniform", "parameters"}) {
        if (!options_.method.empty() && options_.method != method) continue;
        const auto parts_of = [&](int stages) {
          return method == std::string("uniform") ? uniform_parts(layers, stages)
                                                  : balanced_parts(weights(layers, uses), stages);
        };
        const bool target_told = !options_.method.empty() && options_.layers > 0;
        if (!target_told && !fits_source(uses, parts_of(static_cast<int>(ranges_.size()))))
          continue;  // the source's run may have had another rule, if the target's is told in full
        add(parts_of(stages_), uses,
            std::string("partition_method ") + method + ", " + std::to_string(layers) + " layers");
      }
    });
  }
}

void StagePlanner::add(const std::vector<int>& parts, const Uses& uses, const std::string& why) {
  Explanation found{parts, why, plan(parts, uses)};
  const bool known = std::ranges::any_of(
      explanations_, [&](const Explanation& other) { return other.plan == found.plan; });
  if (!known) explanations_.push_back(std::move(found));
}

StagePlan StagePlanner::plan(const std::vector<int>& parts, const Uses& uses) const {
  StagePlan result;
  for (size_t s = 0; s + 1 < parts.size(); ++s) {
    const auto inside = [&](int layer) { return layer >= parts[s] && layer < parts[s + 1]; };
    // Where a name stands in the stage: tied modules by their first use, then layers; or nowhere.
    const auto place = [&](const std::string& of) -> std::pair<int, int> {
      if (const int layer = layer_of(of); layer != kNoLayer)
        return inside(layer) ? std::pair(1, layer) : std::pair(-1, 0);
      const auto tied = uses.find(tied_key(of));
      if (tied == uses.end()) return {-1, 0};
      const auto first = std::ranges::find_if(tied->second, inside);
      return first == tied->second.end() ? std::pair(-1, 0) : std::pair(0, *first);
    };
    std::vector<int>& held = result.held.emplace_back();
    for (const GroupState& group : state_.groups) {
      const auto begin = static_cast<std::ptrdiff_t>(held.size());
      for (int number : group.parameters)
        if (place(name(number)).first >= 0) held.push_back(number);
      std::stable_sort(held.begin() + begin, held.end(),
                       [&](int a, int b) { return place(name(a)) < place(name(b)); });
    }
    std::vector<std::string>& buffers = result.buffers.emplace_back();
    for (const std::vector<std::string>& of_stage : state_.pipeline.buffers) {
      for (const std::string& buffer : of_stage) {
        const bool known = std::ranges::find(buffers, buffer) != buffers.end();
        if (!known && place(buffer).first >= 0) buffers.push_back(buffer);
      }
    }
    std::ranges::stable_sort(
        buffers, [&](const std::string& a, const std::string& b) { return place(a) < place(b); });
  }
  return result;
}

StagePlan StagePlanner::run(std::vector<std::string>* inferred) {
  check_options();
  const bool told = !options_.parts.empty() || !options_.method.empty() || options_.layers > 0 ||
                    !options_.tied.empty();
  if (!told && stages_ == static_cast<int>(state_.pipeline.held.size()))
    return {state_.pipeline.held, state_.pipeline.buffers};
  check_order();
  explain();
  const std::string next =
      "give --pp-parts, as PipelineModule.parts of the target is, or --partition-method with "
      "--num-layers; and --tied-layers KEY=0,5 for a TiedLayerSpec of several stages";
  const std::string target = "pp=" + std::to_string(stages_);
  if (explanations_.empty())
    refuse(ErrorCode::kUsage, "No rule of PipelineModule explains the source's stages.", target,
           "the layers of each stage", "none that fits", next);
  if (explanations_.size() > 1)
    refuse(ErrorCode::kUsage, "Where the stages end, no checkpoint records, and it is not certain.",
           target, "one way to cut the layers",
           list_text(explanations_[0].parts) + " (" + explanations_[0].why + ") and " +
               list_text(explanations_[1].parts) + " (" + explanations_[1].why + ")",
           next);
  const Explanation& found = explanations_[0];
  if (options_.parts.empty() && stages_ > 1)
    inferred->push_back("layers of the stages: " + list_text(found.parts) + ", by " + found.why +
                        ", which explains the source's too");
  return found.plan;
}

}  // namespace

StagePlan plan_stages(const ShardedState& state, int stages, const StageOptions& options,
                      std::vector<std::string>* inferred) {
  return StagePlanner(state, stages, options).run(inferred);
}

}  // namespace isoshard::checkpoint
