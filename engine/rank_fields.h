// Fields of a checkpoint's files that are no tensors of the model: counters, settings, loss scale,
// client state. For the rank's own files and for the universal form.
#pragma once

#include "core/training_state.h"
#include "engine/checkpoint.h"
#include "engine/rank_reader.h"

namespace isoshard::engine {

// Of an object LossScaler or DynamicLossScaler.
void load_scale(const checkpoint::Fields& fields, checkpoint::NodeId scaler, LossScale* scale);

// Steps that the optimizer has taken, as its first state says; 0: it has none; −1: it counts none.
int64_t optimizer_steps(RankReader& reader, checkpoint::NodeId states);

// What the file's param_groups say of the settings that this run's have, such as lr.
void load_settings(const checkpoint::Fields& fields, checkpoint::NodeId groups,
                   TrainingState* state);

// Of a model file: global_steps and their like, and where `options` say so the schedule's place.
void load_counters(const RankReader& model, const LoadOptions& options, TrainingState* state);

// Of a model file, as load_checkpoint returns it.
Json client_state(const checkpoint::Fields& fields, const LoadOptions& options);

}  // namespace isoshard::engine
