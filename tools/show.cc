// isoshard show: one tensor, its values, and which bytes of which file hold them.
#include <algorithm>
#include <iostream>
#include <numeric>

#include "checkpoint/deepspeed/reader.h"
#include "checkpoint/format/npy.h"
#include "core/cast.h"
#include "core/error.h"
#include "reshard/executor.h"
#include "reshard/selection.h"
#include "reshard/statistics.h"
#include "reshard/tensor_values.h"
#include "tools/session.h"

namespace isoshard::tools {
namespace {

using checkpoint::Leaf;
using checkpoint::ParameterState;
using checkpoint::ShardedState;
using nlohmann::json;

constexpr size_t kShownValues = 8;
constexpr size_t kShownFragments = 20;
constexpr size_t kShownNames = 5;

struct ShowFlags {
  std::string source, name, state = "weight", out;
  bool no_check = false;
};

// What the name on the command line means.
struct Target {
  std::string name;
  std::string brackets;  // what stands between them; meaningful if `sliced`
  bool sliced = false;
  int leaf = -1;
  const checkpoint::Scalar* scalar = nullptr;  // instead of a leaf
  std::string notice;
};

std::vector<std::string> all_names(const ShardedState& state) {
  std::vector<std::string> names;
  for (const ParameterState& parameter : state.parameters) names.push_back(parameter.name);
  for (const checkpoint::BufferState& buffer : state.buffers) names.push_back(buffer.name);
  for (const checkpoint::Alias& alias : state.aliases) names.push_back(alias.name);
  return names;
}

// Insertions, deletions and replacements that turn one text into the other (Levenshtein).
size_t edit_distance(const std::string& a, const std::string& b) {
  std::vector<size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), size_t{0});
  for (size_t i = 0; i < a.size(); ++i) {
    size_t diagonal = std::exchange(row[0], i + 1);
    for (size_t j = 0; j < b.size(); ++j) {
      const size_t replaced = diagonal + (a[i] != b[j]);
      diagonal = row[j + 1];
      row[j + 1] = std::min({replaced, row[j] + 1, diagonal + 1});
    }
  }
  return row.back();
}

[[noreturn]] void refuse_name(const ShardedState& state, const std::string& name) {
  constexpr size_t kMostNames = 20'000;  // the distance to each is worked out
  std::vector<std::pair<size_t, std::string>> near;
  std::vector<std::string> names = all_names(state);
  if (names.size() > kMostNames) names.resize(kMostNames);
  for (const std::string& candidate : names) {
    near.emplace_back(edit_distance(name.substr(0, 512), candidate.substr(0, 512)), candidate);
  }
  std::sort(near.begin(), near.end());
  std::string nearest;
  for (size_t i = 0; i < near.size() && i < kShownNames; ++i) {
    nearest += (i > 0 ? ", " : "") + quote(near[i].second);
  }
  throw Error(ErrorInfo{.code = ErrorCode::kNotFound,
                        .what = "No parameter or buffer has this name.",
                        .file = state.folder,
                        .entry = quote(name),
                        .expected = "one of " + std::to_string(all_names(state).size()) +
                                    " names; the nearest: " + nearest,
                        .next = "isoshard inspect --parameters lists all"});
}

[[noreturn]] void refuse_state(const ShardedState& state, const ParameterState& parameter,
                               const std::string& asked) {
  std::string known = "weight";
  if (parameter.model_copy >= 0) known += ", param";
  for (const int number : parameter.states) known += ", " + state.leaf(number).state;
  for (const checkpoint::Scalar& scalar : parameter.scalars) known += ", " + scalar.name;
  throw Error(ErrorInfo{.code = ErrorCode::kNotFound,
                        .what = "The parameter has no such state in this checkpoint.",
                        .file = state.folder,
                        .entry = quote(parameter.name),
                        .expected = known,
                        .found = quote(asked),
                        .next = "choose another --state"});
}

