// See stage_plan.h.
#include "checkpoint/deepspeed/stage_plan.h"

#include <algorithm>
#include <functional>
#include <limits>

#include "checkpoint/cancel.h"
#include "checkpoint/deepspeed/pipeline.h"
#include "checkpoint/deepspeed/stage_rules.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

using Uses = TiedUses;

std::string list_text(const std::vector<int>& numbers) {
  constexpr size_t kMostShown = 40;
  std::string text;
  for (size_t i = 0; i < std::min(numbers.size(), kMostShown); ++i)
    text += (text.empty() ? "" : ",") + std::to_string(numbers[i]);
  if (numbers.size() > kMostShown) text += ",… (" + std::to_string(numbers.size()) + " numbers)";
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
  StagePlanner(const ShardedState& state, int stages, const StageOptions& options,
               const std::vector<AffineMap>& maps)
      : state_(state), stages_(stages), options_(options), maps_(maps) {
    for (int file : state.pipeline.layer_files) files_.insert(layer_of_file(state, file));
    last_ = files_.empty() ? 0 : *files_.rbegin();
    for (StageHolding& holding : stage_holdings(state)) {
      ranges_.emplace_back(std::numeric_limits<int>::max(), kNoLayer);
      if (!holding.layers.empty())
        ranges_.back() = {*holding.layers.begin(), *holding.layers.rbegin()};
      keys_.push_back(std::move(holding.keys));
    }
  }

  StagePlan run(std::vector<std::string>* inferred);

 private:
  const std::string& name(int number) const {
    return state_.parameters[static_cast<size_t>(number)].name;
  }
  void check_order() const;
  void check_options() const;
  std::set<std::string> all_keys() const;
  std::set<int> filed(const std::string& key) const;
  std::vector<int> sizes() const;
  void each_uses(int layers, const std::function<void(const Uses&)>& found) const;
  bool fits_source(const Uses& uses) const;
  bool fits_source(const Uses& uses, const std::vector<int>& parts) const;
  std::vector<std::set<int>> choices(const std::string& key, int layers) const;
  bool may_use(const std::string& key, int layer) const;
  int after(size_t stage) const;
  int before(size_t stage) const;
  void explain();
  [[noreturn]] void refuse_unexplained() const;
  void add(const std::vector<int>& parts, const Uses& uses, const std::string& why);
  StagePlan plan(const std::vector<int>& parts, const Uses& uses) const;

  const ShardedState& state_;
  const int stages_;
  const StageOptions& options_;
  const std::vector<AffineMap>& maps_;  // of the target
  std::set<int> files_;                 // layers that have one
  int last_ = 0;
  // By stage of the source: its first and last layer with parameters, and its tied modules.
  std::vector<std::pair<int, int>> ranges_;
  std::vector<std::set<std::string>> keys_;
  std::vector<Explanation> explanations_;  // that give different targets
  bool explained_uses_ = false;            // some way to use the tied modules is possible
};

