// Ulysses without ranks: both layouts of its exchanges, and what its arguments mean.
#include <gtest/gtest.h>

#include "core/error.h"
#include "reference/ulysses_config.h"
#include "reference/ulysses_layout.h"

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
  UlyssesRegistry registry{{"sdpa", "flash_attention_2", "flex_attention", "eager"},
                           4,
                           [this](int) { ++groups; },
                           [this](const std::string& text) { warnings.push_back(text); }};
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
  expect_refused(with([](auto* a) { a->config.num_attention_heads = 3; }), "3 mod 2 = 1");
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

}  // namespace
}  // namespace isoshard::reference
