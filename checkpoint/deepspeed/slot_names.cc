// See slot_names.h.
#include "checkpoint/deepspeed/slot_names.h"

#include <algorithm>

#include "core/cast.h"

namespace isoshard::checkpoint {
namespace {

template <typename Item>
std::string describe_all(const std::vector<Item>& items) {
  std::string text = std::to_string(items.size()) + " in all";
  for (size_t i = 0; i < items.size() && i < 10; ++i) text += ", " + describe(items[i]);
  return items.size() > 10 ? text + ", …" : text;
}

}  // namespace

std::string describe(const Slot& slot) {
  return "group " + std::to_string(slot.group) + " slot " + std::to_string(slot.index_local) + " " +
         (slot.shape ? to_string(*slot.shape) : "(shape unknown)");
}

std::string describe(const ModuleEntry& entry) {
  return quote(entry.local_name) + " " + to_string(entry.leaf.shape);
}

SlotNames::SlotNames(const ShardedState& state, int file, std::vector<Slot>* slots,
                     const std::vector<ModuleEntry>& entries,
                     std::vector<std::vector<size_t>> orders)
    : state_(state), file_(file), slots_(*slots), entries_(entries), orders_(std::move(orders)) {
  for (const Slot& slot : slots_) {
    group_sizes_.resize(std::max(group_sizes_.size(), slot.group + 1));
    ++group_sizes_[slot.group];
    family_sizes_.resize(std::max(family_sizes_.size(), slot.family + 1));
    ++family_sizes_[slot.family];
    has_masters_ = has_masters_ || slot.master.has_value();
  }
}

void SlotNames::refuse(ErrorCode code, const std::string& what, const std::string& entry,
                       const std::string& expected, const std::string& found) const {
  throw Error(ErrorInfo{.code = code,
                        .what = what,
                        .file = state_.document(file_).path(),
                        .entry = entry,
                        .expected = expected,
                        .found = found,
                        .next = code == ErrorCode::kUnsupported
                                    ? "`isoshard help` lists what this version reads"
                                    : "say the order with --param-order FILE: one parameter name a "
                                      "line in the order of the optimizer's state, a blank line "
                                      "between groups; with it --force goes on from the masters"});
}

const std::optional<Difference>& SlotNames::difference(size_t slot, size_t entry) {
  const auto [found, fresh] = differences_.try_emplace({slot, entry});
  if (!fresh) return found->second;
  const TensorView& master = *slots_[slot].master;
  const Leaf& module = entries_[entry].leaf;
  if (!can_cast(master.dtype, module.dtype)) {
    refuse(ErrorCode::kUnsupported, "A master cannot be cast to its parameter's dtype.",
           quote(module.name), name(module.dtype), name(master.dtype));
  }
  const Leaf leaf = file_leaf(state_.document(file_), file_, master, module.name, "fp32");
  found->second = compare(state_, leaf, module);
  return found->second;
}

SlotNames::Search SlotNames::search(const std::vector<size_t>& sizes, bool values,
                                    bool empty_ones) {
  Search result;
  for (const std::vector<size_t>& order : orders_) {
    std::vector<size_t> candidates;
    for (size_t entry : order) {
      if (empty_ones || numel(entries_[entry].leaf.shape) > 0) candidates.push_back(entry);
    }
    const OrderSearch found(sizes, candidates.size(), [&, values](size_t slot, size_t candidate) {
      const size_t entry = candidates[candidate];
      return fits(slots_[slot], entries_[entry]) && (!values || !difference(slot, entry));
    });
    result.too_many = result.too_many || found.too_many;
    if (&order == &orders_.front()) result.stuck = found.stuck;
    for (OrderSearch::Order way : found.orders) {
      for (size_t& place : way) place = candidates[place];
      if (std::ranges::find(result.ways, way) != result.ways.end()) continue;
      result.ways.push_back(std::move(way));
      result.order = static_cast<size_t>(&order - orders_.data());
    }
  }
  return result;
}

SlotNames::Search SlotNames::find_ways(const std::vector<size_t>& sizes, bool* values) {
  Search result;
  bool with_empty = false;
  *values = false;
  // Entries without elements are owned by a plain torch optimizer, and in older DeepSpeed.
  for (const bool empty_ones : {false, true}) {
    with_empty = empty_ones;
    result = search(sizes, /*values=*/false, empty_ones);
    if (result.too_many || !result.ways.empty()) break;
  }
  if (has_masters_ && (result.too_many || result.ways.size() > 1)) {
    *values = true;
    result = search(sizes, /*values=*/true, with_empty);
  }
  return result;
}

// Values decide only where shapes do not: reading them takes time.
std::string SlotNames::infer() {
  bool values = false, families = false;
  Search result = find_ways(group_sizes_, &values);
  if (family_sizes_ != group_sizes_ && (result.too_many || result.ways.size() > 1)) {
    families = true;
    result = find_ways(family_sizes_, &values);
  }
  if (result.too_many || result.ways.size() != 1) explain(result, values);
  size_t unknown = 0;
  for (size_t slot = 0; slot < slots_.size(); ++slot) {
    slots_[slot].entry = result.ways[0][slot];
    if (!slots_[slot].shape) ++unknown;
  }
  std::string evidence =
      result.order == 0 ? "registration order" : "registration order, what AutoEP replaced last";
  evidence += values ? ", and the only assignment that fits the masters' values"
                     : ", and the only assignment that fits the shapes";
  if (families) evidence += "; groups of experts split by max_group_size are one sequence";
  if (unknown > 0 && !values)
    evidence += " (" + std::to_string(unknown) + " slots have none: never stepped)";
  return evidence;
}

void SlotNames::explain(const Search& result, bool values) const {
  const std::string law = values ? "the shapes and the masters' values" : "the shapes";
  std::string what = "The optimizer's state names no parameters, and ";
  if (result.too_many) {
    what += "there are too many assignments that fit " + law + ".";
  } else if (result.stuck) {
    what += describe(slots_[*result.stuck]) + " has no place in registration order by " + law + ".";
  } else if (result.ways.empty()) {
    what += "no assignment in registration order fits " + law + ".";
  } else {
    const auto [a, b] = std::ranges::mismatch(result.ways[0], result.ways[1]);
    const Slot& slot = slots_[static_cast<size_t>(a - result.ways[0].begin())];
    what += "several assignments fit " + law + ": " + describe(slot) + " may be " +
            quote(entries_[*a].local_name) + " or " + quote(entries_[*b].local_name) + ".";
  }
  refuse(ErrorCode::kMismatch, what, "optimizer",
         "one way to name the optimizer's slots, " + describe_all(slots_),
         "module entries, " + describe_all(entries_));
}

// Names, groups and shapes are checked here, values by prove().
void SlotNames::take_order(const std::string& path, const std::string& text) {
  std::vector<std::string> names;
  std::string expected, found;  // sizes of the groups
  size_t begin_of_group = 0;
  const auto end_group = [&] {
    if (names.size() > begin_of_group) found += std::to_string(names.size() - begin_of_group) + " ";
    begin_of_group = names.size();
  };
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    std::string line = text.substr(begin, end - begin);
    if (!line.empty() && line.back() == '\r') line.pop_back();
    line.empty() ? end_group() : names.push_back(line);
    begin = end + 1;
  }
  end_group();
  for (size_t size : group_sizes_) expected += size == 0 ? "" : std::to_string(size) + " ";
  if (expected != found) {
    refuse(ErrorCode::kMismatch, "The order has other groups than the optimizer.", path,
           "names by group: " + expected, found);
  }
  std::map<std::string, size_t> numbers;
  for (size_t i = 0; i < entries_.size(); ++i) numbers.emplace(entries_[i].local_name, i);
  for (size_t i = 0; i < slots_.size(); ++i) {
    const auto number = numbers.find(names[i]);
    if (number == numbers.end()) {
      refuse(ErrorCode::kMismatch, "The order has a name that is no parameter, or has it twice.",
             path, "module entries, " + describe_all(entries_), quote(names[i]));
    }
    slots_[i].entry = number->second;
    numbers.erase(number);
    const ModuleEntry& entry = entries_[slots_[i].entry];
    if (fits(slots_[i], entry)) continue;
    refuse(ErrorCode::kMismatch,
           "The order names a parameter of another shape, or an expert in another group.", path,
           describe(slots_[i]), describe(entry));
  }
}

void SlotNames::prove() {
  for (size_t i = 0; i < slots_.size(); ++i) {
    const Leaf& entry = entries_[slots_[i].entry].leaf;
    const std::optional<Difference>& wrong = difference(i, slots_[i].entry);
    if (!wrong) continue;
    refuse(ErrorCode::kMismatch,
           "A parameter's master does not agree with the module: the order is another, or bytes "
           "are damaged.",
           quote(entry.name) + " element " + std::to_string(wrong->element),
           "bits " + wrong->expected + ", the master (" + describe(slots_[i]) + ") cast to " +
               name(entry.dtype),
           "bits " + wrong->found);
  }
}

}  // namespace isoshard::checkpoint
