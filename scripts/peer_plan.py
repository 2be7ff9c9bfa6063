"""Which checkpoints scripts/peer.py takes, to where, and against what."""
RR_OFF = {"zero": {}}

# Source, engine, what else changes there, what DeepSpeed saved there from its own universal form.
UNIVERSALS = [
    ("z1_bf16_dp2", "dp=2", {}, None), ("z1_bf16_dp2", "dp=4", {}, "z1_dp2_to_z1_dp4"),
    ("z1_bf16_dp2", "dp=3,stage=2", {}, "z1_dp2_to_z2_dp3"), ("z1_fp32_dp3", "dp=3", {}, None),
    ("z1_fp32_dp3", "dp=2", {}, None), ("z2_bf16_dp4", "dp=4", {}, None),
    ("z2_bf16_dp4", "dp=3", {}, None), ("z3_bf16_dp3", "dp=3", {}, None),
    ("z3_bf16_dp3", "dp=2", {}, "z3_dp3_to_z3_dp2"), ("z1_bf16opt_dp2", "dp=3", {}, None),
    ("z2_rr_dp3", "dp=3", RR_OFF, None), ("z2_rr_dp3", "dp=2", RR_OFF, None),
    ("z2_rr_groups_dp2", "dp=3", RR_OFF, None), ("z1_bf16_spill_dp4", "dp=4", {}, None),
    ("z1_align_dp3", "dp=2", {}, None), ("z3_offload_dp2", "dp=3", {}, None),
    ("z3_bf16_dp5", "dp=2", {}, None), ("sp2_z1_dp2", "dp=3,sp=1", {}, None),
    ("sp2_z3_dp1", "dp=2,sp=2", {}, None)]
# Source, target, and theirs: a recording; "universal": DeepSpeed loads its own universal form
# there; "rr": ours is loaded with round robin off, as its own is wrong; "source": what the source
# itself becomes where it stands; "truth": an engine there, set to the recorded truth. The last two
# are for where DeepSpeed cannot go.
RESHARDS = [
    ("z1_bf16_dp2", "dp=4", "z1_dp2_to_z1_dp4"),
    ("z1_bf16_dp2", "dp=3,stage=2", "z1_dp2_to_z2_dp3"),
    ("z3_bf16_dp3", "dp=2", "z3_dp3_to_z3_dp2"), ("z2_bf16_dp4", "dp=2", "universal"),
    ("z3_bf16_dp2_frozen", "dp=3", "universal"), ("z1_fp16_dp2", "dp=3", "universal"),
    ("z1_fp32_dp3", "dp=2", "universal"), ("z1_never_stepped_dp2", "dp=3", "universal"),
    ("z1_bf16opt_dp2", "dp=3", "universal"), ("z3_fp32_dp2_subgroups", "dp=3", "truth"),
    ("z2_rr_dp3", "dp=2", "rr"), ("z2_rr_dp3", "dp=3", "source"),
    ("z1_bf16_dp2", "dp=2,stage=3", "truth"), ("z3_bf16_dp2_frozen", "dp=2,stage=1", "truth"),
    ("z3_bf16_dp3", "dp=3,stage=1", "truth"), ("z1_bf16_dp2", "dp=2,stage=0", "source"),
    ("z0_bf16_dp2", "dp=2,stage=2", "source"), ("z0_fp32_dp2_groups", "dp=2,stage=3", "source"),
    ("z3_never_stepped_dp2", "dp=3,stage=1", None), ("z2_sgdm_dp2", "dp=3", "truth"),
    ("z2_sgdm_dp2", "dp=2,stage=3", "truth"),
    ("z3_sgdm_dp2", "dp=2,stage=1", "truth"), ("z1_bf16_spill_dp4", "dp=2", None),
    ("z1_bf16_spill_dp4", "dp=4", "source"),
    ("z1_bf16opt_spill_dp4", "dp=2", None), ("z1_align_dp3", "dp=2", "universal"),
    ("z2_offload_dp2", "dp=3", "universal"), ("z3_offload_dp2", "dp=3", "universal"),
    ("z3_bf16_dp5", "dp=2", "truth"), ("z2_rr_groups_dp2", "dp=3", "rr"),
    ("z1_adagrad_dp2", "dp=3", "truth"), ("z2_rmsprop_groups_dp2", "dp=2,stage=1", "source"),
    ("z0_fp32_dp2", "dp=2,stage=1", "source"), ("sp2_z1_dp2", "dp=1,sp=2", "truth"),
    ("sp2_z1_dp2", "dp=4,sp=1", "truth"), ("sp2_z3_dp1", "dp=2,sp=2", "truth"),
    ("sp2_z3_dp1", "dp=2,sp=1,stage=1", "truth")]
# Not asked of older versions: Ulysses goes with the transformers of its day; they have neither
# `parameter_alignment` nor this form of bf16 at stage 0 (the loader's "newer" shows it).
NEWEST_ONLY = ("sp2_", "z1_align_dp3 ", "z1_bf16_dp2 dp=2,stage=0")
READINGS = ["z1_bf16_dp2", "z1_fp16_dp2", "z1_fp32_dp3", "z2_bf16_dp4", "z2_offload_dp2",
            "z3_bf16_dp3", "z3_bf16_dp2_frozen"]
LOADERS = [  # versions, function of peer_facts, its arguments: DeepSpeed's own loader is at fault
    ("0.19.8 0.18.9 0.16.9", "universal", ("z2_rr_dp3", "dp=3")),
    ("0.19.8", "universal", ("sp2_z1_dp2", "dp=2,sp=2")),
    ("0.19.8 0.18.9 0.16.9", "subgroups", ("z3_fp32_dp2_subgroups", "dp=3")),
    ("0.19.8 0.18.9 0.16.9", "resaved", ("z3_bf16_dp3", "dp=2")),
    ("0.19.8 0.18.9 0.16.9", "accessors", ("z1_bf16_dp2",)),
    ("0.18.9 0.16.9", "newer", ("z0_bf16_dp2",))]


def plan(version, reference, sources):
    """(group, title, function of peer_facts, its arguments after the peer) of every case."""
    newest = version == reference
    for source in ("z1_bf16_dp2", "z3_bf16_dp3"):
        yield "aa", source, "aa", (source,)
    yield "control", "z2_rr_dp3", "control", ("z2_rr_dp3",)
    for case in UNIVERSALS:
        title = f"{case[0]} {case[1]}"
        if newest or not title.startswith(NEWEST_ONLY):
            yield "universal", title + (" round robin off" if case[2] else ""), "universal", case
    for versions, function, arguments in LOADERS:
        if version in versions:
            yield "loader", " ".join(arguments), function, arguments
    for case in RESHARDS:
        title = f"{case[0]} {case[1]}"
        if newest or not title.startswith(NEWEST_ONLY):
            yield "reshard", title, "reshard", case
    for source in READINGS:
        yield "reading", source, "reading", (source,)
    for source in sources if newest else ():
        yield "matrix", source, "matrix", (source,)
