// Facts about the budget of the canonical JSON: shared objects count each time they are written.
#include "checkpoint/deepspeed/hyper.h"

#include <gtest/gtest.h>

#include "checkpoint/format/crc.h"
#include "checkpoint/format/pickle_writer.h"
#include "checkpoint/format/zip.h"
#include "checkpoint/memory_storage.h"
#include "core/error.h"

namespace isoshard::checkpoint {
namespace {

// A model file that holds one key of the client state; `make` builds its value.
template <typename Make>
nlohmann::json client_state_of(const Make& make) {
  Pickle pickle;
  const NodeId value = make(pickle);
  const NodeId key = pickle.string("mine");
  pickle.root = pickle.dict({key, value});
  const std::string text = write_pickle(pickle);
  ZipLayout layout;
  const int number = layout.add("a/data.pkl", static_cast<int64_t>(text.size()));
  const uint32_t crc = crc32_of(std::as_bytes(std::span(text)));
  const std::string whole =
      layout.header(number) + text + layout.descriptor(number, crc) + layout.directory({crc});
  MemoryStorage storage;
  storage.create("/model.pt")->write_at(0, std::as_bytes(std::span(whole)));
  return client_state_json(TorchFile(storage, "/model.pt"));
}

template <typename Make>
ErrorInfo refusal_of(const Make& make) {
  try {
    client_state_of(make);
  } catch (const Error& error) {
    return error.info();
  }
  ADD_FAILURE() << "accepted";
  return {};
}

// `leaf` stands 2^depth times in the result.
NodeId doubled(Pickle& pickle, NodeId leaf, int depth) {
  for (int i = 0; i < depth; ++i) leaf = pickle.tuple({leaf, leaf});
  return leaf;
}

TEST(Hyper, AHundredThousandEntriesAreNoBomb) {
  const nlohmann::json state = client_state_of([](Pickle& pickle) {
    std::vector<NodeId> entries;
    for (int i = 0; i < 100'000; ++i) {
      entries.push_back(pickle.string("entry " + std::to_string(i)));
      entries.push_back(pickle.real(i));
    }
    return pickle.dict(std::move(entries));
  });
  EXPECT_EQ(state.at("\"mine\"").size(), 100'000u);
}

TEST(Hyper, ValuesOfASharedGraphAreCountedEachTime) {
  for (int depth : {20, 60, 900}) {
    const ErrorInfo info =
        refusal_of([depth](Pickle& pickle) { return doubled(pickle, pickle.tuple({}), depth); });
    EXPECT_EQ(info.code, ErrorCode::kLimit);
    EXPECT_EQ(info.file, "/model.pt");
    EXPECT_EQ(info.entry, "client state \"mine\"");
    EXPECT_NE(info.what.find("values"), std::string::npos) << info.what;
    EXPECT_FALSE(info.next.empty());
  }
}

TEST(Hyper, TextOfASharedStringIsCountedEachTime) {
  const ErrorInfo info = refusal_of(
      [](Pickle& pickle) { return doubled(pickle, pickle.string(std::string(60'000, 'x')), 10); });
  EXPECT_EQ(info.code, ErrorCode::kLimit);
  EXPECT_NE(info.what.find("text"), std::string::npos) << info.what;
}

TEST(Hyper, KeysShareOneBudget) {
  EXPECT_EQ(refusal_of([](Pickle& pickle) {
              std::vector<NodeId> entries;
              for (int i = 0; i < 30; ++i) {
                entries.push_back(pickle.integer(i));
                entries.push_back(doubled(pickle, pickle.none(), 14));
              }
              return pickle.dict(std::move(entries));
            }).code,
            ErrorCode::kLimit);
}

}  // namespace
}  // namespace isoshard::checkpoint