// named_parameters() of a PipelineModule: tied modules first, then the layers. Only in this order
// is it known how the parameters of a new stage follow each other.
void StagePlanner::check_order() const {
  for (const std::vector<int>& held : state_.pipeline.held) {
    std::map<int, int> reached;  // layer by group
    for (int number : held) {
      const ParameterState& parameter = state_.parameters[static_cast<size_t>(number)];
      const int layer = layer_in_name(parameter.name);
      if (layer == kNoLayer && tied_key(parameter.name).empty())
        state_.refuse(ErrorCode::kUnsupported, "A parameter belongs to no layer of the pipeline.",
                      quote(parameter.name), "a layer's number, or tied_modules", parameter.name,
                      "keep pp=" + std::to_string(state_.topology.pipeline));
      const auto [at, fresh] = reached.emplace(parameter.group, layer);
      if (layer < at->second)
        state_.refuse(
            ErrorCode::kUnsupported,
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
    state_.refuse(ErrorCode::kUsage, "The stages are not said as the checkpoint has its layers.",
                  flag, expected, found,
                  "give what PipelineModule.parts and .layers of the target are");
  };
  if (!parts.empty()) {
    const bool rising = std::ranges::adjacent_find(parts, std::greater_equal()) == parts.end();
    if (static_cast<int>(parts.size()) != stages_ + 1 || parts[0] != 0 || !rising)
      at_fault("--pp-parts",
               std::to_string(stages_ + 1) + " rising numbers from 0, for pp=" +
                   std::to_string(stages_) + ", the last above layer " + std::to_string(last_),
               list_text(parts));
    if (parts.back() <= last_)
      at_fault("--pp-parts", "an end behind layer " + std::to_string(last_), list_text(parts));
    if (!options_.method.empty())
      at_fault("--partition-method", "--pp-parts alone, or the method alone", options_.method);
    if (options_.layers > 0 && options_.layers != parts.back())
      at_fault("--num-layers", std::to_string(parts.back()) + " as --pp-parts ends",
               std::to_string(options_.layers));
  }
  const int most = sizes().back();
  if (stages_ > most)
    state_.refuse(ErrorCode::kUnsupported, "There are more stages than layers.",
                  "pp=" + std::to_string(stages_), "at most " + std::to_string(most),
                  "the last layer with a file is " + std::to_string(last_), "take a smaller pp");
  if (options_.layers > 0 && options_.layers <= last_)
    at_fault("--num-layers", "more than " + std::to_string(last_) + ", the last layer with a file",
             std::to_string(options_.layers));
  for (const auto& [key, layers] : options_.tied) {
    const std::set<std::string> keys = all_keys();
    if (!keys.contains(key)) {
      std::string known = keys.empty() ? "none: no module is tied" : "";
      for (const std::string& one : keys) known += (known.empty() ? "" : ", ") + quote(one);
      at_fault("--tied-layers", "a key under tied_modules (" + known + ")", quote(key));
    }
    const std::set<int> shown = filed(key);
    for (int layer : shown) {
      if (!layers.contains(layer))
        at_fault("--tied-layers " + key,
                 "layer " + std::to_string(layer) + ", whose file holds it, among them",
                 list_text({layers.begin(), layers.end()}));
    }
    for (int layer : layers) {
      if (layer < 0 || (files_.contains(layer) && !shown.contains(layer)))
        at_fault("--tied-layers " + key, "layers without a file of another module",
                 std::to_string(layer));
    }
    if (!fits_source({{key, layers}}))
      at_fault("--tied-layers " + key, "layers of those stages of the source that hold it",
               list_text({layers.begin(), layers.end()}));
  }
}

std::set<std::string> StagePlanner::all_keys() const {
  std::set<std::string> keys;
  for (const std::set<std::string>& some : keys_) keys.insert(some.begin(), some.end());
  return keys;
}

// Layers whose file holds the tied module.
std::set<int> StagePlanner::filed(const std::string& key) const {
  const auto found = state_.pipeline.tied_layers.find(key);
  return found == state_.pipeline.tied_layers.end() ? std::set<int>() : found->second;
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

// Ways in which layers without a file may use the tied modules: as few as can be, any one, and as
// many as can be. What holds for these holds for all between.
void StagePlanner::each_uses(int layers, const std::function<void(const Uses&)>& found) const {
  std::vector<Uses> ways = {{}};
  for (const std::string& key : all_keys()) {
    std::vector<Uses> more;
    for (const std::set<int>& choice : choices(key, layers)) {
      if (choice.empty() || *choice.rbegin() >= layers || !fits_source({{key, choice}})) continue;
      for (const Uses& way : ways) {
        more.push_back(way);
        more.back()[key] = choice;
        if (more.size() > 256)
          state_.refuse(ErrorCode::kUsage, "Too many layers may use the tied modules.", quote(key),
                        "--tied-layers KEY=0,5", "many layers without a file",
                        "say which layers use them");
      }
    }
    ways = std::move(more);
  }
  for (const Uses& way : ways) {
    throw_if_cancelled();
    found(way);
  }
}

std::vector<std::set<int>> StagePlanner::choices(const std::string& key, int layers) const {
  if (const auto told = options_.tied.find(key); told != options_.tied.end()) return {told->second};
  const std::set<int> base = filed(key);
  std::vector<std::set<int>> result = {base};
  std::set<int> most = base;
  for (int layer = 0; layer < std::min(layers, kMostInferred); ++layer) {
    if (files_.contains(layer)) continue;
    result.push_back(base);
    result.back().insert(layer);
    if (may_use(key, layer)) most.insert(layer);
  }
  result.push_back(std::move(most));
  return result;
}

// A layer without a file: no stage that lacks the module must hold it, one that has it may.
bool StagePlanner::may_use(const std::string& key, int layer) const {
  bool found = false;
  for (size_t s = 0; s < ranges_.size(); ++s) {
    const auto& [first, last] = ranges_[s];
    if (!keys_[s].contains(key) && layer >= first && layer <= last) return false;
    found = found || (keys_[s].contains(key) && layer > after(s) && layer < before(s));
  }
  return found;
}

// Bounds of where a stage of the source can lie: the layers with parameters on its sides.
int StagePlanner::after(size_t stage) const {
  return stage == 0 ? kNoLayer : ranges_[stage - 1].second;
}
int StagePlanner::before(size_t stage) const {
  return stage + 1 < ranges_.size() && ranges_[stage + 1].second != kNoLayer
             ? ranges_[stage + 1].first
             : std::numeric_limits<int>::max();
}

// A stage of the source holds a tied module where a layer of it uses the module. Where a stage ends
// is known only up to the layers without parameters.
bool StagePlanner::fits_source(const Uses& uses) const {
  for (const auto& [key, layers] : uses) {
    for (size_t s = 0; s < ranges_.size(); ++s) {
      const auto may = [&](int layer) { return layer > after(s) && layer < before(s); };
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

void StagePlanner::explain() {
  const bool target_told = !options_.method.empty() && options_.layers > 0;
  for (int layers : sizes()) {
    each_uses(layers, [&](const Uses& uses) {
      explained_uses_ = true;
      if (!options_.parts.empty()) return add(options_.parts, uses, "as --pp-parts says");
      if (stages_ == 1) return add({0, layers}, uses, "one stage");
      for (const StageRule& rule : stage_rules(state_, layers, uses, options_.method, maps_)) {
        const std::string why =
            "partition_method " + rule.name + ", " + std::to_string(layers) + " layers, ";
        if (target_told)
          add(rule.target(stages_), uses, why + "as told");
        else if (fits_source(uses, rule.source(static_cast<int>(ranges_.size()))))
          add(rule.target(stages_), uses, why + "which gives the source's stages");
      }
    });
  }
}

void StagePlanner::add(const std::vector<int>& parts, const Uses& uses, const std::string& why) {
  if (explanations_.size() > 1) return;  // it is not certain, and these two are shown
  std::string text = why;
  for (const auto& [key, layers] : uses)
    text += ", " + quote(key) + " in layers " + list_text({layers.begin(), layers.end()});
  Explanation found{parts, text, plan(parts, uses)};
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
      if (const int layer = layer_in_name(of); layer != kNoLayer)
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

// What could not be explained, and what would help.
void StagePlanner::refuse_unexplained() const {
  const std::string target = "pp=" + std::to_string(stages_);
  const std::set<std::string> keys = all_keys();
  if (!explained_uses_ && !keys.empty())
    state_.refuse(
        ErrorCode::kUsage,
        "Which layers use a tied module is not known: no layer without a file of its own, among "
        "those that the flags leave, explains which stages of the source hold it.",
        target, "layers that use " + quote(*keys.begin()),
        sizes().size() > 1 ? "none that fits" : std::to_string(sizes()[0]) + " layers in all",
        "give --tied-layers KEY=0,5, and a number of layers above the last of them");
  const bool one = !options_.method.empty();
  state_.refuse(
      ErrorCode::kUsage, "Where the stages of the target end cannot be told from the source.",
      target, "a partition_method that gives the source's stages",
      (one ? options_.method + " does not" : "neither uniform nor parameters does") +
          (sizes()[0] > kMostInferred ? "; with so many layers uniform alone is tried" : ""),
      std::string("give --pp-parts (print(engine.module.parts) in the target's run)") +
          (one ? ", or --num-layers too: then the source's stages do not matter" : ""));
}

StagePlan StagePlanner::run(std::vector<std::string>* inferred) {
  check_options();
  const bool told = !options_.parts.empty() || !options_.method.empty() || options_.layers > 0 ||
                    !options_.tied.empty();
  if (!told && stages_ == static_cast<int>(state_.pipeline.held.size()))
    return {state_.pipeline.held, state_.pipeline.buffers};
  check_order();
  explain();
  if (explanations_.empty()) refuse_unexplained();
  const auto described = [](const Explanation& found) {
    return list_text(found.parts) + " (" + found.why + ")";
  };
  if (explanations_.size() > 1)
    state_.refuse(ErrorCode::kUsage,
                  "Where the stages end, no checkpoint records, and it is not certain.",
                  "pp=" + std::to_string(stages_), "one way to cut the layers",
                  described(explanations_[0]) + " and " + described(explanations_[1]),
                  "give --pp-parts as print(engine.module.parts) says in the target's run" +
                      std::string(all_keys().empty()
                                      ? ""
                                      : "; --tied-layers KEY=0,5 where a tied module is in doubt"));
  const Explanation& found = explanations_[0];
  for (size_t stage = 0; stage < found.plan.held.size(); ++stage) {
    if (found.plan.held[stage].empty())
      state_.refuse(
          ErrorCode::kUnsupported,
          "A pipeline stage would hold no element that is trained, which DeepSpeed cannot train.",
          "pp=" + std::to_string(stages_) + ", stage " + std::to_string(stage),
          "a trained parameter on every stage; the last layer with a file is " +
              std::to_string(last_),
          "stages " + described(found), "take a smaller pp, or other stages (--pp-parts)");
  }
  if (stages_ > 1 || told)
    inferred->push_back("layers of the stages: " + described(found) +
                        (options_.parts.empty() ? "; every other way that was found to explain the "
                                                  "source gives the same files"
                                                : ""));
  return found.plan;
}

}  // namespace

StagePlan plan_stages(const ShardedState& state, int stages, const StageOptions& options,
                      const std::vector<AffineMap>& maps, std::vector<std::string>* inferred) {
  return StagePlanner(state, stages, options, maps).run(inferred);
}

}  // namespace isoshard::checkpoint
