#!/usr/bin/env python3
"""tests/structure.py PROGRAM TRACES: a stage change has the structure of a real file of that stage.

A checkpoint resharded to another stage is compared, key by key and type by type, with a file that
the real DeepSpeed wrote at that stage: the same keys in the same order, the same Python types,
tensors of the same rank and requires_grad. Not compared: values, shapes and the names of
parameters, which belong to the run; ds_config, which carries the source's settings.
"""

import json
import os
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "scripts"))
import compare_torch  # noqa: E402

PROGRAM, TRACES = sys.argv[1:3]
# (source case, target stage, real case of the same kind of model at that stage)
PAIRS = [
    ("z2_offload_dp2", 3, "z3_offload_dp2"),
    ("z3_offload_dp2", 2, "z2_offload_dp2"),
    ("z1_bf16_dp2", 3, "z3_bf16_dp2_frozen"),
    ("z3_bf16_dp2_frozen", 1, "z1_bf16_dp2"),
    ("z1_bf16_dp2", 0, "z0_bf16_dp2"),
    ("z0_bf16_dp2", 1, "z1_bf16_dp2"),
    ("z0_bf16_dp2", 3, "z3_bf16_dp2_frozen"),
    ("z3_fp32_dp2_subgroups", 0, "z0_fp32_dp2"),
    ("z0_fp32_dp2", 3, "z3_fp32_dp2_subgroups"),
    ("z0_fp32_dp2_groups", 1, "z1_fp32_dp3"),
    ("z1_fp32_dp3", 0, "z0_fp32_dp2_groups"),
    ("z3_bf16_dp3", 2, "z2_bf16_dp4"),
    ("z2_bf16_dp4", 3, "z3_bf16_dp5"),
    ("z1_never_stepped_dp2", 3, "z3_never_stepped_dp2"),
    ("z2_sgdm_dp2", 3, "z3_sgdm_dp2"),
    ("z3_sgdm_dp2", 2, "z2_sgdm_dp2"),
]
BY_NAME = {
    "module",
    "param_shapes",
    "frozen_param_shapes",
    "shared_params",
    "frozen_param_fragments",
    "param_slice_mappings",
}
ANY = "any"  # an empty dictionary by names says nothing of its values
SKIPPED = {"ds_config", "lr_scheduler", "_metadata", "loss_scaler"}


def shape_of(item, key=""):
    """The structure of an item, as nested tuples that can be compared and printed."""
    if key in SKIPPED:
        return "…"
    if isinstance(item, compare_torch.Tensor):
        return (
            "tensor",
            len(item.shape) if key not in ("module",) else "-",
            item.requires_grad,
            sorted(item.attributes),
        )
    if isinstance(item, dict):
        if key in BY_NAME:
            kinds = sorted({str(shape_of(value)) for value in item.values()})
            return (type(item).__name__, kinds or ANY)
        inner = [
            (
                name if isinstance(name, str) else "#",
                shape_of(value, name if isinstance(name, str) else ""),
            )
            for name, value in item.items()
        ]
        return (
            type(item).__name__,
            [entry for i, entry in enumerate(inner) if entry not in inner[:i]],
        )
    if isinstance(item, (list, tuple)):
        inner = [str(shape_of(value, key)) for value in item]
        return (type(item).__name__, sorted(set(inner)))
    if isinstance(item, compare_torch.Opaque):
        return ("object", type(item).__name__)
    return type(item).__name__


def same(expected, found):
    if ANY in (expected, found) and {type(expected), type(found)} <= {str, list}:
        return True
    if type(expected) is type(found) and isinstance(expected, (tuple, list)):
        return len(expected) == len(found) and all(map(same, expected, found))
    return expected == found


def first_difference(expected, found, path=""):
    if type(expected) is tuple and type(found) is tuple and len(expected) == len(found):
        for i, (a, b) in enumerate(zip(expected, found)):
            if not same(a, b):
                return first_difference(a, b, f"{path}/{i}")
    if type(expected) is list and type(found) is list:
        for a, b in zip(expected, found):
            if not same(a, b):
                return first_difference(a, b, f"{path}/{a[0] if isinstance(a, tuple) else ''}")
    return f"{path}: expected {expected}, found {found}"


def files_of(folder):
    tag = os.path.join(folder, open(os.path.join(folder, "latest")).read())
    names = sorted(name for name in os.listdir(tag) if name.endswith(".pt"))
    model = [name for name in names if "model_states" in name]
    optim = [name for name in names if "optim_states" in name]
    return [os.path.join(tag, names[0]) for names in (model, optim) if names]


def keys_of(files):
    """Names of dictionary keys anywhere in the optimizer state of a save folder."""
    found = set()

    def collect(item):
        for value in item.values() if isinstance(item, dict) else item:
            if isinstance(value, (dict, list, tuple)):
                collect(value)
        if isinstance(item, dict):
            found.update(key for key in item if isinstance(key, str))

    for path in files:
        document = compare_torch.load(path)
        collect([document.get("optimizer_state_dict"), document.get("optimizer")])
    return found


def check_skipped(case, source_files, ours):
    """certificate.json names what the source has and the target's stage has no place for."""
    lost = (keys_of(source_files) - keys_of(files_of(ours))) & {"clip_grad", "overflow"}
    tag = open(os.path.join(ours, "latest")).read()
    with open(os.path.join(ours, tag, "certificate.json")) as file:
        told = {line.split(":")[0] for line in json.load(file)["skipped"]}
    if told != lost:
        sys.exit(f"FAILED: {case}: the certificate says skipped {told}, lost are {lost}")
    return len(lost)


def main():
    skipped = 0
    for source, stage, real in PAIRS:
        with tempfile.TemporaryDirectory() as work:
            ours = os.path.join(work, "out")
            flags = ["--allow-dropped", "loss_scaler"] if "fp16" in source and stage == 0 else []
            subprocess.run(
                [
                    PROGRAM,
                    "reshard",
                    os.path.join(TRACES, "deepspeed", source, "ckpt"),
                    ours,
                    "--to",
                    f"dp=2,stage={stage}",
                    "--quiet",
                    *flags,
                ],
                check=True,
            )
            expected_files, found_files = files_of(
                os.path.join(TRACES, "deepspeed", real, "ckpt")
            ), files_of(ours)
            skipped += check_skipped(
                f"{source} to stage {stage}",
                files_of(os.path.join(TRACES, "deepspeed", source, "ckpt")),
                ours,
            )
            if len(expected_files) != len(found_files):
                sys.exit(f"FAILED: {source} to stage {stage}: {found_files}, as {expected_files}")
            for a, b in zip(expected_files, found_files):
                expected, found = shape_of(compare_torch.load(a)), shape_of(compare_torch.load(b))
                if not same(expected, found):
                    sys.exit(
                        f"FAILED: {source} to stage {stage}, as {real}: {os.path.basename(b)} "
                        f"{first_difference(expected, found)}"
                    )
        print(f"{source} to stage {stage}: structured as {real}")
    if skipped == 0:
        sys.exit("FAILED: no stage change lost a key, so that the check of 'skipped' saw nothing")


main()
