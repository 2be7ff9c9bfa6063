#!/usr/bin/env python3
"""Does the real DeepSpeed load what isoshard resharded between topologies?

    peer_parallel.py [--program PATH] [--cases REGEX]     (a Python with DeepSpeed, transformers)

Each case makes a folder by isoshard from a recorded checkpoint, loads it in real engines (CPU,
gloo, one process a rank), saves it at once, takes a step on fixed tokens, and saves again. What is
saved at once must equal our folder, file by file (`again`); after the step the state must equal
that of the same engines after loading what DeepSpeed itself made there, or the same state in
another form or stage (`step`: weights, moments and steps by digest). `scripts/peer.py --parallel`
calls it. Exit status: 0 all equal, 1 something differs.

Not verified: GPUs, several nodes, more than one step.
"""
import argparse
import glob
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile

import llama_pipeline
import record_pipeline
import record_traces

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
RECORDINGS = os.path.join(ROOT, "traces", "deepspeed")
NAMES = os.path.join(ROOT, "traces", "names", "moe_gated.json")
LLAMA, MIXTRAL, MOE = {"model": "llama"}, {"model": "mixtral"}, {"model": "moe"}
FOLDED = "autoep_folded_tp2_ep2_dp2"
UNEVEN = {"model": "llama", "autotp": 3, "sizes": {
    "hidden_size": 40, "intermediate_size": 56, "num_attention_heads": 5, "num_key_value_heads": 5,
    "vocab_size": 50}}
