// See selection.h.
#include "reshard/selection.h"

#include <algorithm>
#include <charconv>
#include <optional>

#include "checkpoint/cancel.h"
#include "core/check.h"
#include "core/error.h"
#include "core/mutant.h"
#include "reshard/tensor_values.h"

namespace isoshard::reshard {
namespace {

using checkpoint::FileFragment;

constexpr int64_t kStepBytes = 1 << 20;

[[noreturn]] void refuse(const std::string& what, const Shape& shape, const std::string& found) {
  throw Error(
      ErrorInfo{.code = ErrorCode::kUsage,
                .what = what,
                .expected = "integers and ranges such as [2:4,0], for shape " + to_string(shape),
                .found = quote(found),
                .next = "quote the argument, so that the shell leaves the brackets alone"});
}

std::string trim(const std::string& text) {
  const size_t first = text.find_first_not_of(' ');
  if (first == std::string::npos) return "";
  return text.substr(first, text.find_last_not_of(' ') - first + 1);
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts = {""};
  for (const char c : text) {
    if (c == separator)
      parts.emplace_back();
    else
      parts.back() += c;
  }
  for (std::string& part : parts) part = trim(part);
  return parts;
}

std::optional<int64_t> parse_integer(const std::string& text) {
  int64_t value = 0;
  const auto [stop, failure] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (failure != std::errc() || stop != text.data() + text.size()) return std::nullopt;
  return value;
}

// One end of a range: cut to the dimension, negative from its end.
int64_t bound(const std::string& text, int64_t otherwise, int64_t size, const Shape& shape) {
  if (text.empty()) return otherwise;
  const std::optional<int64_t> value = parse_integer(text);
  if (!value) refuse("A selection cannot be read.", shape, text);
  return std::clamp<int64_t>(
      *value < 0 ? std::max(*value, -size) + size : *value + mutant("selection_end_included"), 0,
      size);
}

}  // namespace

Shape Selection::result_shape() const {
  Shape result;
  for (size_t i = 0; i < shape.size(); ++i) {
    if (!single[i]) result.push_back(end[i] - begin[i]);
  }
  return result;
}

int64_t Selection::count() const {
  int64_t count = 1;
  for (size_t i = 0; i < shape.size(); ++i) count *= end[i] - begin[i];
  return count;
}

Selection select_all(const Shape& shape) {
  return {shape, Shape(shape.size(), 0), shape, std::vector<bool>(shape.size(), false)};
}

Selection parse_selection(const std::string& text, const Shape& shape) {
  Selection selection = select_all(shape);
  const std::vector<std::string> parts = split(text, ',');
  if (parts.size() > shape.size()) refuse("A selection has too many dimensions.", shape, text);
  for (size_t i = 0; i < parts.size(); ++i) {
    const std::vector<std::string> ends = split(parts[i], ':');
    if (ends.size() > 2) refuse("Steps are not supported in a selection.", shape, parts[i]);
    if (ends.size() == 2) {
      selection.begin[i] = bound(ends[0], 0, shape[i], shape);
      selection.end[i] = std::max(selection.begin[i], bound(ends[1], shape[i], shape[i], shape));
      continue;
    }
    const std::optional<int64_t> index = parse_integer(ends[0]);
    if (!index) refuse("A selection cannot be read.", shape, parts[i]);
    if (*index >= shape[i] || *index < -shape[i]) {
      refuse("An index lies outside the tensor.", shape, parts[i]);
    }
    selection.begin[i] = *index < 0 ? *index + shape[i] : *index;
    selection.end[i] = selection.begin[i] + 1;
    selection.single[i] = true;
  }
  return selection;
}

void for_each_run(const Selection& selection, const std::function<void(ElementRun)>& visit) {
  if (selection.count() == 0) return;
  const Shape& shape = selection.shape;
  // Dimensions from `outer` on make up one run: all whole, but for the first of them.
  size_t outer = shape.size();
  int64_t inner = 1, run = 1, offset = 0;
  while (outer > 0 && run == inner) {
    --outer;
    run = inner * (selection.end[outer] - selection.begin[outer]);
    offset = inner * selection.begin[outer];
    inner *= shape[outer];
  }
  std::vector<int64_t> index(selection.begin.begin(),
                             selection.begin.begin() + static_cast<ptrdiff_t>(outer));
  while (true) {
    int64_t number = 0;
    for (size_t i = 0; i < outer; ++i) number = number * shape[i] + index[i];
    visit({number * inner + (mutant("selection_row_offset_lost") ? 0 : offset), run});
    size_t i = outer;
    while (i > 0 && ++index[i - 1] == selection.end[i - 1]) {
      index[i - 1] = selection.begin[i - 1];
      --i;
    }
    if (i == 0) return;
  }
}

void read_selection(const checkpoint::ShardedState& state, const checkpoint::Leaf& leaf,
                    const Selection& selection,
                    const std::function<void(std::span<const std::byte>)>& visit) {
  const int64_t item = item_size_bytes(leaf.dtype);
  std::vector<std::byte> buffer(static_cast<size_t>(kStepBytes / item * item));
  size_t filled = 0;
  for_each_run(selection, [&](ElementRun run) {
    while (run.count > 0) {
      const auto room = static_cast<int64_t>(buffer.size() - filled) / item;
      const int64_t count = std::min(room, run.count);
      const auto bytes = static_cast<size_t>(count * item);
      read_elements(state, leaf, run.begin, std::span(buffer).subspan(filled, bytes));
      filled += bytes;
      run.begin += count;
      run.count -= count;
      if (filled < buffer.size()) continue;
      checkpoint::throw_if_cancelled();
      visit(buffer);
      filled = 0;
    }
  });
  if (filled > 0) visit(std::span(buffer).first(filled));
}

SelectedFragments selected_fragments(const checkpoint::Leaf& leaf, const Selection& selection,
                                     size_t limit) {
  SelectedFragments result;
  const int64_t item = item_size_bytes(leaf.dtype);
  auto fragment = leaf.fragments.begin();
  for_each_run(selection, [&](ElementRun run) {
    const int64_t end = run.begin + run.count;
    while (run.begin < end) {
      while (fragment->begin + fragment->count <= run.begin) ++fragment;
      const int64_t skipped = run.begin - fragment->begin;
      const int64_t count = std::min(end - run.begin, fragment->count - skipped);
      if (result.first.size() < limit) {
        result.first.push_back(
            {run.begin, count, fragment->file, fragment->offset_bytes + skipped * item});
      }
      ++result.total;
      run.begin += count;
    }
  });
  return result;
}

}  // namespace isoshard::reshard
