// A source dictionary of which some values are replaced: see reshard_target.h.
#include <algorithm>

#include "checkpoint/deepspeed/reshard_target.h"

namespace isoshard::checkpoint {

MappingCopy::MappingCopy(TorchBuilder* builder, const ShardedState& state, NodeRef mapping)
    : builder_(*builder), document_(state.document(mapping.file)), file_(mapping.file) {
  const Pickle& pickle = document_.pickle();
  const std::vector<NodeId>& list = pickle.entries(mapping.node);
  for (size_t i = 0; i + 1 < list.size(); i += 2) {
    entries_.emplace_back(list[i], kNoNode);
    keys_.push_back(pickle.kind(list[i]) == Kind::kString ? pickle.text(list[i]) : "");
    values_.push_back(list[i + 1]);
  }
}

void MappingCopy::set(const std::string& key, NodeId value) {
  for (size_t i = 0; i < keys_.size(); ++i) {
    if (keys_[i] == key) {
      entries_[i].second = value;
      return;
    }
  }
  appended_.emplace_back(key, value);
}

void MappingCopy::set_after(const std::string& key, NodeId value, const std::string& neighbour) {
  const auto known = std::find(keys_.begin(), keys_.end(), key);
  const auto before = std::find(keys_.begin(), keys_.end(), neighbour);
  if (known != keys_.end() || before == keys_.end()) return set(key, value);
  const auto at = before - keys_.begin() + 1;
  keys_.insert(keys_.begin() + at, key);
  values_.insert(values_.begin() + at, kNoNode);
  entries_.insert(entries_.begin() + at, {kNoNode, value});
}

void MappingCopy::erase(const std::string& key) {
  const auto found = std::find(keys_.begin(), keys_.end(), key);
  if (found == keys_.end()) return;
  const auto at = found - keys_.begin();
  keys_.erase(found);
  values_.erase(values_.begin() + at);
  entries_.erase(entries_.begin() + at);
}

void MappingCopy::set_if_present(const std::string& key, NodeId value) {
  if (std::find(keys_.begin(), keys_.end(), key) != keys_.end()) set(key, value);
}

NodeId MappingCopy::finish() {
  std::vector<NodeId> items;
  for (size_t i = 0; i < entries_.size(); ++i) {
    items.push_back(entries_[i].first == kNoNode
                        ? builder_.pickle.string(keys_[i])
                        : builder_.copy(document_, file_, entries_[i].first));
    items.push_back(entries_[i].second != kNoNode ? entries_[i].second
                                                  : builder_.copy(document_, file_, values_[i]));
  }
  for (const auto& [key, value] : appended_) {
    items.push_back(builder_.pickle.string(key));
    items.push_back(value);
  }
  return builder_.pickle.dict(std::move(items));
}

}  // namespace isoshard::checkpoint