PIPE = {"model": "pipeline", "stage": 1, "dtype": "fp32"}
BF16 = {"dtype": "bf16", "tied": True, "functions": True, "groups": True, "method": "parameters"}
TENSOR = {**PIPE, "dtype": "bf16", "world": 4}
ZERO = {**PIPE, "dtype": "bf16", "tied": True, "groups": True}  # which it cannot load at stage 0
KV = ["--num-kv-heads", "2"]
# AutoEP with one group of experts at ep 2 and two at ep 1, whose universal form any run can load.
FEW = {"most": 10000, "via": ["ep=1", "--moe-max-group-size", "10000"]}
# At stage 0 DeepSpeed's norm of the gradients is that of one tensor-parallel rank's
# (docs/deepspeed_errata.md), at stage 3 it is kept in fp64: steps of stages agree without clipping.
UNCLIPPED = {"clip": 0.0}
GROUPS, MOST = {**MOE, "layers": 2, "most": 330}, ["--moe-max-group-size", "330"]
# name, source, command of isoshard (OURS: its folder), engine, world, what it is compared with:
# a recording, another case, or nothing.
CASES = [
    ("tp2 to tp1", "autotp_z1_tp2_dp2", ["reshard", "--to", "tp=1,dp=2"], LLAMA, 2,
     "autotp_tp2_to_tp1_dp2"),
    ("tp2 to tp4", "autotp_z1_tp2_dp2", ["reshard", "--to", "tp=4,dp=1", *KV],
     {**LLAMA, "autotp": 4}, 4, "autotp_tp2_to_tp4_dp1"),
    ("tp2 as it is", "autotp_z1_tp2_dp2", ["reshard", "--to", "dp=2"], {**LLAMA, "autotp": 2}, 4,
     "autotp_z1_tp2_dp2"),
    ("tp2 to stage 2", "autotp_z1_tp2_dp2", ["reshard", "--to", "stage=2"],
     {**LLAMA, "autotp": 2, "stage": 2}, 4, "tp2 as it is"),
    ("tp2 as it is, unclipped", "autotp_z1_tp2_dp2", ["reshard", "--to", "dp=2"],
     {**LLAMA, "autotp": 2, **UNCLIPPED}, 4, "autotp_z1_tp2_dp2"),
    ("tp2 to stage 3", "autotp_z1_tp2_dp2", ["reshard", "--to", "stage=3"],
     {**LLAMA, "autotp": 2, "stage": 3, **UNCLIPPED}, 4, "tp2 as it is, unclipped"),
    ("tp2 to stage 0", "autotp_z1_tp2_dp2", ["reshard", "--to", "stage=0"],
     {**LLAMA, "autotp": 2, "stage": 0, **UNCLIPPED}, 4, "tp2 as it is, unclipped"),
    ("tp2 to tp1, unclipped", "autotp_z1_tp2_dp2", ["reshard", "--to", "tp=1,dp=2"],
     {**LLAMA, **UNCLIPPED}, 2, "autotp_tp2_to_tp1_dp2"),
    ("tp2 to tp1, stage 3", "autotp_z1_tp2_dp2", ["reshard", "--to", "tp=1,dp=2,stage=3"],
     {**LLAMA, "stage": 3, **UNCLIPPED}, 2, "tp2 to tp1, unclipped"),
    ("tp3 as it is, uneven", "autotp_uneven_tp3", ["reshard", "--to", "dp=1"], UNEVEN, 3,
     "autotp_uneven_tp3"),
    ("tp3 to tp2, uneven", "autotp_uneven_tp3",
     ["reshard", "--to", "tp=2,dp=1", "--num-kv-heads", "5"], {**UNEVEN, "autotp": 2}, 2, None),
    ("ep2 to ep1", "autoep_z1_ep2_dp2", ["reshard", "--to", "ep=1"], {**MIXTRAL, "autoep": 1}, 2,
     "autoep_ep2_to_ep1_dp2"),
    ("ep2 to ep4", "autoep_z1_ep2_dp2", ["reshard", "--to", "ep=4,dp=4"],
     {**MIXTRAL, "autoep": 4}, 4, "autoep_ep2_to_ep4_dp4"),
    ("ep2 as it is", "autoep_z1_ep2_dp2", ["reshard", "--to", "ep=2"], {**MIXTRAL, "autoep": 2}, 2,
     "autoep_z1_ep2_dp2"),
    ("ep2 to stage 3", "autoep_z1_ep2_dp2", ["reshard", "--to", "stage=3"],
     {**MIXTRAL, "autoep": 2, "stage": 3}, 2, "ep2 as it is"),
    ("stage 3, ep2 to ep1", "autoep_z3_ep2_dp4", ["reshard", "--to", "ep=1,dp=2"],
     {**MIXTRAL, "autoep": 1, "stage": 3}, 2, None),
    ("stage 3, ep2 to ep4", "autoep_z3_ep2_dp4", ["reshard", "--to", "ep=4"],
     {**MIXTRAL, "autoep": 4, "stage": 3}, 4, None),
    ("stage 3, ep2 to stage 1", "autoep_z3_ep2_dp4", ["reshard", "--to", "stage=1"],
     {**MIXTRAL, "autoep": 2}, 4, None),
    ("moe ep2 to ep4", "moe_z1_ep2_dp4", ["reshard", "--to", "ep=4"], {**MOE, "ep": 4}, 4, None),
    ("moe ep2 to ep1", "moe_z1_ep2_dp4", ["reshard", "--to", "ep=1,dp=2"], {**MOE, "ep": 1}, 2,
     None),
    ("moe in groups, ep2 to ep4", "moe2_groups_z1_ep2_dp4", ["reshard", "--to", "ep=4", *MOST],
     {**GROUPS, "ep": 4}, 4, None),
    ("moe in groups, ep2 to ep1", "moe2_groups_z1_ep2_dp4",
     ["reshard", "--to", "ep=1,dp=2", *MOST], {**GROUPS, "ep": 1}, 2, None),
    ("moe in groups, ep2 as it is", "moe2_groups_z1_ep2_dp4", ["reshard", "--to", "ep=2"],
     {**GROUPS, "ep": 2}, 4, "moe2_groups_z1_ep2_dp4"),
    ("moe stage 0, ep2 to ep4", "moe_z0_ep2_dp4", ["reshard", "--to", "ep=4"],
     {**MOE, "ep": 4, "stage": 0}, 4, None),
    ("moe stage 0 to stage 1", "moe_z0_ep2_dp4", ["reshard", "--to", "stage=1"], {**MOE, "ep": 2},
     4, None),
    ("moe stage 1 to stage 0", "moe_z1_ep2_dp4", ["reshard", "--to", "stage=0"],
     {**MOE, "ep": 2, "stage": 0}, 4, None),
    ("autoep stage 0, ep2 to ep4", "autoep_z0_ep2_dp4", ["reshard", "--to", "ep=4"],
     {**MIXTRAL, "autoep": 4, "stage": 0}, 4, None),
    ("autoep stage 0 to stage 1", "autoep_z0_ep2_dp4", ["reshard", "--to", "stage=1,dp=2"],
     {**MIXTRAL, "autoep": 2}, 2, None),
    ("autoep stage 0, universal", "autoep_z0_ep2_dp4", ["convert", "--to", "universal"],
     {**MIXTRAL, "autoep": 2, "universal": True}, 2, "autoep stage 0 to stage 1"),
    ("autoep stage 1 to stage 0", "autoep_z1_ep2_dp2", ["reshard", "--to", "stage=0"],
     {**MIXTRAL, "autoep": 2, "stage": 0}, 2, None),
    ("ep2 by way of ep3, universal", "autoep_z1_ep2_dp2", ["convert", "--to", "universal"],
     {**MIXTRAL, "autoep": 2, "universal": True, "via": ["ep=3,dp=3", "--beyond-deepspeed"]}, 2,
     "ep2 as it is"),
    ("ep2 to ep1, in groups", "autoep_z1_ep2_dp2",
     ["reshard", "--to", "ep=1", "--moe-max-group-size", "10000"],
     {**MIXTRAL, "most": 10000, "autoep": 1}, 2, None),
    ("ep1 in groups, universal", "autoep_z1_ep2_dp2", ["convert", "--to", "universal"],
     {**MIXTRAL, **FEW, "autoep": 1, "universal": True}, 2, "ep2 to ep1, in groups"),
    ("ep1 in groups, universal at ep2", "autoep_z1_ep2_dp2", ["convert", "--to", "universal"],
     {**MIXTRAL, **FEW, "autoep": 2, "universal": True}, 2, "ep2 as it is"),
    ("moe migrated", "moe_gated_z1_ep2_dp2", ["migrate", "--names", NAMES],
     {**MIXTRAL, "autoep": 2, "universal": True}, 2, "autoep_migrated_ep2_dp2"),
    ("folded to tp1", FOLDED, ["reshard", "--to", "tp=1,dp=2"], {**MIXTRAL, "autoep": 2}, 2, None),
    ("folded, universal", FOLDED, ["convert", "--to", "universal", "--beyond-deepspeed"],
     {**MIXTRAL, "autoep": 2, "universal": True}, 2, "folded to tp1"),
    ("pp2 to pp1", "pipe_z1_pp2_dp1", ["reshard", "--to", "pp=1,dp=2"], {**PIPE, "pipeline": 1}, 2,
     "pipe_pp2_to_pp1_dp2"),
    ("pp2 to pp3, tied", "pipe_z1_pp2_dp2_tied",
     ["reshard", "--to", "pp=3,dp=1", "--pp-parts", "0,2,4,6"],
     {**PIPE, "pipeline": 3, "tied": True}, 3, "pipe_tied_pp2_to_pp3_dp1"),
    ("pp3 to pp2, bf16", "pipe_bf16_pp3_dp2", ["reshard", "--to", "pp=2,dp=1"],
     {**PIPE, **BF16, "pipeline": 2}, 2, "pipe_bf16_pp3_to_pp2_dp1"),
    ("tp2 pp2 to dp1", "pipe_tp2_pp2_dp2", ["reshard", "--to", "dp=1"],
     {**TENSOR, "pipeline": 2, "tensor": 2}, 4, None),
    ("tp2 pp2 to tp1", "pipe_tp2_pp2_dp2",
     ["reshard", "--to", "tp=1,dp=2", "--padded-vocab-size", "13"],
     {**TENSOR, "pipeline": 2, "tensor": 1}, 4, "pipe_tp2_to_tp1_pp2_dp2"),
    ("tp2 pp2 to tp4 pp1", "pipe_tp2_pp2_dp2",
     ["reshard", "--to", "tp=4,pp=1,dp=1", "--padded-vocab-size", "16"],
     {**TENSOR, "pipeline": 1, "tensor": 4}, 4, "pipe_tp2_to_tp4_pp1_dp1"),
    ("stage 0, pp2 to stage 1", "pipe_z0_bf16_pp2_dp2", ["reshard", "--to", "stage=1"],
     {**ZERO, "pipeline": 2}, 4, None),
    ("stage 0, pp2, universal", "pipe_z0_bf16_pp2_dp2", ["convert", "--to", "universal"],
     {**ZERO, "pipeline": 2, "load_universal": True}, 4, "stage 0, pp2 to stage 1"),
    ("stage 0, tp2 pp2 to tp1", "pipe_z0_bf16_tp2_pp2_dp2",
     ["reshard", "--to", "tp=1,dp=2,stage=1", "--padded-vocab-size", "13"],
     {**TENSOR, "pipeline": 2, "tensor": 1}, 4, None),
    ("pp2 to pp4, frozen", "pipe_frozen_pp2_dp2",
     ["reshard", "--to", "pp=4,dp=1", "--partition-method", "uniform"],
     {**PIPE, "dtype": "bf16", "frozen": True, "buffers": True, "pipeline": 4}, 4, None),
]
# What DeepSpeed's converter makes of our folder must be what ours makes: name, source, target.
CONVERTED = [
    ("stage 3, ep3 of 8 experts", "autoep_z3_ep2_dp4", ["ep=3,dp=6", "--beyond-deepspeed"]),
    ("stage 3, ep4", "autoep_z3_ep2_dp4", ["ep=4,dp=8"]),
]

