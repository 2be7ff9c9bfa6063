// See flat_picture.h. Lengths are pixels; positions in buffers are elements.
#include "reshard/flat_picture.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <vector>

#include "core/error.h"
#include "core/zero_rules.h"
#include "reshard/tensor_values.h"

namespace isoshard::reshard {

using checkpoint::Flavour;
using checkpoint::GroupState;
using checkpoint::ParameterState;
using checkpoint::ShardedState;

namespace {

constexpr double kWidth = 1200, kMargin = 20, kBarWidth = kWidth - 2 * kMargin;
constexpr double kBarHeight = 46, kBetween = 84, kGroupTop = 84, kLegendRow = 20;
constexpr size_t kLegendRows = 80;  // parameters named below a group

// Where one parameter stands, by both readings.
struct Slot {
  std::string name;
  int64_t count = 0;
  int64_t saved = 0, believed = 0;  // begin in the flat buffer
  std::string colour;
};

struct FlatGroup {
  std::vector<Slot> slots;  // in the order of the flat buffer
  int64_t flat = 0;         // length with all padding
  int64_t partition = 0;    // of a rank
};

std::string number(double value) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%.2f", value);
  return buffer;
}

std::string escape(const std::string& text) {
  std::string result;
  for (char c : text) {
    if (c == '&')
      result += "&amp;";
    else if (c == '<')
      result += "&lt;";
    else if (c == '>')
      result += "&gt;";
    else if (c == '"')
      result += "&quot;";
    else
      result += c;
  }
  return result;
}

// Hues a golden angle apart, so that neighbours differ; pale enough for black text.
std::string colour_of(size_t index) {
  const double hue = std::fmod(static_cast<double>(index) * 137.508 + 200.0, 360.0) / 60.0;
  const double lightness = index % 2 == 0 ? 0.74 : 0.82, chroma = (1 - lightness) * 1.3;
  std::string text = "#";
  for (const double shift : {5.0, 3.0, 1.0}) {  // red, green, blue
    const double k = std::fmod(shift + hue, 6.0);
    const double value =
        lightness + chroma / 2 - chroma * std::clamp(std::min(k, 4.0 - k), 0.0, 1.0);
    char buffer[3];
    std::snprintf(buffer, sizeof buffer, "%02x",
                  static_cast<int>(std::clamp(value, 0.0, 1.0) * 255.0 + 0.5));
    text += buffer;
  }
  return text;
}

// Where each fragment of the group stands in its rank's partition tells the gaps between
// parameters.
std::vector<int64_t> gaps_before(const ShardedState& state, const GroupState& group) {
  std::vector<int64_t> gaps;
  int file = -1;
  int64_t end_bytes = 0;
  for (int parameter : group.flat_order) {
    const checkpoint::Leaf& leaf =
        state.leaf(state.parameters[static_cast<size_t>(parameter)].weight);
    const int64_t item = item_size_bytes(leaf.dtype);
    int64_t gap = 0;
    for (const checkpoint::FileFragment& fragment : leaf.fragments) {
      if (fragment.begin == 0 && fragment.file == file) {
        gap = std::max<int64_t>(0, (fragment.offset_bytes - end_bytes) / item);
      }
      file = fragment.file;
      end_bytes = fragment.offset_bytes + fragment.count * item;
    }
    gaps.push_back(gap);
  }
  return gaps;
}

FlatGroup flat_group(const ShardedState& state, const GroupState& group) {
  FlatGroup result;
  const std::vector<int64_t> gaps = gaps_before(state, group);
  std::map<int, size_t> slot_of;
  int64_t at = 0;
  for (size_t i = 0; i < group.flat_order.size(); ++i) {
    const ParameterState& parameter = state.parameters[static_cast<size_t>(group.flat_order[i])];
    at += gaps[i];
    slot_of[group.flat_order[i]] = i;
    result.slots.push_back({parameter.name, numel(parameter.shape), at, at, colour_of(i)});
    at += numel(parameter.shape);
  }
  const int ranks = static_cast<int>(state.optim_files.size());
  const FlatSizes sizes = flat_sizes(at, ranks);
  result.flat = std::max<int64_t>(sizes.flat, 1);
  result.partition = sizes.partition;
  if (!state.round_robin) return result;
  int64_t believed = 0;
  for (int parameter : group.parameters) {
    Slot& slot = result.slots[slot_of[parameter]];
    slot.believed = believed;
    believed += slot.count;
  }
  return result;
}

class Picture {
 public:
  explicit Picture(const ShardedState& state) : state_(state) {}