void take_state(const ShardedState& state, const ParameterState& parameter,
                const std::string& asked, Target* target) {
  const auto is = [&](int leaf) { return leaf >= 0 && state.leaf(leaf).state == asked; };
  if (asked == "weight" || is(parameter.weight))
    target->leaf = parameter.weight;
  else if (is(parameter.model_copy))
    target->leaf = parameter.model_copy;
  for (const int number : parameter.states) {
    if (target->leaf < 0 && is(number)) target->leaf = number;
  }
  if (target->leaf >= 0) return;
  for (const checkpoint::Scalar& scalar : parameter.scalars) {
    if (scalar.name == asked) target->scalar = &scalar;
  }
  if (target->scalar == nullptr) refuse_state(state, parameter, asked);
}

// False if there is no such name.
bool find_name(const ShardedState& state, const std::string& name, const std::string& asked,
               Target* target) {
  target->name = name;
  for (const checkpoint::BufferState& buffer : state.buffers) {
    if (buffer.name != name) continue;
    target->leaf = buffer.leaf;
    if (asked != "weight") target->notice = "a buffer has one state only; --state is not looked at";
    return true;
  }
  const ParameterState* parameter = state.find_parameter(name);
  for (const checkpoint::Alias& alias : state.aliases) {
    if (parameter != nullptr || alias.name != name) continue;
    if (asked == "param" && alias.model_copy >= 0) {
      target->leaf = alias.model_copy;
      return true;
    }
    parameter = state.find_parameter(alias.target);
    target->notice = quote(name) + " is a second name of " + quote(alias.target);
  }
  if (parameter == nullptr) return false;
  take_state(state, *parameter, asked, target);
  return true;
}

// A name may itself end in brackets, so that the whole text is tried first.
Target find_target(const ShardedState& state, const ShowFlags& flags) {
  Target target;
  if (find_name(state, flags.name, flags.state, &target)) return target;
  const size_t open = flags.name.rfind('[');
  if (open == std::string::npos || flags.name.back() != ']') refuse_name(state, flags.name);
  target.sliced = true;
  target.brackets = flags.name.substr(open + 1, flags.name.size() - open - 2);
  const std::string name = flags.name.substr(0, open);
  if (!find_name(state, name, flags.state, &target)) refuse_name(state, name);
  return target;
}

struct Value {
  std::string index, value, bits;
};

struct Shown {
  reshard::Statistics statistics;
  std::vector<Value> first;
};

// A new .npy file, removed again unless it was finished.
class NpyFile {
 public:
  NpyFile(Storage& storage, const std::string& path, DType source, const Shape& shape)
      : storage_(storage), path_(path), source_(source) {
    const std::optional<DType> dtype = checkpoint::npy_dtype(source);
    if (!dtype) {
      throw Error(ErrorInfo{.code = ErrorCode::kUnsupported,
                            .what = "A .npy file cannot hold this dtype.",
                            .file = path,
                            .found = name(source)});
    }
    target_ = *dtype;
    const std::string head = checkpoint::npy_head(target_, shape);
    file_ = storage.create(path);
    write(std::as_bytes(std::span(head)));
  }
  ~NpyFile() {
    if (!file_) return;
    try {
      storage_.remove_file(path_);
    } catch (const Error&) {
      // The failure that brought us here is the one to report.
    }
  }
  void add(std::span<const std::byte> elements) {
    if (source_ == target_) return write(elements);
    const auto count = static_cast<int64_t>(elements.size()) / item_size_bytes(source_);
    widened_.resize(static_cast<size_t>(count * item_size_bytes(target_)));
    cast(source_, elements, target_, widened_);
    write(widened_);
  }
  void finish() {
    file_->close();
    file_.reset();
  }
  bool widens() const { return source_ != target_; }

 private:
  void write(std::span<const std::byte> bytes) {
    file_->write_at(offset_, bytes);
    offset_ += static_cast<int64_t>(bytes.size());
  }

  Storage& storage_;
  std::string path_;
  DType source_, target_ = DType::kFloat32;
  std::unique_ptr<WritableFile> file_;
  std::vector<std::byte> widened_;
  int64_t offset_ = 0;
};