# How a model with experts is cut, of which DeepSpeed knows nothing by itself.
FOLD = {"specs": {"partition_config": {"use_default_specs": False, "layer_specs": [
    {"patterns": [r".*\.(q|k|v)_proj\.weight$", r"lm_head\.weight$"], "partition_type": "column"},
    {"patterns": [r".*\.o_proj\.weight$"], "partition_type": "row"}]}}}
# Checkpoints that simulated ranks wrote: topology, engine, world. "frozen": every so many of the
# layers' matrices does not train.
SIMULATED = [
    ("dp=2,stage=0", {**LLAMA, "stage": 0}, 2),
    ("dp=2,stage=1", LLAMA, 2),
    ("dp=3,stage=2", {**LLAMA, "stage": 2}, 3),
    ("dp=2,stage=1 frozen", {**LLAMA, "frozen": 3}, 2),
    ("dp=3,stage=2 frozen", {**LLAMA, "frozen": 3, "stage": 2}, 3),
    ("dp=2,stage=3 frozen", {**LLAMA, "frozen": 3, "stage": 3}, 2),
    ("dp=2,tp=2,stage=2 frozen", {**LLAMA, "frozen": 3, "autotp": 2, "stage": 2}, 4),
    ("dp=4,stage=3", {**LLAMA, "stage": 3}, 4),
    ("dp=2,tp=2,stage=1", {**LLAMA, "autotp": 2}, 4),
    ("dp=1,tp=4,stage=1", {**LLAMA, "autotp": 4}, 4),
    ("dp=2,tp=2,stage=3", {**LLAMA, "autotp": 2, "stage": 3}, 4),
    ("dp=4,ep=2,stage=0", {**MIXTRAL, "autoep": 2, "stage": 0}, 4),
    ("dp=2,ep=2,stage=1", {**MIXTRAL, "autoep": 2}, 2),
    ("dp=4,ep=2,stage=2", {**MIXTRAL, "autoep": 2, "stage": 2}, 4),
    ("dp=4,ep=2,stage=3", {**MIXTRAL, "autoep": 2, "stage": 3}, 4),
    ("dp=2,tp=2,ep=2,stage=1", {**MIXTRAL, **FOLD, "autotp": 2, "autoep": 2}, 4),
    ("dp=2,tp=2,ep=4,stage=2", {**MIXTRAL, **FOLD, "autotp": 2, "autoep": 4, "stage": 2}, 4),
    ("dp=1,tp=4,ep=2,stage=1", {**MIXTRAL, **FOLD, "autotp": 4, "autoep": 2}, 4),
    ("dp=2,pp=2,stage=1", {**LLAMA, "stages": 2}, 4),
    ("dp=3,pp=2,stage=1", {"model": "llama-tied", "stages": 2}, 6),
]


