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
    ("z2_rr_dp3", "dp=3", {}, None)]
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
    ("z3_sgdm_dp2", "dp=2,stage=1", "truth")]
# What older versions are asked, of the above.
OLDER = {"z1_bf16_dp2 dp=4", "z1_bf16_dp2 dp=3,stage=2", "z3_bf16_dp3 dp=2", "z2_bf16_dp4 dp=2",
         "z1_fp32_dp3 dp=2", "z1_bf16_dp2 dp=2,stage=3", "z2_bf16_dp4 dp=3"}
READINGS = ["z1_bf16_dp2", "z1_fp32_dp3", "z2_bf16_dp4", "z3_bf16_dp2_frozen"]
