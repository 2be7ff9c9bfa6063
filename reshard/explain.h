// What differing values are: another tensor's run, the same tensor shifted, zeros, a cast, the
// transpose. Found by an index of short windows of the original's bit patterns; nothing is claimed
// that was not compared bit by bit over the whole tensor.
//
//   found      | 0 ........................ 166 | 167 168 169 |
//   explained  blocks.0.up.weight[3:170]          blocks.0.up.bias[0:3]
//
// What it does not find: sums, permutations of rows, mixtures of more than 64 runs, and in
// originals of more than a million elements runs shorter than the distance between two indexed
// windows, unless they begin or end with their tensor.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "reshard/tensor_values.h"

namespace isoshard::reshard {

inline constexpr const char* kNoExplanation = "no simple explanation found";

class WindowIndex;

class Explainer {
 public:
  // `originals` are all tensors that the found values may come from, in the order of the flat
  // buffers, so that a run that crosses from one tensor into the next can be followed. They are
  // read when the first explanation is asked for.
  explicit Explainer(std::vector<TensorValues> originals);
  ~Explainer();

  // What `found` holds, said in terms of the originals, among which the one of the same name and
  // state is what it should hold; or kNoExplanation.
  std::string explain(const TensorValues& found);

 private:
  std::string explain_by_own(const TensorValues& found, const TensorValues& own) const;
  std::string explain_by_runs(const TensorValues& found, int own);
  int find(const std::string& name, const std::string& state) const;

  std::vector<TensorValues> originals_;
  std::map<DType, std::unique_ptr<WindowIndex>> indices_;
};

// True when both hold the same number of elements of one dtype with the same bits.
bool same_values(const TensorValues& a, const TensorValues& b);

}  // namespace isoshard::reshard