def build_model(case):
    """The models of the recordings; traces/README.md says their sizes."""
    import torch
    torch.manual_seed(0)  # what is loaded must not depend on it
    if case["model"] == "moe":
        from deepspeed.moe.layer import MoE

        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.embed = torch.nn.Embedding(11, 8)
                self.moe = self.layer()
                if case.get("layers") == 2:
                    self.moe2 = self.layer()
                self.head = torch.nn.Linear(8, 11)

            def layer(self):
                expert = torch.nn.Sequential(
                    torch.nn.Linear(8, 12), torch.nn.ReLU(), torch.nn.Linear(12, 8))
                return MoE(8, expert, num_experts=4, ep_size=case["ep"], use_rts=False)

            def forward(self, input_ids, labels):
                x = self.embed(input_ids)
                x = x + self.moe(x)[0]
                x = x + self.moe2(x)[0] if case.get("layers") == 2 else x
                x = self.head(x).float()
                return torch.nn.functional.cross_entropy(x.flatten(0, 1), labels.flatten())

        return Net()
    from transformers import AutoConfig, AutoModelForCausalLM
    wide = {"hidden_size": 32, "intermediate_size": 48} if case["model"] == "llama" else {
        "hidden_size": 16, "intermediate_size": 24, "num_local_experts": 8}
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64, **wide,
             **case.get("sizes", {})}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(
        case["model"], **sizes, num_hidden_layers=2, max_position_embeddings=64,
        tie_word_embeddings=False))


