#!/usr/bin/env python3
"""tests/refused.py PROGRAM TRACES: what cannot be done is refused by name.

For every line of the table: exit status 2, a message that holds the words, and no output left
behind. Also: a checkpoint that lacks one of its shards is refused with the shard's name.
"""

import os
import shutil
import subprocess
import sys
import tempfile

PROGRAM, TRACES = sys.argv[1:3]
# case, --to and flags, words of the message
RESHARDS = [
    ("z1_bf16_dp2", "tp=2", [], "--split-like"),
    ("z1_bf16_dp2", "ep=2", [], "no experts"),
    ("z1_bf16_dp2", "pp=2", [], "ipeline"),
    ("autotp_z1_tp2_dp2", "tp=4", [], "--num-kv-heads"),
    ("autotp_z1_tp2_dp2", "tp=4", ["--num-kv-heads", "1"], "[32, 0]"),
    ("autotp_z1_tp2_dp2", "sp=2", [], "sequence-parallel"),
    ("autotp_z1_tp2_dp2", "tp=1", ["--split-like", "OWN"], "says itself how it is cut"),
    ("autotp_tp2_to_tp1_dp2", "tp=2", ["--split-like", "z1_bf16_dp2"], "not of the same model"),
    ("autotp_uneven_tp3", "tp=2", ["--num-kv-heads", "2"], "[16, 16, 8]"),
    ("autoep_z1_ep2_dp2", "ep=3,dp=3", [], "ValueError"),
    ("moe_z0_one_group", "stage=1", [], "experts and other parameters"),
    ("moe_z1_ep2_dp4", "stage=3", [], "AssertionError"),
    ("moe_z1_ep2_dp4", "ep=8,dp=8", [], "1 2 4"),
    ("moe_z2_ep2_dp2", "tp=2", [], "ensor-parallel"),
]
# case, a file that is taken away, words of the message
SHARDS = [
    ("autotp_z1_tp2_dp2", "mp_rank_01_model_states.pt", "rank 1"),
    ("autotp_z1_tp2_dp2", "bf16_zero_pp_rank_1_mp_rank_01_optim_states.pt", "(mp rank 1)"),
    ("autoep_z1_ep2_dp2", "layer_1_expert_6_mp_rank_00_model_states.pt", "FileNotFoundError"),
    ("autoep_z3_ep2_dp4", "zero_pp_rank_2_mp_rank_00_model_states.pt", "rank 2"),
    ("autoep_z3_ep2_dp4", "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", "rank 1"),
    ("moe_z1_ep2_dp4", "layer_0_expert_3_mp_rank_00_model_states.pt", "deepspeed_experts.3."),
    ("moe_z1_ep2_dp4", "bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt", "rank 3"),
    ("pipe_z1_pp2_dp1", "mp_rank_01_model_states.pt", "rank 1"),
    ("pipe_z1_pp2_dp1", "zero_pp_rank_0_mp_rank_01_optim_states.pt", "rank 1"),
]


def ckpt(case):
    return os.path.join(TRACES, "deepspeed", case, "ckpt")


def refused(command, words):
    result = subprocess.run([PROGRAM, *command], capture_output=True, text=True)
    if result.returncode != 2 or words not in result.stderr:
        sys.exit(f"FAILED: {command}: status {result.returncode}, no {words!r}\n{result.stderr}")


def main():
    for case, target, flags, words in RESHARDS:
        with tempfile.TemporaryDirectory() as work:
            paths = {"OWN": ckpt(case), "z1_bf16_dp2": ckpt("z1_bf16_dp2")}
            flags = [paths.get(flag, flag) for flag in flags]
            refused(["reshard", ckpt(case), work + "/out", "--to", target, *flags], words)
            if os.listdir(work):
                sys.exit(f"FAILED: {case} {target} left {os.listdir(work)}")
    for case, file, words in SHARDS:
        with tempfile.TemporaryDirectory() as work:
            source = shutil.copytree(ckpt(case), os.path.join(work, "source"))
            tag = open(os.path.join(source, "latest")).read()
            os.remove(os.path.join(source, tag, file))
            refused(["digest", source], words)
            refused(["convert", source, work + "/out/x", "--to", "universal"], words)
            if sorted(os.listdir(work)) != ["source"]:
                sys.exit(f"FAILED: {case} without {file} left {os.listdir(work)}")
    print(f"{len(RESHARDS)} reshards and {len(SHARDS)} missing shards refused by name")


main()
