// Facts about iso1. The expected values were computed by a Python program from docs/formats/
// digest.md alone: bitwise CRCs, json.dumps and hashlib. They never change.
#include "reshard/digest.h"

#include <gtest/gtest.h>

#include <cstring>

#include "checkpoint/format/crc.h"
#include "checkpoint/format/pickle_writer.h"
#include "checkpoint/memory_storage.h"

namespace isoshard::reshard {
namespace {

using checkpoint::FileFragment;
using checkpoint::Flavour;
using checkpoint::MemoryStorage;
using checkpoint::NodeId;
using checkpoint::ShardedState;

std::span<const std::byte> bytes_of(const std::string& text) {
  return std::as_bytes(std::span(text));
}

const char* const kWeights = "fa2b2e182ade2dfd7f3e4db0b5222d6d204c3fec68ca8044eed7bbffbd5cf35b";
const char* const kExpAvg = "6710039b07d5ee340d6f16b019ac6218ab4c00ee9c4f2112caaa3fe80981c03f";
const char* const kSteps = "ef3c3f28f618b6919da1b81f606bb07947c25ec6284fafbc6b58d7493d150cc9";
const char* const kBuffers = "c9a8bf392fb58175b05c10484b3de0faa8129d5413a3e262a22127aacf65c16f";
const char* const kHyper = "ca3d163bab055381827226140568f3bef7eaac187cebd76878e0b63e9e442356";
const char* const kRoot = "595ba923d8a11356ee201e5736ac42aad5134118cbbd109ebae8ab5b30f388d6";
const char* const kRootOfWeights =
    "b03db1de9a0aba33138700784a05c4b2ef0fd02726b0b84e718a875b74f4136e";

// Where the first leaf's six floats lie; everything else stays.
enum class Cut { kWhole, kTwoFiles, kEveryElementBackwards };

// a.weight [2, 3] with exp_avg and step 3.0; b, a bfloat16 scalar with step 0.5; é"x without
// elements and with a step of None; c, a second name of a.weight; a buffer n of two int64.
class DigestTest : public testing::Test {
 protected:
  ShardedState make(Cut cut) {
    ShardedState state;
    const float weight[] = {1, 2, 3, 4, 5, 6};
    const float moment[] = {0.5f, 0, 0, 0, 0, -0.25f};
    const int64_t buffer[] = {7, -1};
    std::string first = "padding.", second = "more padding....";
    std::vector<FileFragment> fragments;
    const auto place = [&](std::string* text, int file, const void* bytes, size_t size) {
      const FileFragment at{0, 0, file, static_cast<int64_t>(text->size())};
      text->append(static_cast<const char*>(bytes), size);
      return at;
    };
    if (cut == Cut::kWhole) {
      fragments = {place(&first, 0, weight, 24)};
      fragments[0].count = 6;
    } else if (cut == Cut::kTwoFiles) {
      fragments = {place(&second, 1, weight, 4), place(&first, 0, weight + 1, 12),
                   place(&second, 1, weight + 4, 8)};
      fragments[0].count = 1;
      fragments[1].begin = 1, fragments[1].count = 3;
      fragments[2].begin = 4, fragments[2].count = 2;
    } else {
      for (int i = 5; i >= 0; --i) {
        FileFragment f = place(&second, 1, weight + i, 4);
        f.begin = i, f.count = 1;
        fragments.insert(fragments.begin(), f);
      }
    }
    FileFragment moments = place(&second, 1, moment, 24), scalar = place(&first, 0, "\x80\x3f", 2);
    FileFragment buffers = place(&second, 1, buffer, 16);
    moments.count = 6, scalar.count = 1, buffers.count = 2;
    add_file(&state, first);
    add_file(&state, second);
    add_steps(&state);

    const int b = state.add_leaf({.name = "b",
                                  .state = "fp32",
                                  .dtype = DType::kBFloat16,
                                  .shape = {},
                                  .fragments = {scalar}});
    const int a = state.add_leaf(
        {.name = "a.weight", .state = "fp32", .shape = {2, 3}, .fragments = fragments});
    const int m = state.add_leaf(
        {.name = "a.weight", .state = "exp_avg", .shape = {2, 3}, .fragments = {moments}});
    const int x =
        state.add_leaf({.name = "\xC3\xA9\"x", .state = "fp32", .shape = {0}, .fragments = {}});
    const int n = state.add_leaf({.name = "n",
                                  .state = "buffer",
                                  .dtype = DType::kInt64,
                                  .shape = {2},
                                  .fragments = {buffers}});
    state.parameters = {
        {.name = "\xC3\xA9\"x", .weight = x, .scalars = {{"step", {2, none_}}}},
        {.name = "b", .weight = b, .scalars = {{"step", {2, half_}}}},
        {.name = "a.weight", .weight = a, .states = {m}, .scalars = {{"step", {2, three_}}}}};
    state.buffers = {{"n", n}};
    state.aliases = {{"c", "a.weight"}};
    state.flavour = Flavour::kZero12;
    state.stepped = true;
    return state;
  }