def pipeline_main(case, load, out):
    engine = record_pipeline.make_engine(case)
    epoch = engine.load_checkpoint(load)[1]["epoch"]
    state = {**record_pipeline.client_state(case), "epoch": epoch}
    engine.save_checkpoint(os.path.join(out, "again"), client_state=state)
    record_pipeline.train(engine, 1)
    engine.save_checkpoint(os.path.join(out, "step"), client_state=state)


def rank_main(case, load, out):
    import deepspeed
    import torch
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    if case["model"] == "pipeline":
        return pipeline_main(case, load, out)
    more = {key: {"enabled": True, "autoep_size": case["autoep"]} for key in ["expert_parallel"]
            if "autoep" in case}
    if "autotp" in case:
        more["tensor_parallel"] = {"autotp_size": case["autotp"], **case.get("specs", {})}
    config = record_traces.deepspeed_config(
        {"stage": case.get("stage", 1), "load_universal": case.get("universal"), "ds": more}, False)
    if "autoep" in case and "most" in case:  # AutoEP takes the default, which a large model passes
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as fill
        fill.__defaults__ = (case["most"],)
    model = llama_pipeline.build_model(case) if "stages" in case else build_model(case)
    parameters = list(model.parameters())
    if case["model"] == "llama" and "frozen" in case:
        matrices = [p for name, p in model.named_parameters()
                    if ".layers." in name and p.dim() == 2]
        for parameter in matrices[case["frozen"] - 1::case["frozen"]]:
            parameter.requires_grad = False
    if case["model"] == "moe":
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
        parameters = split_params_into_different_moe_groups_for_optimizer(
            {"params": parameters, "name": "dense-params"},
            **({"max_group_size": case["most"]} if "most" in case else {}))
    engine = deepspeed.initialize(model=model, config=config, model_parameters=parameters)[0]
    client = engine.load_checkpoint(load)[1]
    state = {key: client[key] for key in ("note", "epoch", "nested") if key in client}
    engine.save_checkpoint(os.path.join(out, "again"), client_state=state)
    if "clip" in case:  # not by the config: a load brings the file's back
        engine.optimizer.clip_grad = case["clip"]
    if "stages" in case or "specs" in case:  # pipelines, and heads whose words are cut
        return
    rank = torch.distributed.get_rank() // case.get("autotp", 1)
    words = 11 if case["model"] == "moe" else case.get("sizes", {}).get("vocab_size", 64)
    ids = torch.randint(0, words, (8, 1, 8), generator=torch.Generator().manual_seed(7))[rank]
    loss = engine(input_ids=ids, labels=ids)
    engine.backward(loss if torch.is_tensor(loss) else loss.loss)
    engine.step()
    engine.save_checkpoint(os.path.join(out, "step"), client_state=state)