  std::string run() {
    std::string body;
    double y = 76;
    for (size_t i = 0; i < state_.groups.size(); ++i) {
      y = draw_group(flat_group(state_, state_.groups[i]), i, y);
    }
    body.swap(text_);
    const double height = y + 4;
    std::string head =
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 " + number(kWidth) + " " +
        number(height) + "\" width=\"" + number(kWidth) + "\" height=\"" + number(height) +
        "\" font-family=\"DejaVu Sans, Helvetica, Arial, sans-serif\" font-size=\"12\">\n"
        "<defs><pattern id=\"pad\" width=\"6\" height=\"6\" patternUnits=\"userSpaceOnUse\" "
        "patternTransform=\"rotate(45)\"><rect width=\"6\" height=\"6\" fill=\"#f2f2f2\"/>"
        "<rect width=\"2\" height=\"6\" fill=\"#bbbbbb\"/></pattern></defs>\n"
        "<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n";
    text_ = std::move(head);
    write({kMargin, 30},
          state_.round_robin ? "A flat buffer under round_robin_gradients, read twice"
                             : "A flat buffer of ZeRO stage 1 or 2",
          "font-size=\"18\" font-weight=\"bold\"");
    write({kMargin, 52}, summary(), "fill=\"#444444\"");
    return text_ + body + "</svg>\n";
  }

 private:
  struct Point {
    double x, y;
  };

  void write(Point at, const std::string& text, const std::string& style) {
    text_ += "<text x=\"" + number(at.x) + "\" y=\"" + number(at.y) + "\" " + style + ">" +
             escape(text) + "</text>\n";
  }
  void box(Point at, Point size, const std::string& style) {
    text_ += "<rect x=\"" + number(at.x) + "\" y=\"" + number(at.y) + "\" width=\"" +
             number(size.x) + "\" height=\"" + number(size.y) + "\" " + style + "/>\n";
  }
  static double x_of(const FlatGroup& group, int64_t element) {
    return kMargin + kBarWidth * static_cast<double>(element) / static_cast<double>(group.flat);
  }

  std::string summary() const {
    std::string text = "tag " + plain_name(state_.tag) + ", " + checkpoint::name(state_.flavour) +
                       ", " + std::to_string(state_.optim_files.size()) + " ranks. ";
    if (!state_.round_robin) return text + "The converter reads each parameter where it was saved.";
    return text +
           "DeepSpeed's converter cuts this buffer by the optimizer's order: each piece gets "
           "the name written in the lower bar.";
  }

  double draw_group(const FlatGroup& group, size_t index, double y) {
    int moved = 0;
    for (const Slot& slot : group.slots) moved += slot.saved != slot.believed;
    std::string title = "group " + std::to_string(index) + ": " +
                        std::to_string(group.slots.size()) + " parameters, " +
                        std::to_string(group.flat) + " elements with padding, " +
                        std::to_string(group.partition) + " a rank";
    if (moved > 0) title += "; " + std::to_string(moved) + " are read from a wrong place";
    write({kMargin, y + 22}, title, "font-size=\"14\" font-weight=\"bold\"");
    const double upper = y + kGroupTop, lower = upper + kBarHeight + kBetween;
    draw_links(group, upper + kBarHeight, lower);
    draw_bar(group, upper, &Slot::saved);
    draw_bar(group, lower, &Slot::believed);
    draw_ranks(group, upper, lower + kBarHeight);
    write({kMargin, upper - 26}, "what was saved (order of the flat buffer)", "");
    write({kMargin, lower + kBarHeight + 18},
          "what the converter believed (optimizer's order); a number is the parameter's row below",
          "");
    return draw_legend(group, lower + kBarHeight + 34);
  }

  void draw_links(const FlatGroup& group, double top, double bottom) {
    for (const Slot& slot : group.slots) {
      const double a = x_of(group, slot.saved), b = x_of(group, slot.saved + slot.count);
      const double c = x_of(group, slot.believed + slot.count), d = x_of(group, slot.believed);
      text_ += "<polygon points=\"" + number(a) + "," + number(top) + " " + number(b) + "," +
               number(top) + " " + number(c) + "," + number(bottom) + " " + number(d) + "," +
               number(bottom) + "\" fill=\"" + slot.colour + "\" fill-opacity=\"0.45\"/>\n";
    }
  }