  void add_file(ShardedState* state, const std::string& bytes) {
    checkpoint::SourceFile file;
    file.path = file.relative = "/" + std::to_string(++files_);
    storage_.create(file.path)->write_at(0, bytes_of(bytes));
    file.plain = storage_.open_read(file.path);
    state->files.push_back(std::move(file));
  }

  // A torch file that holds nothing but the three steps.
  void add_steps(ShardedState* state) {
    checkpoint::Pickle pickle;
    pickle.root = pickle.list({pickle.real(3.0), pickle.real(0.5), pickle.none()});
    const std::string bytes = write_pickle(pickle);
    checkpoint::ZipLayout layout;
    layout.add("a/data.pkl", static_cast<int64_t>(bytes.size()));
    const uint32_t crc = checkpoint::crc32_of(bytes_of(bytes));
    const std::string path = "/" + std::to_string(++files_);
    storage_.create(path)->write_at(
        0,
        bytes_of(layout.header(0) + bytes + layout.descriptor(0, crc) + layout.directory({crc})));
    checkpoint::SourceFile file;
    file.path = file.relative = path;
    file.torch = std::make_shared<checkpoint::TorchFile>(storage_, path);
    const checkpoint::Pickle& read = file.torch->pickle();
    three_ = read.items(read.root)[0], half_ = read.items(read.root)[1],
    none_ = read.items(read.root)[2];
    state->files.push_back(std::move(file));
  }