def run_ranks(case, world, load, out):
    """What went wrong; nothing if all ranks ended well."""
    os.makedirs(out)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    ranks = []
    for rank in range(world):
        env = {**record_traces.environment(sys.executable), "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": port, "RANK": str(rank), "LOCAL_RANK": str(rank),
               "WORLD_SIZE": str(world), "LOCAL_SIZE": str(world)}
        with open(os.path.join(out, f"log{rank}.txt"), "w") as log:
            ranks.append(subprocess.Popen(
                [sys.executable, os.path.abspath(__file__), "--rank", json.dumps(case), load, out],
                env=env, stdout=log, stderr=subprocess.STDOUT))
    failed = [rank for rank, process in enumerate(ranks) if process.wait(timeout=600)]
    for left in glob.glob(f"/dev/shm/deepspeed_allreduce_buffer_*_{port}_*"):
        os.remove(left)  # DeepSpeed leaves them, and a full /dev/shm lets the next ranks hang
    if not failed:
        return ""
    with open(os.path.join(out, f"log{failed[0]}.txt")) as log:
        return (log.read().strip().splitlines() or ["it said nothing"])[-1]


def difference(expected, found, *flags):
    """The first line of compare_torch.py where it says other than equal."""
    compared = subprocess.run(
        [sys.executable, os.path.join(HERE, "compare_torch.py"), expected, found, *flags],
        capture_output=True, text=True)
    return "" if compared.returncode == 0 else compared.stdout.splitlines()[0]


