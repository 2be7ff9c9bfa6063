#!/usr/bin/env python3
"""Writes traces/rules/pipeline_parts.json: what DeepSpeed's partition rules give for many layers.

    record_parts.py > traces/rules/pipeline_parts.json     (a Python with DeepSpeed)

Weights of layers drawn at random under a fixed seed, with ties, zeros, fewer layers than stages,
and a few of real models. tests/pipeline_rules_test.cc holds our rules to it.

Not verified: other versions of DeepSpeed than the one it says.
"""
import contextlib
import json
import random
import sys


def weights_of(kind, count):
    draw = {0: lambda: random.choice([0, 1]), 1: lambda: random.randint(0, 5),
            2: lambda: random.randint(0, 10**12), 3: lambda: 7}[kind]
    weights = [draw() for _ in range(count)]
    if kind == 3 and count > 2:
        weights[0] = weights[-1] = random.choice([3, 40])
    return weights


def main():
    with contextlib.redirect_stdout(sys.stderr):
        import deepspeed
        from deepspeed.runtime.utils import partition_balanced, partition_uniform
    random.seed(11)
    wanted = [(weights_of(random.randint(0, 3), random.randint(1, 14)), random.randint(1, 8))
              for _ in range(160)]
    for layers, stages in ((34, 4), (26, 8), (50, 16)):
        wanted.append(([50257 * 64] + [64 * 64 * 12] * (layers - 3) + [64, 50257 * 64], stages))
    rows = [json.dumps({"weights": weights, "stages": stages,
                        "uniform": [int(x) for x in partition_uniform(len(weights), stages)],
                        "balanced": [int(x) for x in partition_balanced(weights, stages)]})
            for weights, stages in wanted]
    print('{"deepspeed": "%s",\n "cases": [' % deepspeed.__version__)
    print("  " + ",\n  ".join(rows) + "\n]}")


main()