  void draw_ranks(const FlatGroup& group, double top, double bottom) {
    const auto ranks = static_cast<int64_t>(state_.optim_files.size());
    for (int64_t rank = 0; rank <= ranks; ++rank) {
      const double x = x_of(group, rank * group.partition);
      text_ += "<line x1=\"" + number(x) + "\" y1=\"" + number(top - 18) + "\" x2=\"" + number(x) +
               "\" y2=\"" + number(bottom + 4) +
               "\" stroke=\"#222222\" stroke-width=\"1.2\" stroke-dasharray=\"4 3\"/>\n";
      if (rank < ranks && ranks <= 64) {
        write({x + 4, top - 6}, "rank " + std::to_string(rank), "fill=\"#222222\"");
      }
    }
  }

  void draw_bar(const FlatGroup& group, double y, int64_t Slot::*begin) {
    box({kMargin, y}, {kBarWidth, kBarHeight}, "fill=\"url(#pad)\" stroke=\"#888888\"");
    for (size_t i = 0; i < group.slots.size(); ++i) {
      const Slot& slot = group.slots[i];
      const double x = x_of(group, slot.*begin);
      const double width = x_of(group, slot.*begin + slot.count) - x;
      text_ += "<g><title>" + escape(plain_name(slot.name)) + " [" + std::to_string(slot.*begin) +
               ":" + std::to_string(slot.*begin + slot.count) + "]</title>\n";
      box({x, y}, {std::max(width, 0.6), kBarHeight},
          "fill=\"" + slot.colour + "\" stroke=\"#555555\" stroke-width=\"0.5\"");
      label(slot, i, {x + width / 2, y}, width);
      text_ += "</g>\n";
    }
    int64_t end = 0;
    for (const Slot& slot : group.slots) end = std::max(end, slot.*begin + slot.count);
    const double x = x_of(group, end), width = kMargin + kBarWidth - x;
    if (width >= 50) {
      write({x + width / 2, y + 28}, "padding", "text-anchor=\"middle\" fill=\"#444444\"");
    }
  }

  void label(const Slot& slot, size_t index, Point top_middle, double width) {
    const std::string name = plain_name(slot.name), row = std::to_string(index + 1);
    if (width >= 8.0 * static_cast<double>(row.size())) {
      write({top_middle.x, top_middle.y + 20}, row,
            "text-anchor=\"middle\" font-size=\"11\" font-weight=\"bold\"");
    }
    if (width >= 6.0 * static_cast<double>(name.size()) + 6) {
      write({top_middle.x, top_middle.y + 36}, name, "text-anchor=\"middle\" font-size=\"10\"");
    }
  }

  // One row a parameter: its colour, number, name, and both places.
  double draw_legend(const FlatGroup& group, double y) {
    const double saved_x = kMargin + 600, believed_x = kMargin + 780;
    write({saved_x, y + 14}, "saved at", "fill=\"#444444\"");
    write({believed_x, y + 14}, "read by the converter from", "fill=\"#444444\"");
    y += kLegendRow;
    for (size_t i = 0; i < std::min(group.slots.size(), kLegendRows); ++i) {
      const Slot& slot = group.slots[i];
      std::string name = plain_name(slot.name);
      if (name.size() > 84) name = name.substr(0, 40) + "…" + name.substr(name.size() - 40);
      box({kMargin, y + 3}, {14, 14}, "fill=\"" + slot.colour + "\" stroke=\"#555555\"");
      write({kMargin + 46, y + 14}, std::to_string(i + 1), "text-anchor=\"end\"");
      write({kMargin + 56, y + 14}, name, "");
      write({saved_x, y + 14}, range(slot.saved, slot.count), "");
      const bool moved = slot.saved != slot.believed;
      write({believed_x, y + 14}, range(slot.believed, slot.count),
            moved ? "fill=\"#b00020\" font-weight=\"bold\"" : "");
      y += kLegendRow;
    }
    if (group.slots.size() > kLegendRows) {
      write({kMargin + 56, y + 14},
            std::to_string(group.slots.size() - kLegendRows) + " further parameters", "");
      y += kLegendRow;
    }
    return y + 12;
  }
  static std::string range(int64_t begin, int64_t count) {
    return "[" + std::to_string(begin) + ":" + std::to_string(begin + count) + "]";
  }

  const ShardedState& state_;
  std::string text_;
};

}  // namespace

std::string flat_picture(const ShardedState& state) {
  if (state.flavour != Flavour::kZero12 && state.flavour != Flavour::kBf16Optimizer) {
    throw Error(ErrorInfo{.code = ErrorCode::kUsage,
                          .what = "There are no flat partitions to draw.",
                          .file = state.folder,
                          .expected = "a ZeRO checkpoint of stage 1 or 2",
                          .found = checkpoint::name(state.flavour),
                          .next = "leave --svg out"});
  }
  return Picture(state).run();
}

}  // namespace isoshard::reshard
