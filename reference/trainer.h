// One rank of a training run: its state, a step, an evaluation. The losses and every bit of the
// state are those of a run on one rank, whatever the topology, the ZeRO stage, the size of micro
// batches and the order in which ranks come to their collectives.
#pragma once

#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "core/parallel_state.h"
#include "core/training_state.h"
#include "reference/data.h"
#include "reference/gradient.h"
#include "reference/optimizer.h"
#include "reference/parameters.h"
#include "reference/schedule.h"
#include "reference/transformer.h"
#include "reference/whole_state.h"
#include "reference/zero.h"

namespace isoshard::reference {

struct TrainConfig {
  ModelConfig model;
  DataConfig data;
  OptimizerConfig optimizer;
  ScheduleConfig schedule;
  LossScale loss_scale;  // as it is at the beginning
  double clip = 0.0;     // largest norm of the gradient; 0: as it is
  int stage = 0;
  bool pipeline_module = false;  // a PipelineModule also where there is one stage
  bool split_decay = false;      // norms are an optimizer group of their own, without weight decay
  bool disable_in_eval = false;
  ReduceMode reduce = ReduceMode::kTree;
};

struct StepReport {
  float loss = 0.0f;     // mean over the batch's tokens that have a loss
  int64_t tokens = 0;    // how many these are
  double norm = 0.0;     // of the gradient, before clipping
  bool skipped = false;  // float16 overflowed
};

// A parameter group over those who share its optimizer state: the same on each of them.
struct OwnerLayout {
  std::vector<std::vector<TreeNode>> nodes;  // by member: its frontier
  std::vector<int64_t> numels;               // of the group's parameters
  std::vector<GroupCut> cuts;                // by member
  std::vector<std::vector<Span>> slices;     // by parameter, by member
};
// By group and the ranks that share it; of one config and topology.
using LayoutCache = std::map<std::pair<int, std::vector<int>>, std::shared_ptr<const OwnerLayout>>;

class Trainer {
 public:
  // Throws Error(kUsage) where the model cannot be trained on this topology. `cache`: of layouts
  // that ranks of one process need not work out each for itself; may be null.
  Trainer(const TrainConfig& config, const ParallelState& parallel, LayoutCache* cache = nullptr);

  // Values of step 0: masters are the parameters as their dtype has them.
  void initialise();
  StepReport step();
  // Mean loss of samples [first, first + count), which are no part of the training data's order,
  // each of `length` tokens (none: the training data's). With disable_in_eval every rank evaluates
  // whole sequences on its own, as many and as long as it was given (the same ones within a
  // tensor-parallel group and a pipeline); otherwise all ranks share one lot.
  StepReport evaluate(int64_t first, int64_t count, std::optional<int64_t> length = {});

  TrainingState& state() { return state_; }
  const TrainingState& state() const { return state_; }
  // This rank's part of whole tensors, such as whole_state() gives: masters and states.
  void adopt(const WholeState& whole, const TrainingState& counted);
  // Copies in the parameters' dtype again from the masters, after a load.
  void refresh_parameters();

 private:
  struct Owners {
    Communicator* group = nullptr;
    std::shared_ptr<const OwnerLayout> layout;
  };
  void make_state();
  // Gives a frozen parameter its place and size: all of the shard, or at stage 3 a slot.
  void place_frozen(TrainedParameter* parameter) const;
  void fill_frozen(const std::function<float(const TrainedParameter&, int64_t)>& value_at);
  std::vector<std::pair<std::string, Setting>> settings(const TrainedGroup& group) const;
  std::vector<std::pair<std::string, Setting>> optimizer_settings(double weight_decay) const;
  OwnerLayout owner_layout(const TrainedGroup& group, const std::vector<int>& ranks) const;
  void make_owners(LayoutCache* cache);
  std::vector<TreeNode> dense_nodes(const Coordinate& at) const;
  std::vector<TreeNode> expert_nodes(int rank) const;
  // This rank's frontier of a group's gradients; group 0 is dense.
  const std::vector<TreeNode>& own_nodes(int group) const;
  MicroBatch micro_batch(const std::vector<int64_t>& places) const;
  GradientSet empty_gradients() const;
  void run_model(Transformer* model, GradientSet* gradients);
  void exchange_tied(Contribution* lookup, Contribution* head);
  static void add_head(int tied, std::vector<Values>* roots);
  std::vector<std::vector<Values>> reduce(GradientSet* gradients);
  std::vector<std::vector<Values>> reduce_in_fixed_point(GradientSet* gradients);
  // The sums of a gradient set by name of their tensor; the head of a tied embedding has its own.
  std::vector<std::pair<std::string, FixedSum*>> fixed_sums(GradientSet* gradients) const;
  void run_backward(Transformer* model, GradientSet* gradients);
  FixedSum exchange_fixed(const FixedSum& own, bool first);
  bool settle_exponents(GradientSet* gradients);
  void run_in_fixed_point(Transformer* model, GradientSet* gradients);
  static void sum_over(Communicator& group, std::vector<int64_t>* words);
  void total_loss(const LossSum& loss, std::initializer_list<Communicator*> groups,
                  StepReport* report);
  bool finish_gradients(std::vector<std::vector<Values>>* roots, StepReport* report);
  void update(const std::vector<std::vector<Values>>& gradients);

  TrainConfig config_;
  ParallelState parallel_;
  TrainingState state_;
  BatchPlan plan_;
  std::unique_ptr<Parameters> parameters_;
  std::vector<Owners> owners_;  // by group
};

}  // namespace isoshard::reference
