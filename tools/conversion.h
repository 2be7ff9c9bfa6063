// What convert and reshard have in common: checks before any work, flags, report.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "reshard/convert.h"
#include "reshard/plan.h"
#include "tools/session.h"

namespace isoshard::tools {

inline constexpr const char* kResumeHelp =
    "Go on from what an interrupted command has left, comparing all of it; when interrupted, keep "
    "what was written";

struct ConversionFlags {
  bool overwrite = false;
  bool resume = false;
  bool no_latest = false;
  bool dry_run = false;
  bool force = false;
  std::string verify = "reread";
  const char* not_strict = "--no-strict";  // as the verb spells it
};

struct ConvertFlags {
  std::string source, target, to, format = "safetensors", max_shard_size = "5GB", like = "0.19.8";
  bool exclude_frozen = false;
  bool as_deepspeed = false;
  bool beyond_deepspeed = false;
  int64_t moe_max_group_size = 178'956'971;
  std::vector<std::string> banner;  // said when nothing is refused any more
  std::function<void(const checkpoint::ShardedState&)> accept;  // throws where a verb wants more
  ConversionFlags common;
};

void run_convert(Session* session, const ConvertFlags& flags);

void add_conversion_flags(CLI::App* verb, ConversionFlags* flags);

// Refuses a target whose file system has too little room for the plan. `there`: what lies
// there already, to be written into, or null.
void check_space(Session* session, const reshard::ReshardPlan& plan, const std::string& target,
                 const checkpoint::LeftoverFolder* there = nullptr);

// Whether a canonical path is the other or lies inside it.
bool is_inside(const std::string& inner, const std::string& outer);

// After a universal folder is published its name goes into latest_universal beside it, unless
// --no-latest was given.
void point_latest_universal(const ConversionFlags& flags, const std::string& target,
                            reshard::ConvertOptions* options);

// TARGET equal to, inside or around SOURCE is refused.
void refuse_overlap(Session* session, const std::string& source, const std::string& target);

// At stage 0 values prove the order of the optimizer's states; `force` does without only where
// --param-order says it.
checkpoint::ShardedState open_to_convert(Session* session, const std::string& source,
                                         const ConversionFlags& flags);

// A folder of ours that was not finished is INCOMPLETE, one that reading found doubts in SUSPECT:
// refused, or with --force told in the certificate.
void refuse_doubtful(Session* session, const checkpoint::ShardedState& state,
                     const ConversionFlags& flags, reshard::ConvertOptions* options);

// The certificate's source part.
nlohmann::json source_certificate(const checkpoint::ShardedState& state, const std::string& source);

reshard::ConvertOptions conversion_options(Session* session, const ConversionFlags& flags,
                                           const std::string& target);

// Plans; with --dry-run prints the plan; otherwise checks space, converts and reports.
void finish_conversion(Session* session, const checkpoint::ShardedState& state,
                       std::vector<checkpoint::FileBlueprint> files, const ConversionFlags& flags,
                       reshard::ConvertOptions* options);

}  // namespace isoshard::tools