class Runner:
    def __init__(self, program, work):
        self.program, self.work, self.steps = program, work, {}

    def isoshard(self, *arguments):
        return subprocess.run([self.program, *arguments], capture_output=True, text=True)

    def sections(self, folder):
        rows = [line.split() for line in self.isoshard("digest", folder).stdout.splitlines()]
        return {row[1]: row[0] for row in rows if row[1] in ("weights", "exp_avg", "exp_avg_sq",
                                                             "steps")}

    def resharded(self, source, target, to):
        made = self.isoshard("reshard", source, target, "--quiet", "--to", *to)
        if made.returncode:
            raise RuntimeError(made.stderr)
        return target

    def convert(self, name, source, to):
        folder = os.path.join(self.work, re.sub(r"\W+", "_", name))
        target = self.resharded(os.path.join(RECORDINGS, source, "ckpt"),
                                os.path.join(folder, "target"), to)
        ours, theirs = os.path.join(folder, "ours"), os.path.join(folder, "theirs")
        made = self.isoshard("convert", target, ours, "--to", "universal")
        if made.returncode:
            return made.stderr
        other = subprocess.run(
            [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder",
             os.path.join(target, "global_step3"), "--output_folder", theirs,
             "--num_extract_workers", "1", "--num_merge_workers", "1"],
            capture_output=True, text=True, env=record_traces.environment(sys.executable))
        if other.returncode:
            return (other.stderr.strip().splitlines() or ["it said nothing"])[-1]
        return difference(theirs, ours)

    def simulated(self, topology, case, world):
        """What is wrong when real engines load what simulated ranks wrote, and save it again."""
        folder = os.path.join(self.work, re.sub(r"\W+", "_", topology))
        model = case["model"] + ("-frozen" if "frozen" in case else "")
        made = self.isoshard("golden", "--topology", topology.split()[0], "--model", model, "--out",
                             folder, "--quiet")
        out = os.path.join(folder, "out")
        ours = os.path.join(folder, "ckpt")
        failed = made.stderr if made.returncode else run_ranks(case, world, ours, out)
        return failed or difference(ours, os.path.join(out, "again"), "--ignore",
                                    r"\['ds_config'\]|\['module'\]\.state|"
                                    # of folded experts: who of those that share a name came last
                                    r"\['folding'\]\['zero_partition_rank'\]$",
                                    "--ignore-file", "*.py")

    def check(self, name, source, command, case, world, against):
        """(check, what is wrong or nothing) for each."""
        source = os.path.join(RECORDINGS, source, "ckpt")
        folder = os.path.join(self.work, re.sub(r"\W+", "_", name))
        ours, out = os.path.join(folder, "ours"), os.path.join(folder, "out")
        universal = command[0] != "reshard"
        target = os.path.join(ours, "global_step3_universal") if universal else ours
        case, ignored = dict(case), r"\['ds_config'\]"
        if "via" in case:
            source = self.resharded(source, os.path.join(folder, "via"), case.pop("via"))
            ignored += r"|\['name'\]$"  # of the group of experts: the universal form's, ep_size_3
        made = self.isoshard(command[0], source, target, *command[1:], "--quiet")
        failed = made.stderr if made.returncode else run_ranks(case, world, ours, out)
        if failed:
            return [("load", failed)]
        expected = ours
        if command[0] == "migrate":
            expected = os.path.join(RECORDINGS, against, "ckpt")
        elif universal:  # what the other way to the same place gave
            expected = os.path.join(self.work, re.sub(r"\W+", "_", against), "ours")
        found = [("again", difference(expected, os.path.join(out, "again"), "--ignore", ignored,
                                      "--ignore-file", "*.py"))]
        self.steps[name] = self.sections(os.path.join(out, "step"))
        known = f"{against} {case.get('clip', '')}" if against not in self.steps else against
        if against is not None and known not in self.steps:
            theirs = os.path.join(folder, "theirs")
            plain = {key: value for key, value in case.items() if key != "universal"}
            failed = run_ranks(plain, world, os.path.join(RECORDINGS, against, "ckpt"), theirs)
            if failed:
                return found + [("step", failed)]
            self.steps[known] = self.sections(os.path.join(theirs, "step"))
        if against is not None:
            same = self.steps[name] and self.steps[name] == self.steps[known]
            found.append(("step", "" if same else "digests differ"))
        return found


def main():
    if sys.argv[1:2] == ["--rank"]:
        return rank_main(json.loads(sys.argv[2]), *sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default=os.path.join(ROOT, "build", "release", "isoshard"))
    parser.add_argument("--cases", default="", metavar="REGEX")
    options = parser.parse_args()
    work, facts, bad = tempfile.mkdtemp(), 0, 0
    runner = Runner(os.path.abspath(options.program), work)
    for case in CASES:
        if re.search(options.cases, case[0]):
            for check, wrong in runner.check(*case):
                facts, bad = facts + 1, bad + bool(wrong)
                print(f"{case[0]}, {check}: {'WRONG: ' + wrong if wrong else 'equal'}", flush=True)
    for name, *case in CONVERTED:
        if re.search(options.cases, name):
            wrong = runner.convert(name, *case)
            facts, bad = facts + 1, bad + bool(wrong)
            print(f"{name}, converted: {'WRONG: ' + wrong if wrong else 'equal'}", flush=True)
    for topology, *case in SIMULATED:
        name = "simulated " + topology
        if re.search(options.cases, name):
            wrong = runner.simulated(topology, *case)
            facts, bad = facts + 1, bad + bool(wrong)
            print(f"{name}, again: {'WRONG: ' + wrong if wrong else 'equal'}", flush=True)
    shutil.rmtree(work)
    print(f"{facts} facts, {bad} wrong")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