Shown read_values(const ShardedState& state, const Leaf& leaf, const reshard::Selection& selection,
                  NpyFile* npy) {
  Shown shown;
  const auto item = static_cast<size_t>(item_size_bytes(leaf.dtype));
  const Shape shape = selection.result_shape();
  const bool values = reshard::has_values(leaf.dtype);
  reshard::read_selection(state, leaf, selection, [&](std::span<const std::byte> elements) {
    if (values) shown.statistics.add(leaf.dtype, elements);
    if (npy != nullptr) npy->add(elements);
    for (size_t i = 0; shown.first.size() < kShownValues && i * item < elements.size(); ++i) {
      const auto element = elements.subspan(i * item, item);
      const auto number = static_cast<int64_t>(shown.first.size());
      shown.first.push_back({to_string(reshard::index_of(number, shape)),
                             values ? reshard::element_text(leaf.dtype, element) : "",
                             reshard::element_bits(element)});
    }
  });
  return shown;
}

// Rank of the partition group whose file this is; −1 if it is every rank's.
int rank_of(const ShardedState& state, int file) {
  for (const std::vector<int>* files : {&state.optim_files, &state.model_files}) {
    if (files->size() < 2) continue;
    const auto found = std::find(files->begin(), files->end(), file);
    if (found != files->end()) return static_cast<int>(found - files->begin());
  }
  return -1;
}

void print_text(const ShardedState& state, const Target& target,
                const reshard::Selection& selection, const Shown& shown, bool checked) {
  const Leaf& leaf = state.leaf(target.leaf);
  const reshard::Statistics& s = shown.statistics;
  std::cout << quote(target.name) << "  " << leaf.state << "  " << name(leaf.dtype) << "  "
            << to_string(leaf.shape) << "\n";
  if (target.sliced) {
    std::cout << "  selected     [" << target.brackets << "], shape "
              << to_string(selection.result_shape()) << "\n";
  }
  if (s.minimum) {
    std::cout << "  min          " << reshard::value_text(leaf.dtype, *s.minimum)
              << "\n  max          " << reshard::value_text(leaf.dtype, *s.maximum)
              << "\n  mean         " << reshard::value_text(DType::kFloat64, *s.mean()) << "\n";
  }
  if (reshard::has_values(leaf.dtype)) {
    std::cout << "  elements     " << s.count << ", of them zero: " << s.zeros
              << ", not finite: " << s.non_finite << "\n";
  } else {
    std::cout << "  elements     " << selection.count() << ", shown as bits only\n";
  }
  for (const Value& value : shown.first) {
    std::cout << "  " << value.index << "  " << value.value << "  " << value.bits << "\n";
  }
  const reshard::SelectedFragments where =
      reshard::selected_fragments(leaf, selection, kShownFragments);
  const int64_t item = item_size_bytes(leaf.dtype);
  for (const checkpoint::FileFragment& f : where.first) {
    const int rank = rank_of(state, f.file);
    std::cout << "  elements " << f.begin << " to " << f.begin + f.count - 1 << ": "
              << quote(state.files[static_cast<size_t>(f.file)].relative)
              << (rank < 0 ? "" : ", rank " + std::to_string(rank)) << ", bytes " << f.offset_bytes
              << " to " << f.offset_bytes + f.count * item - 1 << "\n";
  }
  const auto listed = static_cast<int64_t>(where.first.size());
  if (where.total > listed) std::cout << "  … and " << where.total - listed << " more pieces\n";
  if (!checked) std::cout << "  the CRCs of these bytes were not checked\n";
}

json number_json(DType dtype, const std::optional<long double>& value) {
  if (!value) return nullptr;
  if (is_floating(dtype)) return static_cast<double>(*value);
  if (*value < 0) return static_cast<int64_t>(*value);
  return static_cast<uint64_t>(*value);
}

