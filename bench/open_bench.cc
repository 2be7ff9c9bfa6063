// Opening a torch.save file of many tensors: the directory, the pickle, and both with all checks.
#include <benchmark/benchmark.h>

#include <string>
#include <vector>

#include "checkpoint/format/crc.h"
#include "checkpoint/format/pickle_reader.h"
#include "checkpoint/format/torch_file.h"
#include "checkpoint/memory_storage.h"
#include "checkpoint/torch_builder.h"
#include "core/check.h"
#include "reshard/target_file.h"

namespace isoshard {
namespace {

constexpr const char* kPath = "/weights.pt";
constexpr int64_t kElements = 64;  // of each tensor

std::string tensor_name(int64_t number) {
  return "model.layers." + std::to_string(number / 12) + ".part_" + std::to_string(number % 12);
}

checkpoint::FileBlueprint blueprint_of(int64_t tensors) {
  checkpoint::TorchBuilder builder;
  std::vector<std::pair<std::string, checkpoint::NodeId>> entries;
  for (int64_t i = 0; i < tensors; ++i) {
    const int storage = builder.add_storage(
        {.dtype = DType::kFloat32, .numel = kElements, .runs = {}, .copy = {}, .literal = {}});
    entries.emplace_back(tensor_name(i),
                         builder.tensor({.shape = {8, kElements / 8}, .storage = storage}));
  }
  const checkpoint::NodeId root = builder.dict(std::move(entries));
  return builder.finish("weights.pt", root);
}

void write_literals(WritableFile& file, const std::vector<reshard::Literal>& literals) {
  for (const reshard::Literal& literal : literals) {
    file.write_at(literal.offset_bytes, std::as_bytes(std::span(literal.bytes)));
  }
}

// A file of zeros.
void write_file(checkpoint::MemoryStorage& storage, const checkpoint::FileBlueprint& blueprint) {
  const reshard::TargetFile layout(blueprint);
  const std::vector<std::byte> zeros(kElements * 4);
  const std::vector<uint32_t> crcs(blueprint.storages.size(), checkpoint::crc32_of(zeros));
  const std::unique_ptr<WritableFile> file = storage.create(kPath);
  file->set_size(layout.size_bytes());
  write_literals(*file, layout.opening());
  write_literals(*file, layout.closing(crcs));
  file->close();
}

void open_torch_file(benchmark::State& state) {
  checkpoint::MemoryStorage storage;
  write_file(storage, blueprint_of(state.range(0)));
  const checkpoint::TorchFile file(storage, kPath);
  const checkpoint::NodeId last =
      file.pickle().find(file.pickle().root, tensor_name(state.range(0) - 1));
  CHECK(last != checkpoint::kNoNode, "the last tensor");
  CHECK(file.tensor(last)->storage == state.range(0) - 1, "its storage");
  for (auto _ : state)
    benchmark::DoNotOptimize(checkpoint::TorchFile(storage, kPath).storages().size());
  state.SetItemsProcessed(state.iterations() * state.range(0));
}

void read_directory(benchmark::State& state) {
  checkpoint::MemoryStorage storage;
  write_file(storage, blueprint_of(state.range(0)));
  const std::unique_ptr<ReadableFile> file = storage.open_read(kPath);
  const auto expected = static_cast<size_t>(state.range(0)) + 6;  // and the six small records
  CHECK(checkpoint::read_zip_index(*file).records.size() == expected, "records");
  for (auto _ : state) benchmark::DoNotOptimize(checkpoint::read_zip_index(*file).records.size());
  state.SetItemsProcessed(state.iterations() * state.range(0));
}

void read_pickle_stream(benchmark::State& state) {
  const std::string bytes = blueprint_of(state.range(0)).head;
  const checkpoint::Pickle pickle = checkpoint::read_pickle(bytes, kPath);
  CHECK(static_cast<int64_t>(pickle.entries(pickle.root).size()) == 2 * state.range(0), "entries");
  for (auto _ : state) benchmark::DoNotOptimize(checkpoint::read_pickle(bytes, kPath).size());
  state.SetItemsProcessed(state.iterations() * state.range(0));
  state.SetBytesProcessed(state.iterations() * static_cast<int64_t>(bytes.size()));
}

BENCHMARK(open_torch_file)->Arg(1000)->Arg(10000)->Unit(benchmark::kMillisecond);
BENCHMARK(read_directory)->Arg(10000)->Unit(benchmark::kMillisecond);
BENCHMARK(read_pickle_stream)->Arg(10000)->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace isoshard
