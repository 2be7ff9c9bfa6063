// Ulysses by its rules: both layouts of its exchanges, what its arguments mean, and when the object
// that they make exchanges anything at all.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <set>
#include <span>

#include "core/check.h"
#include "core/error.h"
#include "core/random.h"
#include "reference/ulysses_config.h"
#include "reference/ulysses_layout.h"
#include "sim/cluster.h"

namespace isoshard::reference {
namespace {

// What DeepSpeed's own test of odd heads uses: which token, which head, which batch.
float mark(int64_t b, int64_t token, int64_t head, int64_t d) {
  return static_cast<float>(1000 * token + 100 * b + 10 * head) + static_cast<float>(d) / 8;
}

TEST(UlyssesLayout, EveryElementGoesWhereTheFormulaSays) {
  for (const int batch_dim_idx : {0, 1}) {
    for (const int ranks : {1, 2, 3, 4}) {
      for (const int64_t heads : {1, 3, 4, 7, 8}) {
        const UlyssesSizes s{.ranks = ranks,
                             .batch = 2,
                             .tokens = 3,
                             .heads = heads,
                             .size = 2,
                             .batch_dim_idx = batch_dim_idx};
        std::vector<Values> tokens;
        for (int rank = 0; rank < ranks; ++rank) {
          Values own;
          const int64_t outer = batch_dim_idx == 0 ? s.batch : s.tokens;
          const int64_t inner = batch_dim_idx == 0 ? s.tokens : s.batch;
          for (int64_t i = 0; i < outer; ++i) {
            for (int64_t k = 0; k < inner; ++k) {
              const int64_t b = batch_dim_idx == 0 ? i : k, t = batch_dim_idx == 0 ? k : i;
              for (int64_t head = 0; head < heads; ++head) {
                for (int64_t d = 0; d < s.size; ++d) {
                  own.push_back(mark(b, rank * s.tokens + t, head, d));
                }
              }
            }
          }
          tokens.push_back(own);
        }
        const std::vector<Values> scattered = scatter_heads(s, tokens);
        int64_t first = 0;
        for (int rank = 0; rank < ranks; ++rank) {
          const int64_t own = heads / ranks + (rank < heads % ranks ? 1 : 0);
          const int64_t length = s.tokens * ranks;
          const Values& found = scattered[static_cast<size_t>(rank)];
          ASSERT_EQ(static_cast<int64_t>(found.size()), s.batch * length * own * s.size);
          for (int64_t b = 0; b < s.batch; ++b) {
            for (int64_t g = 0; g < length; ++g) {
              const int64_t row = batch_dim_idx == 0 ? b * length + g : g * s.batch + b;
              for (int64_t i = 0; i < own; ++i) {
                ASSERT_EQ(found[static_cast<size_t>((row * own + i) * s.size + 1)],
                          mark(b, g, first + i, 1));
              }
            }
          }
          first += own;
        }
        EXPECT_EQ(scatter_sequence(s, scattered), tokens);
      }
    }
  }
}

// The worked example of the layout's description: two ranks, four heads of one element.
TEST(UlyssesLayout, TwoRanksFourHeads) {
  const UlyssesSizes s{.ranks = 2, .batch = 1, .tokens = 2, .heads = 4, .size = 1};
  const std::vector<Values> tokens = {{0, 1, 2, 3, 10, 11, 12, 13},
                                      {20, 21, 22, 23, 30, 31, 32, 33}};
  const std::vector<Values> expected = {{0, 1, 10, 11, 20, 21, 30, 31},
                                        {2, 3, 12, 13, 22, 23, 32, 33}};
  EXPECT_EQ(scatter_heads(s, tokens), expected);
}

TEST(UlyssesLayout, RefusesOtherLayoutsAndSizes) {
  EXPECT_THROW(scatter_heads({.batch_dim_idx = 2}, {{1}}), Error);
  EXPECT_THROW(scatter_heads({.ranks = 2}, {{1}}), Error);
  EXPECT_THROW(scatter_sequence({.heads = 3}, {{1, 2}}), Error);
}

std::string refused(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

void expect_refused(const std::function<void()>& call, const std::string& words) {
  const std::string text = refused(call);
  EXPECT_NE(text.find(words), std::string::npos) << "for \"" << words << "\": " << text;
}

// heads, key-value heads, ranks: what each rank has.
TEST(UlyssesArguments, HeadCases) {
  struct Case {
    int64_t heads, kv_heads;
    int ranks;
    int64_t local, local_kv, copies;
  };
  for (const Case& c :
       {Case{32, 32, 8, 4, 4, 0}, Case{32, 8, 4, 8, 2, 0}, Case{32, 8, 8, 4, 1, 1},
        Case{32, 8, 16, 2, 1, 2}, Case{32, 4, 8, 4, 1, 2}, Case{32, 1, 8, 4, 1, 8}}) {
    const UlyssesAttention a = make_ulysses({.attn_head_count = c.heads,
                                             .kv_head_count = c.kv_heads,
                                             .sequence_parallel_size = c.ranks,
                                             .seq_length_is_variable = true});
    EXPECT_EQ(a.local_q_head_count, c.local);
    EXPECT_EQ(a.local_kv_head_count, c.local_kv);
    EXPECT_EQ(a.kv_replication_factor, c.copies);
    EXPECT_EQ(a.global_length, 1);
  }
  const auto make = [](int64_t heads, int64_t kv_heads, int ranks) {
    return [=] {
      make_ulysses({.attn_head_count = heads,
                    .kv_head_count = kv_heads,
                    .sequence_parallel_size = ranks,
                    .seq_length_is_variable = true});
    };
  };
  expect_refused(make(24, 6, 4), "ValueError");
  expect_refused(make(32, 3, 8), "ValueError");
  expect_refused(make(40, 8, 16), "40 mod 16 = 8");
  expect_refused(make(8, 0, 2), "ZeroDivisionError");
  expect_refused(make(7, 0, 2), "ZeroDivisionError");  // before the heads are looked at
}

// [s, B, H, D], [s, B, K, D] and [S, B, H·D / P]; 1 stands for lengths that the queries say.
TEST(UlyssesArguments, RequiredShapes) {
  UlyssesArguments a{.batch_size = 3,
                     .attn_head_count = 8,
                     .attn_head_size = 5,
                     .kv_head_count = 2,
                     .num_hidden_layers = 7,
                     .sequence_parallel_size = 4,
                     .local_seq_length = 6,
                     .global_seq_length = 24};
  const UlyssesAttention fixed = make_ulysses(a);
  EXPECT_EQ(fixed.required_query_shape(), (std::array<int64_t, 4>{6, 3, 8, 5}));
  EXPECT_EQ(fixed.required_key_value_shape(), (std::array<int64_t, 4>{6, 3, 2, 5}));
  EXPECT_EQ(fixed.required_context_shape(), (std::array<int64_t, 3>{24, 3, 10}));
  a.seq_length_is_variable = true;
  const UlyssesAttention variable = make_ulysses(a);
  EXPECT_EQ(variable.required_query_shape(), (std::array<int64_t, 4>{1, 3, 8, 5}));
  EXPECT_EQ(variable.required_key_value_shape(), (std::array<int64_t, 4>{1, 3, 2, 5}));
  EXPECT_EQ(variable.required_context_shape(), (std::array<int64_t, 3>{1, 3, 10}));
}

TEST(UlyssesArguments, WhatIsNoArgumentHasItsDefault) {
  const UlyssesAttention a = make_ulysses({.seq_length_is_variable = true});
  EXPECT_FALSE(a.core_attn_implementation);
  EXPECT_FALSE(a.skip_all_but_last_attention_debug_mode);
  EXPECT_EQ(a.rotating_layer_counter, 0);
}

// P divides both, and still no rank has whole groups: their heads would be nobody's.
TEST(UlyssesArguments, KeyValueHeadsThatDoNotDivideTheHeadsAreRefused) {
  const auto make = [](int64_t heads, int64_t kv_heads, int ranks) {
    return refused([&] {
      make_ulysses({.attn_head_count = heads,
                    .kv_head_count = kv_heads,
                    .sequence_parallel_size = ranks,
                    .seq_length_is_variable = true});
    });
  };
  EXPECT_NE(make(6, 4, 2).find("6 mod 4 = 2"), std::string::npos);
  EXPECT_NE(make(6, 4, 2).find("3 heads and 2 key-value heads"), std::string::npos);
  EXPECT_NE(make(2, 4, 2).find("2 mod 4 = 2"), std::string::npos);
  EXPECT_NE(make(2, 4, 2).find("1 heads and 2 key-value heads"), std::string::npos);
  EXPECT_NE(make(3, 2, 1).find("3 mod 2 = 1"), std::string::npos);
  EXPECT_EQ(make(6, 2, 2), "");
  EXPECT_EQ(make(6, 3, 3), "");
  EXPECT_THROW(share_heads(6, 4, 2), CheckFailure);
  EXPECT_THROW(share_heads(2, 4, 2), CheckFailure);
  EXPECT_THROW(share_heads(2, 0, 2), CheckFailure);
}

TEST(UlyssesArguments, LengthsAreFixedOnlyIfTheyAreGiven) {
  UlyssesArguments a{.attn_head_count = 4, .kv_head_count = 2, .sequence_parallel_size = 2};
  EXPECT_FALSE(a.seq_length_is_variable);  // the constructor's default
  expect_refused([&] { make_ulysses(a); }, "TypeError");
  a.local_seq_length = 3;
  a.global_seq_length = 7;
  expect_refused([&] { make_ulysses(a); }, "3 and 7");
  a.global_seq_length = 6;
  EXPECT_EQ(make_ulysses(a).global_length, 6);
}

struct Registered {
  int groups = 0;
  std::vector<std::string> warnings;
  UlyssesRegistry registry{{.names = {"sdpa", "flash_attention_2", "flex_attention", "eager"},
                            .world = 4,
                            .make_groups = [this](int) -> Communicator* {
                              ++groups;
                              return nullptr;
                            },
                            .warn = [this](const std::string& text) { warnings.push_back(text); }}};
  RegisterArguments good{.config = {.attn_implementation = "sdpa",
                                    .hidden_size = 32,
                                    .num_attention_heads = 4,
                                    .num_key_value_heads = 2,
                                    .num_hidden_layers = 2},
                         .sequence_parallel_size = 2};
};

TEST(UlyssesRegistry, ChecksBeforeItMakesGroups) {
  Registered r;
  const auto with = [&](auto change) {
    RegisterArguments arguments = r.good;
    change(&arguments);
    return [&r, arguments] { r.registry.register_with_transformers(arguments); };
  };
  expect_refused(with([](auto* a) { a->seq_length_is_variable = false; }), "seq_length");
  expect_refused(with([](auto* a) { a->sequence_parallel_size = 0; }), "ValueError");
  expect_refused(with([](auto* a) { a->sequence_parallel_size = 3; }), "RuntimeError");
  expect_refused(with([](auto* a) { a->sequence_parallel_size = 8; }), "RuntimeError");
  expect_refused(with([](auto* a) { a->core_attn_implementation = "flex_attention"; }),
                 "another attention");
  expect_refused(with([](auto* a) {
                   a->config.attn_implementation = {};
                   a->core_attn_implementation = "eager";
                 }),
                 "mask");
  expect_refused(with([](auto* a) {
                   a->model_is_object = false;
                   a->core_attn_implementation = "flash";
                 }),
                 "no such attention");
  expect_refused(with([](auto* a) {
                   a->model_is_object = false;
                   a->core_attn_implementation = "kernels-community/flash-attn@v1:forward";
                 }),
                 "ImportError");
  expect_refused(with([](auto* a) { a->config.num_attention_heads = {}; }), "AttributeError");
  expect_refused(with([](auto* a) { a->config.num_key_value_heads = {}; }), "AttributeError");
  expect_refused(with([](auto* a) { a->config.num_hidden_layers = {}; }), "AttributeError");
  expect_refused(with([](auto* a) { a->config.hidden_size = {}; }), "AttributeError");
  // The default of head_dim is evaluated whether it is used or not.
  expect_refused(with([](auto* a) {
                   a->config.hidden_size = {};
                   a->config.head_dim = 8;
                 }),
                 "hidden_size");
  expect_refused(with([](auto* a) {
                   a->config.num_attention_heads = 6;
                   a->config.num_key_value_heads = 4;
                 }),
                 "6 mod 4 = 2");
  expect_refused(with([](auto* a) { a->config.num_attention_heads = 3; }), "3 mod 2 = 1");
  expect_refused(with([](auto* a) { a->config.num_key_value_heads = 3; }), "ValueError");
  expect_refused(with([](auto* a) {
                   a->seq_length_is_variable = false;
                   a->seq_length = 7;
                 }),
                 "3 and 7");
  EXPECT_EQ(r.groups, 0);
  EXPECT_FALSE(r.registry.registered());
  // And after all of that it still registers, which DeepSpeed's groups would not allow.
  EXPECT_TRUE(r.registry.register_with_transformers(r.good));
  EXPECT_EQ(r.groups, 1);
}

TEST(UlyssesRegistry, TwiceWithEqualArgumentsIsOnce) {
  Registered r;
  const auto first = r.registry.register_with_transformers(r.good);
  const auto again = r.registry.register_with_transformers(r.good);
  ASSERT_TRUE(first && again);
  EXPECT_EQ(first->arguments, again->arguments);
  EXPECT_EQ(r.groups, 1);
  EXPECT_EQ(*r.registry.registered(), "sdpa");
  RegisterArguments other = r.good;
  other.micro_batch_size = 2;
  expect_refused([&] { r.registry.register_with_transformers(other); }, "already initialized");
  EXPECT_EQ(r.groups, 1);
}

// A list of what is refused, not of what is accepted; and a refusal makes no groups.
TEST(UlyssesRegistry, EveryRegisteredAttentionButTheEagerOnesIsAccepted) {
  const std::set<std::string> names = {"sdpa",           "flash_attention_2", "flash_attention_3",
                                       "flex_attention", "paged|sdpa",        "eager",
                                       "paged|eager"};
  std::set<std::string> all = names;
  all.insert("kernels-community/flash-attn2");
  for (const std::string& name : all) {
    for (const bool model_is_object : {false, true}) {
      int groups = 0;
      UlyssesRegistry registry({.names = names,
                                .world = 2,
                                .make_groups = [&](int) -> Communicator* {
                                  ++groups;
                                  return nullptr;
                                },
                                .load_kernel = [](const std::string&) {}});
      RegisterArguments arguments = Registered().good;
      arguments.model_is_object = model_is_object;
      arguments.config.attn_implementation = name;
      arguments.core_attn_implementation = name;
      std::optional<UlyssesAttention> made;
      const auto make = [&] { made = registry.register_with_transformers(arguments); };
      if (name.ends_with("eager")) {
        expect_refused(make, "ValueError");
        expect_refused(make, "needs a mask");
        EXPECT_EQ(groups, 0);
        EXPECT_FALSE(registry.registered());
        continue;
      }
      for (int time = 0; time < 2; ++time) {
        EXPECT_EQ(refused(make), "");
        ASSERT_TRUE(made);
        EXPECT_EQ(made->core_attn_implementation, name);
        EXPECT_EQ(groups, 1);
      }
    }
  }
}

// Another name than the first time is another argument, though nothing else differs.
TEST(UlyssesRegistry, AnotherAttentionIsRefusedTheSecondTime) {
  Registered r;
  r.good.model_is_object = false;
  EXPECT_TRUE(r.registry.register_with_transformers(r.good));
  r.good.core_attn_implementation = "flex_attention";
  expect_refused([&] { r.registry.register_with_transformers(r.good); }, "already initialized");
  EXPECT_EQ(*r.registry.registered(), "sdpa");
  EXPECT_EQ(r.groups, 1);
}

TEST(UlyssesRegistry, OneRankChangesNothingAndChecksNothing) {
  Registered r;
  RegisterArguments one = r.good;
  one.sequence_parallel_size = 1;
  one.core_attn_implementation = "nonsense";
  EXPECT_FALSE(r.registry.register_with_transformers(one));
  EXPECT_EQ(r.groups, 0);
}

TEST(UlyssesRegistry, DefaultsAndLengths) {
  Registered r;
  EXPECT_TRUE(r.good.seq_length_is_variable);  // unlike the constructor's
  EXPECT_FALSE(r.good.disable_in_eval);
  r.good.seq_length_is_variable = false;
  r.good.max_length = 12;
  const auto made = r.registry.register_with_transformers(r.good);
  ASSERT_TRUE(made);
  EXPECT_EQ(made->local_length, 6);
  EXPECT_EQ(made->global_length, 12);
  EXPECT_EQ(made->arguments.attn_head_size, 8);  // hidden / heads
  EXPECT_EQ(r.warnings.size(), 1u);
}

TEST(UlyssesRegistry, SeqLengthStandsBeforeTheDeprecatedOne) {
  Registered r;
  r.good.seq_length_is_variable = false;
  r.good.seq_length = 8;
  r.good.max_length = 12;
  const auto made = r.registry.register_with_transformers(r.good);
  ASSERT_TRUE(made);
  EXPECT_EQ(made->global_length, 8);
  EXPECT_EQ(r.warnings.size(), 1u);
  r.good.max_length = {};  // equal in effect
  EXPECT_TRUE(r.registry.register_with_transformers(r.good));
  EXPECT_EQ(r.groups, 1);
}

TEST(UlyssesRegistry, AVariableLengthIgnoresTheOneThatIsGiven) {
  Registered r;
  r.good.seq_length = 7;  // P does not divide it
  const auto made = r.registry.register_with_transformers(r.good);
  ASSERT_TRUE(made);
  EXPECT_EQ(made->local_length, 1);
  EXPECT_EQ(made->global_length, 1);
}

TEST(UlyssesRegistry, AKernelIsLoadedOnce) {
  std::vector<std::string> loaded;
  UlyssesRegistry registry(
      {.names = {"sdpa"},
       .world = 2,
       .make_groups = [](int) -> Communicator* { return nullptr; },
       .warn = [](const std::string&) {},
       .load_kernel = [&](const std::string& name) { loaded.push_back(name); }});
  RegisterArguments arguments = Registered().good;
  arguments.model_is_object = false;  // then its attn_implementation is not compared
  arguments.core_attn_implementation = "kernels-community/flash-attn";
  EXPECT_TRUE(registry.register_with_transformers(arguments));
  EXPECT_TRUE(registry.register_with_transformers(arguments));
  EXPECT_EQ(loaded, std::vector<std::string>{"kernels-community/flash-attn"});
  EXPECT_EQ(*registry.registered(), "kernels-community/flash-attn");
}

// owner/name[@revision][:function], and no part is empty or has a '/' or ':' of its own.
TEST(UlyssesRegistry, WhatIsNoKernelsNameIsNotLoaded) {
  std::vector<std::string> loaded;
  const auto load = [&](const std::string& name) {
    UlyssesRegistry registry(
        {.names = {"sdpa"},
         .world = 2,
         .make_groups = [](int) -> Communicator* { return nullptr; },
         .load_kernel = [&](const std::string& kernel) { loaded.push_back(kernel); }});
    RegisterArguments arguments = Registered().good;
    arguments.model_is_object = false;
    arguments.core_attn_implementation = name;
    registry.register_with_transformers(arguments);
  };
  for (const std::string name :
       {"owner/name:", "owner/name:a/b", "owner/name:a:b", "owner/name:a:", "owner/name::a",
        "owner/", "/name", "owner/:a", "owner/name/more", "owner:a/name", "name:a", "name", ""}) {
    const std::string text = refused([&] { load(name); });
    EXPECT_NE(text.find("no such attention"), std::string::npos) << name << ": " << text;
    EXPECT_NE(text.find("ValueError"), std::string::npos) << name << ": " << text;
  }
  EXPECT_TRUE(loaded.empty());
  const std::vector<std::string> kernels = {"owner/name", "owner/name@v1", "owner/name:function",
                                            "owner/name@v1:function"};
  for (const std::string& name : kernels) load(name);
  EXPECT_EQ(loaded, kernels);
}

TEST(UlyssesRegistry, WarnsNobodyWhereNobodyListens) {
  UlyssesRegistry registry(
      {.names = {"sdpa"}, .world = 4, .make_groups = [](int) -> Communicator* { return nullptr; }});
  RegisterArguments arguments = Registered().good;
  arguments.max_length = 12;
  EXPECT_TRUE(registry.register_with_transformers(arguments));
}

// Four ranks in groups that should have two, whichever way the object is made.
TEST(UlyssesRegistry, AGroupOfOtherRanksIsRefused) {
  sim::Cluster cluster({.data = 2, .sequence = 2});
  cluster.run([&](sim::Rank& rank) {
    Communicator* group = &rank.group(GroupKind::kWorld);
    UlyssesRegistry registry(
        {.names = {"sdpa"}, .world = 4, .make_groups = [&](int) { return group; }});
    const RegisterArguments arguments = Registered().good;
    const auto again = [&] { registry.register_with_transformers(arguments); };
    expect_refused(again, "2 ranks");
    EXPECT_FALSE(registry.registered());
    expect_refused(again, "process_group");
    const auto make = [&] {
      make_ulysses({.attn_head_count = 4,
                    .kv_head_count = 2,
                    .sequence_parallel_size = 2,
                    .seq_length_is_variable = true},
                   group);
    };
    expect_refused(make, "2 ranks");
    group = &rank.group(GroupKind::kSequence);
    again();
    EXPECT_EQ(*registry.registered(), "sdpa");
    EXPECT_NO_THROW(make());
  });
}

// ---- The object at work, on two ranks: 2 samples of 6 tokens, 4 query and 2 key-value heads of 2.

constexpr int64_t kLength = 6, kOwn = 3;

struct Tensors {
  HeadSizes query_sizes, key_sizes;
  Values query, key, value;
  HeadTensors heads() const {
    return {.query = heads_first(query, query_sizes),
            .key = heads_first(key, key_sizes),
            .value = heads_first(value, key_sizes)};
  }
  // Those of the tokens from `first` on.
  Tensors slice(int64_t first, int64_t tokens) const {
    Tensors part = *this;
    part.query_sizes.tokens = part.key_sizes.tokens = tokens;
    const auto cut = [&](const Values& whole, const HeadSizes& sizes) {
      Values values;
      const HeadTensor all = heads_first(whole, sizes);
      for (int64_t b = 0; b < sizes.samples; ++b) {
        for (int64_t head = 0; head < sizes.heads; ++head) {
          const float* at = all.at(b, head, first);
          values.insert(values.end(), at, at + tokens * sizes.size);
        }
      }
      return values;
    };
    part.query = cut(query, query_sizes);
    part.key = cut(key, key_sizes);
    part.value = cut(value, key_sizes);
    return part;
  }
};

Tensors tensors(uint64_t seed, const HeadSizes& sizes, int64_t kv_heads) {
  Tensors t{.query_sizes = sizes, .key_sizes = sizes, .query = {}, .key = {}, .value = {}};
  t.key_sizes.heads = kv_heads;
  const auto fill = [&](Values* values, int64_t count, uint64_t stream) {
    for (int64_t i = 0; i < count; ++i) {
      const uint64_t word = keyed_random(seed, {stream, static_cast<uint64_t>(i)});
      values->push_back(static_cast<float>(static_cast<int64_t>(word >> 40) - (1 << 23)) *
                        0x1p-22f);
    }
  };
  fill(&t.query, t.query_sizes.numel(), 1);
  fill(&t.key, t.key_sizes.numel(), 2);
  fill(&t.value, t.key_sizes.numel(), 3);
  return t;
}

Tensors right_tensors() { return tensors(5, {2, 4, kLength, 2}, 2); }
// Of no shape that the object is made for, and another on each rank.
Tensors wrong_tensors(int rank) { return tensors(7, {1 + 2 * rank, 6, 4 + 3 * rank, 4}, 3); }

std::vector<int64_t> positions_of_slice(int64_t samples, int64_t first, int64_t tokens) {
  std::vector<int64_t> list;
  for (int64_t b = 0; b < samples; ++b) {
    for (int64_t t = 0; t < tokens; ++t) list.push_back(first + t);
  }
  return list;
}

std::vector<uint32_t> bits(const Values& values) {
  std::vector<uint32_t> list;
  for (const float value : values) list.push_back(std::bit_cast<uint32_t>(value));
  return list;
}

// Core attention of whole tensors, [B, tokens, H, D].
Values core_of(const Tensors& t, std::span<const int64_t> positions = {}) {
  const int64_t heads = t.query_sizes.heads, groups = t.key_sizes.heads;
  return core_attention({.in = t.heads(),
                         .positions = positions,
                         .share = {{0, heads}, {0, groups}},
                         .heads_each = heads / groups},
                        nullptr)
      .values;
}

// What a rank has of a context of both.
Values own_rows(const Values& context, int rank) {
  Values own;
  const int64_t width = std::ssize(context) / (2 * kLength);
  for (int64_t b = 0; b < 2; ++b) {
    const auto at = context.begin() + (b * kLength + rank * kOwn) * width;
    own.insert(own.end(), at, at + kOwn * width);
  }
  return own;
}

enum class Way { kConstructor, kRegistration };

UlyssesAttention made(Way way, sim::Rank& rank, bool disable_in_eval, bool variable = false) {
  Communicator* group = &rank.group(GroupKind::kSequence);
  if (way == Way::kConstructor) {
    UlyssesArguments arguments{.batch_size = 2,
                               .attn_head_count = 4,
                               .attn_head_size = 2,
                               .kv_head_count = 2,
                               .sequence_parallel_size = 2,
                               .seq_length_is_variable = variable,
                               .disable_in_eval = disable_in_eval};
    if (!variable) {
      arguments.local_seq_length = kOwn;
      arguments.global_seq_length = kLength;
    }
    return make_ulysses(arguments, group);
  }
  UlyssesRegistry registry({.names = {"sdpa"},
                            .world = 2,
                            .make_groups = [=](int) { return group; },
                            .warn = [](const std::string&) {}});
  RegisterArguments arguments;
  arguments.config.hidden_size = 8;
  arguments.config.num_attention_heads = 4;
  arguments.config.num_key_value_heads = 2;
  arguments.config.num_hidden_layers = 1;
  arguments.sequence_parallel_size = 2;
  arguments.micro_batch_size = 2;
  arguments.seq_length = kLength;
  arguments.seq_length_is_variable = variable;
  arguments.disable_in_eval = disable_in_eval;
  return *registry.register_with_transformers(arguments);
}

class UlyssesObject : public testing::TestWithParam<Way> {};

// disable_in_eval: wrong shapes, other ones and other numbers of calls on each rank, no positions;
// the core attention's own bits, and no rank has said a word.
TEST_P(UlyssesObject, TheBypassOfEvaluationIsTheCoreAttention) {
  sim::Cluster cluster({.sequence = 2});
  std::vector<std::vector<uint32_t>> found(2), expected(2);
  std::vector<int64_t> operations(2, -1), lengths(2, -1);
  cluster.run([&](sim::Rank& rank) {
    const size_t r = static_cast<size_t>(rank.number());
    UlyssesAttention attention = made(GetParam(), rank, true);
    const Tensors given = wrong_tensors(rank.number());
    Values out;
    for (int call = 0; call <= rank.number(); ++call) {
      out = attention.forward(given.heads(), {}, false);
    }
    found[r] = bits(out);
    expected[r] = bits(core_of(given));
    operations[r] = rank.operations();
    lengths[r] = attention.global_length;
  });
  EXPECT_EQ(found, expected);
  EXPECT_TRUE(cluster.trace().events().empty());
  EXPECT_EQ(operations, (std::vector<int64_t>{0, 0}));
  EXPECT_EQ(lengths, (std::vector<int64_t>{kLength, kLength}));
}

// Without the flag in evaluation, and with it in training, wrong shapes are refused before anything
// is sent.
TEST_P(UlyssesObject, WrongShapesAreRefusedBeforeAnyCollective) {
  for (const bool training : {false, true}) {
    sim::Cluster cluster({.sequence = 2});
    std::vector<int64_t> operations(2, -1);
    std::vector<std::string> texts(2);
    cluster.run([&](sim::Rank& rank) {
      const size_t r = static_cast<size_t>(rank.number());
      UlyssesAttention attention = made(GetParam(), rank, training);
      const Tensors given = wrong_tensors(rank.number());
      texts[r] = refused([&] { attention.forward(given.heads(), {}, training); });
      // Key and value alone, and then the positions.
      Tensors own = right_tensors().slice(kOwn * rank.number(), kOwn);
      expect_refused([&] { attention.forward(own.heads(), {}, training); }, "position_ids");
      const Tensors other = tensors(5, {2, 4, kOwn, 2}, 1);
      own.key_sizes = other.key_sizes, own.key = other.key, own.value = other.value;
      HeadTensors mixed = own.heads();
      expect_refused([&] { attention.forward(mixed, {}, training); }, "key");
      expect_refused([&] { attention.forward(mixed, {}, training); }, "[3, 2, 2, 2]");
      const Tensors right = right_tensors().slice(kOwn * rank.number(), kOwn);
      mixed.key = right.heads().key;
      expect_refused([&] { attention.forward(mixed, {}, training); }, "value");
      operations[r] = rank.operations();
    });
    for (const std::string& text : texts) {
      EXPECT_NE(text.find("AssertionError"), std::string::npos) << text;
      EXPECT_NE(text.find("[3, 2, 4, 2]"), std::string::npos) << text;  // what is required
    }
    EXPECT_EQ(operations, (std::vector<int64_t>{0, 0}));
    EXPECT_TRUE(cluster.trace().events().empty());
  }
}

// In training the flag has no effect, and without it evaluation is as training: positions, q, k, v
// and the context go over the group, and each rank has its tokens of the whole attention.
TEST_P(UlyssesObject, OnlyEvaluationIsBypassed) {
  struct Case {
    bool disable_in_eval, training;
  };
  const Tensors whole = right_tensors();
  const Values context = core_of(whole);
  std::set<uint64_t> hashes;
  for (const Case& c : {Case{false, true}, Case{true, true}, Case{false, false}}) {
    sim::Cluster cluster({.sequence = 2});
    std::vector<Values> found(2);
    cluster.run([&](sim::Rank& rank) {
      UlyssesAttention attention = made(GetParam(), rank, c.disable_in_eval);
      const int64_t first = kOwn * rank.number();
      const Tensors own = whole.slice(first, kOwn);
      found[static_cast<size_t>(rank.number())] =
          attention.forward(own.heads(), positions_of_slice(2, first, kOwn), c.training);
    });
    for (int rank = 0; rank < 2; ++rank) {
      EXPECT_EQ(bits(found[static_cast<size_t>(rank)]), bits(own_rows(context, rank)));
    }
    EXPECT_EQ(cluster.trace().events().size(), 2u * 5u);
    hashes.insert(cluster.trace().hash());
  }
  EXPECT_EQ(hashes.size(), 1u);
}

// A variable length is each query's in training; the bypass leaves the last one where it is.
TEST_P(UlyssesObject, AVariableLengthIsTheQuerysInTraining) {
  sim::Cluster cluster({.sequence = 2});
  const Tensors whole = right_tensors();
  cluster.run([&](sim::Rank& rank) {
    UlyssesAttention attention = made(GetParam(), rank, true, true);
    const Tensors given = wrong_tensors(rank.number());
    attention.forward(given.heads(), {}, false);
    EXPECT_EQ(attention.global_length, 1);
    const int64_t first = kOwn * rank.number();
    const Tensors own = whole.slice(first, kOwn);
    attention.forward(own.heads(), positions_of_slice(2, first, kOwn), true);
    EXPECT_EQ(attention.local_length, kOwn);
    EXPECT_EQ(attention.global_length, kLength);
    attention.forward(given.heads(), {}, false);
    EXPECT_EQ(attention.global_length, kLength);
    EXPECT_EQ(attention.required_query_shape(), (std::array<int64_t, 4>{kOwn, 2, 4, 2}));
    EXPECT_EQ(attention.required_key_value_shape(), (std::array<int64_t, 4>{kOwn, 2, 2, 2}));
    EXPECT_EQ(attention.required_context_shape(), (std::array<int64_t, 3>{kLength, 2, 4}));
  });
  EXPECT_EQ(cluster.trace().events().size(), 2u * 5u);
}

std::vector<int64_t> joined(const std::vector<int64_t>& a, const std::vector<int64_t>& b) {
  std::vector<int64_t> both = a;
  both.insert(both.end(), b.begin(), b.end());
  return both;
}

// In the bypass position_ids are [batch, tokens], or [1, tokens] for the whole batch, or none; of
// any other number nothing is read.
TEST_P(UlyssesObject, PositionsOfTheBypassAreForEachTokenOrOneRowOrNone) {
  sim::Cluster cluster({.sequence = 2});
  std::vector<int64_t> operations(2, -1);
  cluster.run([&](sim::Rank& rank) {
    UlyssesAttention attention = made(GetParam(), rank, true);
    const Tensors given = tensors(9, {2, 4, 5, 2}, 2);
    const std::vector<int64_t> row = {0, 1, 0, 1, 2}, other = {0, 1, 2, 0, 1};
    const auto found = [&](const std::vector<int64_t>& positions) {
      return bits(attention.forward(given.heads(), positions, false));
    };
    const auto none = found({}), one = found(row), second = found(other);
    const auto both = found(joined(row, other));
    EXPECT_EQ(none, found(joined({0, 1, 2, 3, 4}, {0, 1, 2, 3, 4})));
    EXPECT_EQ(one, found(joined(row, row)));
    EXPECT_EQ(one, bits(core_of(given, joined(row, row))));
    EXPECT_NE(one, none);
    const auto half = static_cast<std::ptrdiff_t>(both.size() / 2);
    EXPECT_TRUE(std::equal(both.begin(), both.begin() + half, one.begin()));
    EXPECT_TRUE(std::equal(both.begin() + half, both.end(), second.begin() + half));
    for (const size_t count : {1, 4, 6, 9, 11, 15}) {
      const std::vector<int64_t> positions(count, 0);
      expect_refused([&] { found(positions); }, "position_ids");
      expect_refused([&] { found(positions); }, "none, 5 or 2 · 5 = 10");
    }
    operations[static_cast<size_t>(rank.number())] = rank.operations();
  });
  EXPECT_EQ(operations, (std::vector<int64_t>{0, 0}));
}

// Two documents, one of which begins on one rank and ends on the other.
constexpr std::array<int64_t, kLength> kRow = {0, 1, 0, 1, 2, 3};

std::vector<int64_t> own_row(int rank) {
  const auto at = kRow.begin() + rank * kOwn;
  return {at, at + kOwn};
}

// Outside the bypass, too, position_ids of [1, tokens] are those of every sample.
TEST_P(UlyssesObject, ARowOfPositionsIsForTheWholeBatch) {
  const Tensors whole = right_tensors();
  const std::vector<int64_t> row(kRow.begin(), kRow.end());
  const Values context = core_of(whole, joined(row, row));
  EXPECT_NE(bits(context), bits(core_of(whole)));
  for (const bool training : {false, true}) {
    sim::Cluster cluster({.sequence = 2});
    cluster.run([&](sim::Rank& rank) {
      UlyssesAttention attention = made(GetParam(), rank, training);
      const Tensors own = whole.slice(kOwn * rank.number(), kOwn);
      const std::vector<int64_t> one = own_row(rank.number());
      for (const std::vector<int64_t>& positions : {one, joined(one, one)}) {
        EXPECT_EQ(bits(attention.forward(own.heads(), positions, training)),
                  bits(own_rows(context, rank.number())));
      }
    });
    EXPECT_EQ(cluster.trace().events().size(), 2u * 2u * 5u);
  }
}

// A rank with a row and one with a row for each sample do not meet.
TEST_P(UlyssesObject, RanksGiveEquallyManyRowsOfPositions) {
  sim::Cluster cluster({.sequence = 2});
  std::optional<ErrorCode> code;
  try {
    cluster.run([&](sim::Rank& rank) {
      UlyssesAttention attention = made(GetParam(), rank, true);
      const Tensors own = right_tensors().slice(kOwn * rank.number(), kOwn);
      const std::vector<int64_t> one = own_row(rank.number());
      attention.forward(own.heads(), rank.number() == 0 ? one : joined(one, one), true);
    });
  } catch (const Error& error) {
    code = error.info().code;
  }
  EXPECT_EQ(code, ErrorCode::kMismatch);
}

// Outside the bypass there is one for each token or one row, or nothing is sent.
TEST_P(UlyssesObject, PositionsOfTrainingAreForEachToken) {
  sim::Cluster cluster({.sequence = 2});
  cluster.run([&](sim::Rank& rank) {
    UlyssesAttention attention = made(GetParam(), rank, true);
    const Tensors own = right_tensors().slice(kOwn * rank.number(), kOwn);
    for (const size_t count : {0, 1, 2, 5, 7, 9, 12}) {
      const std::vector<int64_t> positions(count, 0);
      expect_refused([&] { attention.forward(own.heads(), positions, true); }, "3 or 2 · 3 = 6");
    }
    EXPECT_EQ(rank.operations(), 0);
  });
}

// Of three layers the third has its attention, and the others their queries in its context's place;
// what goes over the group is the same. Refused calls and those of the bypass do not count.
TEST_P(UlyssesObject, TheDebugModeCallsTheLastLayersAttentionOnly) {
  sim::Cluster cluster({.sequence = 2});
  const Tensors whole = right_tensors();
  const Values context = core_of(whole);
  Values queries;  // [B, tokens, H, D]
  for (int64_t b = 0; b < 2; ++b) {
    for (int64_t t = 0; t < kLength; ++t) {
      for (int64_t head = 0; head < 4; ++head) {
        const float* at = heads_first(whole.query, whole.query_sizes).at(b, head, t);
        queries.insert(queries.end(), at, at + 2);
      }
    }
  }
  cluster.run([&](sim::Rank& rank) {
    UlyssesAttention attention = made(GetParam(), rank, true);
    attention.arguments.num_hidden_layers = 3;
    attention.skip_all_but_last_attention_debug_mode = true;
    int calls = 0;
    attention.attn = [&](const AttentionCall& call, std::vector<HeadOutputs>* saved) {
      ++calls;
      return core_attention(call, saved);
    };
    const Tensors own = whole.slice(kOwn * rank.number(), kOwn), other = wrong_tensors(0);
    const std::vector<int64_t> positions = positions_of_slice(2, kOwn * rank.number(), kOwn);
    for (int call = 1; call <= 7; ++call) {
      const bool last = call % 3 == 0;
      EXPECT_EQ(bits(attention.forward(own.heads(), positions, true)),
                bits(own_rows(last ? context : queries, rank.number())));
      EXPECT_EQ(calls, call / 3);
      EXPECT_EQ(attention.rotating_layer_counter, call % 3);
      expect_refused([&] { attention.forward(other.heads(), positions, true); }, "query");
    }
    EXPECT_EQ(bits(attention.forward(other.heads(), {}, false)), bits(core_of(other)));
    EXPECT_EQ(attention.rotating_layer_counter, 1);
    attention.skip_all_but_last_attention_debug_mode = false;
    EXPECT_EQ(bits(attention.forward(own.heads(), positions, true)),
              bits(own_rows(context, rank.number())));
    EXPECT_EQ(attention.rotating_layer_counter, 1);
  });
  EXPECT_EQ(cluster.trace().events().size(), 2u * 8u * 5u);
}

// The only layer is the last one, and without layers there is none.
TEST_P(UlyssesObject, TheDebugModeOfOneLayerSkipsNothing) {
  sim::Cluster cluster({.sequence = 2});
  const Tensors whole = right_tensors();
  const Values context = core_of(whole);
  cluster.run([&](sim::Rank& rank) {
    UlyssesAttention attention = made(GetParam(), rank, true);
    attention.skip_all_but_last_attention_debug_mode = true;
    const Tensors own = whole.slice(kOwn * rank.number(), kOwn);
    const std::vector<int64_t> positions = positions_of_slice(2, kOwn * rank.number(), kOwn);
    const auto found = [&] { return bits(attention.forward(own.heads(), positions, true)); };
    EXPECT_EQ(found(), bits(own_rows(context, rank.number())));
    attention.arguments.num_hidden_layers = 0;
    const int64_t before = rank.operations();
    expect_refused(found, "ZeroDivisionError");
    EXPECT_EQ(rank.operations(), before);
    attention.skip_all_but_last_attention_debug_mode = false;
    EXPECT_EQ(found(), bits(own_rows(context, rank.number())));
  });
}

INSTANTIATE_TEST_SUITE_P(Made, UlyssesObject,
                         testing::Values(Way::kConstructor, Way::kRegistration),
                         [](const auto& way) {
                           return way.param == Way::kConstructor ? "ByConstructor"
                                                                 : "ByRegistration";
                         });

// The bypass hands over the caller's own tensors and positions, and needs no group.
TEST(UlyssesBypass, CallsTheCoreWithTheCallersTensors) {
  const Tensors given = wrong_tensors(0);
  const std::vector<int64_t> positions = {0, 1, 0, 1};  // two documents
  int calls = 0;
  const auto core = [&](const AttentionCall& call, std::vector<HeadOutputs>* saved) {
    ++calls;
    EXPECT_EQ(call.in.query.data, given.query.data());
    EXPECT_EQ(call.in.key.data, given.key.data());
    EXPECT_EQ(call.in.value.data, given.value.data());
    EXPECT_EQ(call.in.query.sizes, given.query_sizes);
    EXPECT_EQ(call.heads_each, 2);
    EXPECT_EQ(std::vector<int64_t>(call.positions.begin(), call.positions.end()), positions);
    EXPECT_EQ(saved, nullptr);
    return AttentionContext{.values = {1, 2, 3}, .shape = {3}};
  };
  UlyssesAttention attention = make_ulysses({.attn_head_count = 4,
                                             .kv_head_count = 2,
                                             .sequence_parallel_size = 2,
                                             .seq_length_is_variable = true,
                                             .disable_in_eval = true},
                                            nullptr, core);
  EXPECT_EQ(attention.forward(given.heads(), positions, false), (Values{1, 2, 3}));
  EXPECT_EQ(calls, 1);
  expect_refused([&] { attention.forward(given.heads(), positions, true); }, "process_group");
  EXPECT_EQ(calls, 1);
}

// The flat way into the bypass: the query says how many tokens there are, whatever the positions.
TEST(UlyssesBypass, TheQueryCountsTheTokens) {
  Ulysses ulysses(nullptr,
                  {.heads = 4, .kv_heads = 2, .head_size = 2, .positions = {{0, kOwn}, {kOwn, 6}}});
  const Tensors given = tensors(11, {2, 4, 5, 2}, 2);
  const HeadTensors heads{.query = tokens_first(given.query, {2, 4, 5, 2}),
                          .key = tokens_first(given.key, {2, 2, 5, 2}),
                          .value = tokens_first(given.value, {2, 2, 5, 2})};
  const std::vector<int64_t> row = {0, 1, 0, 1, 2};
  for (const std::vector<int64_t>& positions : {std::vector<int64_t>{}, row, joined(row, row)}) {
    UlyssesState state{
        .samples = 2, .mode = {false, true}, .document_positions = positions, .outputs = {}};
    const Values found = ulysses.forward(given.query, given.key, given.value, &state);
    EXPECT_EQ(
        bits(found),
        bits(core_attention(
                 {.in = heads, .positions = positions, .share = {{0, 4}, {0, 2}}, .heads_each = 2},
                 nullptr)
                 .values));
  }
}

// The way back reads the positions as the way there does.
TEST(UlyssesCore, BackwardTakesThePositionsThatForwardTakes) {
  Ulysses ulysses(nullptr,
                  {.heads = 4, .kv_heads = 2, .head_size = 2, .positions = {{0, kLength}}});
  const Tensors given = right_tensors();
  const std::vector<int64_t> row = {0, 1, 0, 1, 2, 3}, whole = {0, 1, 2, 3, 4, 5};
  const auto gradients = [&](const std::vector<int64_t>& positions) {
    UlyssesState state{.samples = 2, .document_positions = positions, .outputs = {}};
    const Values context = ulysses.forward(given.query, given.key, given.value, &state);
    const UlyssesGradients back = ulysses.backward(context, state);
    return std::vector{bits(back.query), bits(back.key), bits(back.value)};
  };
  EXPECT_EQ(gradients(row), gradients(joined(row, row)));
  EXPECT_EQ(gradients({}), gradients(joined(whole, whole)));
  EXPECT_NE(gradients(row), gradients({}));
  expect_refused([&] { gradients({0, 1}); }, "position_ids");
  UlyssesState state{.samples = 2, .document_positions = row, .outputs = {}};
  const Values context = ulysses.forward(given.query, given.key, given.value, &state);
  state.document_positions.pop_back();
  expect_refused([&] { ulysses.backward(context, state); }, "none, 6 or 2 · 6 = 12");
}

// And the way back of two ranks that were given a row.
TEST(UlyssesCore, BackwardOfRanksTakesARowOfPositions) {
  sim::Cluster cluster({.sequence = 2});
  cluster.run([&](sim::Rank& rank) {
    Ulysses ulysses(
        &rank.group(GroupKind::kSequence),
        {.heads = 4, .kv_heads = 2, .head_size = 2, .positions = {{0, kOwn}, {kOwn, kLength}}});
    const Tensors own = right_tensors().slice(kOwn * rank.number(), kOwn);
    const std::vector<int64_t> row = own_row(rank.number());
    EXPECT_EQ(ulysses.gather_positions(row, 2), std::vector<int64_t>(kRow.begin(), kRow.end()));
    const auto found = [&](const std::vector<int64_t>& positions) {
      UlyssesState state{.samples = 2, .document_positions = {}, .outputs = {}};
      const Values context = ulysses.attend(own.heads(), positions, &state);
      const UlyssesGradients back = ulysses.backward(context, state);
      return std::vector{bits(context), bits(back.query), bits(back.key), bits(back.value)};
    };
    EXPECT_EQ(found(row), found(joined(row, row)));
  });
}

// Behind the exchanges of q, k and v, and of as many elements: required_context_shape is
// [6, 2, 4], of any axes behind the first two.
TEST(UlyssesCore, AContextOfAnotherShapeIsRefused) {
  sim::Cluster cluster({.sequence = 2});
  const Tensors whole = right_tensors();
  cluster.run([&](sim::Rank& rank) {
    const Tensors own = whole.slice(kOwn * rank.number(), kOwn);
    const std::vector<int64_t> positions = positions_of_slice(2, kOwn * rank.number(), kOwn);
    const auto found = [&](const std::vector<int64_t>& shape) {
      UlyssesAttention attention = made(Way::kConstructor, rank, false);
      attention.attn = [&](const AttentionCall& call, std::vector<HeadOutputs>* saved) {
        AttentionContext context = core_attention(call, saved);
        context.shape = shape;
        return context;
      };
      return bits(attention.forward(own.heads(), positions, true));
    };
    const std::vector<uint32_t> expected = bits(own_rows(core_of(whole), rank.number()));
    EXPECT_EQ(found({2, kLength, 2, 2}), expected);
    EXPECT_EQ(found({2, kLength, 4}), expected);
    for (const std::vector<int64_t>& shape : std::vector<std::vector<int64_t>>{
             {2, 2, kLength, 2}, {kLength, 2, 4}, {2, kLength, 2}, {48}, {}}) {
      expect_refused([&] { found(shape); }, "AssertionError");
      expect_refused([&] { found(shape); }, "[6, 2, 4]");
    }
    expect_refused([&] { found({2, 2, kLength, 2}); }, "[2, 2, 12] of 48 elements");
  });
  EXPECT_EQ(cluster.trace().events().size(), 2u * (2u * 5u + 11u * 4u));
}

// A core attention of another size than DeepSpeed's required_context_shape.
TEST(UlyssesCore, AContextOfAnotherSizeIsRefused) {
  UlyssesAttention attention =
      make_ulysses({.batch_size = 1,
                    .attn_head_count = 6,
                    .attn_head_size = 4,
                    .kv_head_count = 3,
                    .local_seq_length = 4,
                    .global_seq_length = 4},
                   nullptr, [](const AttentionCall&, std::vector<HeadOutputs>*) {
                     return AttentionContext{.values = {1}, .shape = {1, 4, 24}};
                   });
  const Tensors given = wrong_tensors(0);
  expect_refused([&] { attention.forward(given.heads(), {0, 1, 2, 3}, true); }, "context");
}

}  // namespace
}  // namespace isoshard::reference