void print_json(Session* session, const ShardedState& state, const Target& target,
                const reshard::Selection& selection, const Shown& shown, bool checked) {
  const Leaf& leaf = state.leaf(target.leaf);
  const reshard::Statistics& s = shown.statistics;
  json object = {{"kind", "tensor"},
                 {"name", target.name},
                 {"state", leaf.state},
                 {"dtype", name(leaf.dtype)},
                 {"shape", leaf.shape},
                 {"selected_shape", selection.result_shape()},
                 {"elements", selection.count()},
                 {"crc_checked", checked}};
  if (reshard::has_values(leaf.dtype)) {
    object["min"] = number_json(leaf.dtype, s.minimum);
    object["max"] = number_json(leaf.dtype, s.maximum);
    object["mean"] = s.mean() ? json(*s.mean()) : json();
    object["zeros"] = s.zeros;
    object["non_finite"] = s.non_finite;
  }
  object["first"] = object["fragments"] = json::array();
  for (const Value& value : shown.first) {
    object["first"].push_back(
        {{"index", value.index}, {"value", value.value}, {"bits", value.bits}});
  }
  const reshard::SelectedFragments where =
      reshard::selected_fragments(leaf, selection, kShownFragments);
  object["fragments_total"] = where.total;
  for (const checkpoint::FileFragment& f : where.first) {
    object["fragments"].push_back({{"file", state.files[static_cast<size_t>(f.file)].relative},
                                   {"rank", rank_of(state, f.file)},
                                   {"begin", f.begin},
                                   {"count", f.count},
                                   {"offset_bytes", f.offset_bytes},
                                   {"size_bytes", f.count * item_size_bytes(leaf.dtype)}});
  }
  session->print_json(object);
}

void show_scalar(Session* session, const ShardedState& state, const Target& target) {
  const std::string value = checkpoint::scalar_text(state, target.scalar->value);
  if (session->json) {
    session->print_json({{"kind", "scalar"},
                         {"name", target.name},
                         {"state", target.scalar->name},
                         {"value", value}});
  } else {
    std::cout << quote(target.name) << "  " << target.scalar->name << "  " << value << "\n";
  }
}

void run_show(Session* session, const ShowFlags& flags) {
  session->read.lost_experts = true;  // another tensor's missing state is told
  const ShardedState state = session->open(flags.source);
  const Target target = find_target(state, flags);
  if (!target.notice.empty()) session->notice("notice: " + target.notice);
  if (target.scalar != nullptr) return show_scalar(session, state, target);
  const Leaf& leaf = state.leaf(target.leaf);
  const reshard::Selection selection = target.sliced
                                           ? reshard::parse_selection(target.brackets, leaf.shape)
                                           : reshard::select_all(leaf.shape);
  if (!flags.no_check) {
    reshard::StreamOptions stream = session->stream_options();
    stream.digest = {target.leaf};
    reshard::digest_leaves(session->storage, state, stream);
  }
  std::optional<NpyFile> npy;
  if (!flags.out.empty()) {
    npy.emplace(session->storage, flags.out, leaf.dtype, selection.result_shape());
    if (npy->widens()) session->notice("notice: bfloat16 is written as float32");
  }
  const Shown shown = read_values(state, leaf, selection, npy ? &*npy : nullptr);
  if (npy) npy->finish();
  if (session->json)
    print_json(session, state, target, selection, shown, !flags.no_check);
  else
    print_text(state, target, selection, shown, !flags.no_check);
}

}  // namespace

void add_show(CLI::App* app, Session* session) {
  auto flags = std::make_shared<ShowFlags>();
  CLI::App* verb = app->add_subcommand(
      "show", "One tensor: values, bits, and which bytes of which file hold them");
  verb->add_option("SOURCE", flags->source)->required();
  verb->add_option("NAME", flags->name, "A parameter or buffer, with an optional [i:j,…]")
      ->required();
  verb->add_option("--state", flags->state, "weight, fp32, param, exp_avg, step, …")
      ->capture_default_str();
  verb->add_option("--out", flags->out, "Write the values to this new .npy file");
  verb->add_flag("--no-check", flags->no_check, "Do not read whole records to check their CRCs");
  add_source_flags(verb, session);
  verb->callback([session, flags] { run_show(session, *flags); });
}

}  // namespace isoshard::tools