  MemoryStorage storage_;
  int files_ = 0;
  NodeId three_ = 0, half_ = 0, none_ = 0;
};

void expect_section(const Digest& digest, const std::string& name, const std::string& hex,
                    int64_t tensors, int64_t elements) {
  const SectionDigest* section = find_section(digest, name);
  ASSERT_NE(section, nullptr) << name;
  EXPECT_EQ(section->hex, hex) << name;
  EXPECT_EQ(section->absent, "") << name;
  EXPECT_EQ(section->tensors, tensors) << name;
  EXPECT_EQ(section->elements, elements) << name;
}

TEST_F(DigestTest, EverySectionAndTheRootHaveTheValuesOfTheSpecification) {
  const Digest digest = compute_digest(storage_, make(Cut::kWhole), {});
  expect_section(digest, "weights", kWeights, 3, 7);
  expect_section(digest, "exp_avg", kExpAvg, 1, 6);
  expect_section(digest, "steps", kSteps, 2, 2);
  expect_section(digest, "buffers", kBuffers, 1, 2);
  expect_section(digest, "hyper", kHyper, 0, 0);
  EXPECT_EQ(digest.root, kRoot);
}

TEST_F(DigestTest, SectionsStandInTheirOrder) {
  const Digest digest = compute_digest(storage_, make(Cut::kWhole), {});
  std::string order;
  for (const SectionDigest& section : digest.sections) order += section.section + " ";
  EXPECT_EQ(order, "weights exp_avg steps buffers hyper ");
}

TEST_F(DigestTest, TheValueIsTheSameForEveryFragmentation) {
  for (Cut cut : {Cut::kTwoFiles, Cut::kEveryElementBackwards}) {
    for (int workers : {1, 4}) {
      EXPECT_EQ(compute_digest(storage_, make(cut), {.workers = workers}).root, kRoot);
    }
  }
}

TEST_F(DigestTest, TheOrderOfParametersDoesNotMatter) {
  ShardedState state = make(Cut::kWhole);
  std::reverse(state.parameters.begin(), state.parameters.end());
  EXPECT_EQ(compute_digest(storage_, state, {}).root, kRoot);
}

TEST_F(DigestTest, AFileOfWeightsHasTheSameWeightsAndNamesWhatIsAbsent) {
  ShardedState state = make(Cut::kTwoFiles);
  state.flavour = Flavour::kWeights;
  state.buffers.clear();
  for (checkpoint::ParameterState& parameter : state.parameters) {
    parameter.states.clear();
    parameter.scalars.clear();
  }
  const Digest digest = compute_digest(storage_, state, {});
  expect_section(digest, "weights", kWeights, 3, 7);
  EXPECT_EQ(digest.root, kRootOfWeights);
  for (const char* section : {"steps", "buffers", "hyper"}) {
    EXPECT_NE(find_section(digest, section)->absent, "") << section;
    EXPECT_EQ(find_section(digest, section)->hex, "") << section;
  }
  EXPECT_EQ(find_section(digest, "exp_avg"), nullptr);
  EXPECT_TRUE(has_digest(digest, "iso1:" + digest.root));
  EXPECT_FALSE(has_digest(digest, "iso1:"));  // what is absent has no digest to expect
}

TEST_F(DigestTest, EveryPartOfALeafCounts) {
  const auto weights = [&](const std::function<void(ShardedState*)>& change) {
    ShardedState state = make(Cut::kWhole);
    change(&state);
    return find_section(compute_digest(storage_, state, {}), "weights")->hex;
  };
  EXPECT_EQ(weights([](ShardedState*) {}), kWeights);
  EXPECT_NE(weights([](ShardedState* s) { s->parameters[2].name = "a.weighs"; }), kWeights);
  EXPECT_NE(weights([](ShardedState* s) { s->leaf(1).shape = {3, 2}; }), kWeights);
  EXPECT_NE(weights([](ShardedState* s) { s->leaf(1).dtype = DType::kInt32; }), kWeights);
  EXPECT_NE(weights([](ShardedState* s) { s->leaf(1).fragments[0].offset_bytes += 1; }), kWeights);
  EXPECT_NE(weights([](ShardedState* s) { s->aliases[0].target = "b"; }), kWeights);
  EXPECT_NE(weights([](ShardedState* s) { s->aliases.clear(); }), kWeights);
  EXPECT_NE(weights([](ShardedState* s) { s->parameters.pop_back(); }), kWeights);
}

TEST_F(DigestTest, LeavesAreSortedByNameThenState) {
  const Digest digest = compute_digest(storage_, make(Cut::kWhole), {});
  std::string order;
  for (const LeafLine& line : digest.leaves) order += line.name + ":" + line.state + " ";
  EXPECT_EQ(order, "a.weight:exp_avg a.weight:weight b:weight n:buffer \xC3\xA9\"x:weight ");
}

TEST(LeafLine, IsTheCanonicalLine) {
  const LeafLine line{.name = "a.weight",
                      .state = "weight",
                      .dtype = DType::kFloat32,
                      .shape = {2, 3},
                      .crc = {true, 0xB48BF60CEF65D740ull, 0x12F3F0B1AF91AEC7ull}};
  EXPECT_EQ(leaf_line(line),
            "\"a.weight\"\tweight\tfloat32\t[2,3]\tb48bf60cef65d740\t12f3f0b1af91aec7\n");
  const LeafLine odd{
      .name = "\xC3\xA9\"\\\n", .state = "s", .dtype = DType::kBool, .shape = {}, .crc = {}};
  EXPECT_EQ(leaf_line(odd),
            "\"\xC3\xA9\\\"\\\\\\n\"\ts\tbool\t[]\t0000000000000000\t0000000000000000\n");
}

}  // namespace
}  // namespace isoshard::reshard
