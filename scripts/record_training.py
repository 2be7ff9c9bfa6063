#!/usr/bin/env python3
"""record_traces.py training OUT_DIR: what other programs make of the model that isoshard trains.

Needs torch 2.13.0, transformers 5.6.2 and deepspeed 0.19.8 (README, "Against the real program").
Writes OUT_DIR/model_NAME.json: losses and the first step's gradients of transformers' own
LlamaForCausalLM and MixtralForCausalLM in float64, by autograd, from the initial values and tokens
of reference/model.h and reference/data.h (computed here a second time); state_NAME.json: what these
models and torch.optim.AdamW hold in float32 after three steps; state_zero1_fp32.json,
state_zero1_bf16.json: the same of DeepSpeed's ZeRO 1, on two ranks in float32, and on one with bf16
parameters and gradients, fp32 masters and a forward pass in float32, as isoshard's (DeepSpeed's
default gradient_clipping, 1.0; on two ranks bf16 gradients would be rounded again and again);
optimizer.json: steps of torch.optim in float32, bit for bit; lion.json: steps of DeepSpeed's own
Lion, DeepSpeedCPULion, which is compiled at the first use; schedules.json: DeepSpeed's learning
rates and loss scales.

State is hexadecimal float32, eight digits a value, of all parameters by name and state.
"""

import json
import math
import os
import struct
import sys

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import transformers

MASK = (1 << 64) - 1
IGNORED = -100


def mix(x):
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def keyed(seed, *coordinates):
    word = mix(seed)
    for coordinate in coordinates:
        word = mix(word ^ (coordinate & MASK))
    return word


def name_key(name):
    word = len(name.encode())
    for byte in name.encode():
        word = mix(word ^ byte)
    return word


def f32(x):
    return struct.unpack("<f", struct.pack("<f", x))[0]


def initial(seed, name, shape):
    """reference/model.h, initial_value; float32 arithmetic."""
    count = math.prod(shape)
    key = name_key(name)
    out = []
    for i in range(count):
        unit = f32(((keyed(seed, key, i) >> 40) - (1 << 23)) * 2.0**-23)
        if len(shape) == 1:
            out.append(f32(1.0 + f32(0.125 * unit)))
        else:
            out.append(f32(unit * f32(1.5 / f32(math.sqrt(shape[-1])))))
    return torch.tensor(out, dtype=torch.float64).reshape(shape)


class Data:
    """reference/data.h."""

    def __init__(self, case):
        self.c = case

    def begins(self, sample, position):
        if position == 0:
            return True
        return self.c["packed"] and keyed(self.c["data_seed"], 4, sample, position) % 4 == 0

    def token(self, sample, position):
        return keyed(self.c["data_seed"], 1, sample, position) % self.c["vocabulary"]

    def label(self, sample, position):
        c = self.c
        if position + 1 >= c["length"] or self.begins(sample, position + 1):
            return IGNORED
        if c["masked"] > 0:
            if keyed(c["data_seed"], 3, sample) % c["masked"] == 0:
                return IGNORED
            if keyed(c["data_seed"], 2, sample, position) % c["masked"] == 0:
                return IGNORED
        return self.token(sample, position + 1)

    def position(self, sample, position):
        begin = position
        while not self.begins(sample, begin):
            begin -= 1
        return position - begin

    def batch(self, step):
        c = self.c
        samples = range(step * c["batch"], (step + 1) * c["batch"])
        table = lambda f: torch.tensor(  # noqa: E731
            [[f(s, p) for p in range(c["length"])] for s in samples]
        )
        documents = table(lambda s, p: sum(self.begins(s, q) for q in range(p + 1)))
        seen = documents[:, :, None] == documents[:, None, :]
        seen &= torch.tril(torch.ones(c["length"], c["length"], dtype=torch.bool))
        mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -math.inf)
        return table(self.token), table(self.label), table(self.position), mask[:, None]


def build(case):
    common = dict(
        vocab_size=case["vocabulary"], hidden_size=case["hidden"],
        num_attention_heads=case["heads"], num_key_value_heads=case["kv_heads"],
        head_dim=case["head_size"], num_hidden_layers=case["layers"],
        rms_norm_eps=1e-6, max_position_embeddings=64, tie_word_embeddings=case["tied"],
        attention_bias=False, pad_token_id=None, bos_token_id=None, eos_token_id=None,
        attn_implementation="eager", attention_dropout=0.0,
    )
    if case["experts"]:
        config = transformers.MixtralConfig(
            intermediate_size=case["expert_intermediate"], num_local_experts=case["experts"],
            num_experts_per_tok=case["top_k"], sliding_window=None, router_jitter_noise=0.0,
            **common,
        )
        config._experts_implementation = "eager"  # the grouped one has no float64
        model = transformers.MixtralForCausalLM(config)
    else:
        config = transformers.LlamaConfig(intermediate_size=case["intermediate"], **common)
        model = transformers.LlamaForCausalLM(config)
    model = model.double()
    parts = {}  # our name -> the tensor's part that it is
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("mlp.experts.gate_up_proj"):
                f = case["expert_intermediate"]
                at = name[: -len("gate_up_proj")]
                parts[at + "w1"] = (parameter, slice(0, f))
                parts[at + "w3"] = (parameter, slice(f, 2 * f))
            elif name.endswith("mlp.experts.down_proj"):
                parts[name[: -len("down_proj")] + "w2"] = (parameter, slice(None))
            elif name.endswith("mlp.gate.weight"):  # as AutoEP names it
                parts[name.replace("mlp.gate", "mlp.router.gate")] = (parameter, None)
            else:
                parts[name] = (parameter, None)
        for name, (parameter, part) in parts.items():
            target = parameter if part is None else parameter[:, part]
            target.copy_(initial(case["seed"], name, list(target.shape)))
    return model, parts


def loss_of(model, batch):
    ids, labels, positions, mask = batch
    logits = model(input_ids=ids, position_ids=positions, attention_mask=mask).logits
    return torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORED
    )


def run_model(case):
    model, parts = build(case)
    data = Data(case)
    norms = {n for n, p in model.named_parameters() if p.dim() == 1}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.01)
    result = {"case": case, "losses": [], "gradients": {}}
    assert norms
    for step in range(4):
        optimizer.zero_grad()
        loss = loss_of(model, data.batch(step))
        loss.backward()
        result["losses"].append(loss.item())
        if step == 0:
            for name, (parameter, part) in parts.items():
                grad = parameter.grad if part is None else parameter.grad[:, part]
                result["gradients"][name] = [float(f"{x:.9g}") for x in grad.reshape(-1).tolist()]
        if case["experts"] and case["top_k"] == 1:
            # The weight of the only expert is p / p, whose gradient is 0; transformers takes it in
            # float32, and AdamW makes a step of the noise that is left (some 1e-9).
            for name, (parameter, _) in parts.items():
                if "router" in name:
                    assert parameter.grad.abs().max() < 1e-7
                    parameter.grad.zero_()
        optimizer.step()
    return result


def state_text(tensor):
    return "".join(hexes(tensor.float()))


def run_states(case):
    """Three steps in float32, as torch does them."""
    model, parts = build(case)
    model = model.float()
    data, losses = Data(case), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.01, foreach=False)
    for step in range(STEPS):
        ids, labels, positions, mask = data.batch(step)
        optimizer.zero_grad()
        loss = loss_of(model, (ids, labels, positions, mask.float()))
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    state = {}
    for name, (parameter, part) in parts.items():
        assert parameter.dtype == torch.float32
        kept = {"fp32": parameter, **optimizer.state[parameter]}
        state[name] = {
            key: state_text(kept[key] if part is None else kept[key][:, part])
            for key in ("fp32", "exp_avg", "exp_avg_sq")
        }
    return {"case": case, "losses": losses, "state": state}


class InFloat32(torch.nn.Module):
    """A model whose parameters have the optimizer's dtype, and whose arithmetic is float32."""

    def __init__(self, model):
        super().__init__()
        self.names = [name for name, _ in model.named_parameters()]
        self.weights = torch.nn.ParameterList(p.detach().clone() for p in model.parameters())
        object.__setattr__(self, "model", model)  # not a submodule: its buffers stay as they are

    def forward(self, batch):
        """The sum of the losses."""
        weights = {name: weight.float() for name, weight in zip(self.names, self.weights)}
        ids, labels, positions, mask = batch
        logits = torch.func.functional_call(
            self.model, weights, args=(),
            kwargs=dict(input_ids=ids, position_ids=positions, attention_mask=mask.float()),
        ).logits
        return torch.nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORED,
            reduction="sum",
        )


def zero1_rank(dtype, out):
    """A rank of three steps of ZeRO 1. DeepSpeed takes the mean over ranks; with the factor it is
    that over the batch's tokens, of which ranks may have different numbers."""
    import deepspeed

    import record_traces

    case = {**BASE, **ZERO1}
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    module = InFloat32(build(case)[0].float())
    engine = deepspeed.initialize(
        model=module, model_parameters=module.parameters(),
        config=record_traces.deepspeed_config({"stage": 1, "dtype": dtype}, False))[0]
    each, losses = case["batch"] // ranks, []
    for step in range(STEPS):
        batch = Data(case).batch(step)
        factor = ranks / (batch[1] != IGNORED).sum().item()
        loss = engine([t[rank * each:(rank + 1) * each] for t in batch]) * factor
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        losses.append(mean.item() / ranks)
    truth = record_traces.truth_of(engine, True)
    state = {module.names[int(key.split(".")[-1])]: {
        part: state_text(found[part]) for part in ("fp32", "exp_avg", "exp_avg_sq")}
        for key, found in truth.items()}
    if rank == 0:
        with open(os.path.join(out, dtype + ".json"), "w") as file:
            json.dump({"case": {**case, "ranks": ranks}, "losses": losses, "state": state}, file)


def run_zero1(dtype, ranks, out):
    import record_exchanges

    record_exchanges.run_ranks("zero1", dtype, ranks, out, os.path.abspath(__file__))
    path = os.path.join(out, dtype + ".json")
    with open(path) as file:
        result = json.load(file)
    os.remove(path)
    return result


STEPS = 3
ZERO1 = dict(seed=8, data_seed=8)
BASE = dict(
    seed=1, data_seed=1, vocabulary=13, hidden=8, heads=4, kv_heads=2, head_size=2,
    intermediate=12, layers=2, tied=False, experts=0, top_k=2, expert_intermediate=6,
    length=8, batch=4, packed=False, masked=8,
)
MODELS = {
    "llama": {},
    "llama_packed": dict(packed=True, length=16, seed=2, data_seed=5, head_size=4),
    "llama_mqa_tied": dict(kv_heads=1, tied=True, seed=3),
    "llama_mha": dict(kv_heads=4, heads=4, seed=4, masked=0, layers=1),
    "mixtral": dict(experts=4, seed=5, packed=True, data_seed=7),
    "mixtral_top1": dict(experts=3, top_k=1, seed=6),
}
STATES = ["llama", "llama_packed", "mixtral"]


def hexes(tensor):
    return [f"{x & 0xFFFFFFFF:08x}" for x in tensor.detach().view(torch.int32).reshape(-1).tolist()]


def run_optimizers(ieee_root):
    """torch takes a float32 tensor's root from MKL, which is not always the nearest float; with
    `ieee_root` it is the rounded root in float64, which is. The rest is torch's own."""
    torch.manual_seed(0)
    result = []
    own_root = torch.Tensor.sqrt
    if ieee_root:
        torch.Tensor.sqrt = lambda x: own_root(x.double()).float()
    settings = [
        ("AdamW", dict(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)),
        ("AdamW", dict(lr=3e-4, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.0)),
        ("AdamW", dict(lr=1e-3, betas=(0.3, 0.99), eps=1e-8, weight_decay=0.1)),
        ("SGD", dict(lr=1e-2, momentum=0.9, weight_decay=0.0)),
        ("SGD", dict(lr=1e-2, momentum=0.5, weight_decay=0.1)),
    ]
    for kind, options in settings:
        parameter = torch.nn.Parameter(torch.randn(67))
        optimizer = getattr(torch.optim, kind)([parameter], **options)
        entry = {"kind": kind, "options": options, "start": hexes(parameter.data), "steps": []}
        for step in range(6):
            grad = torch.randn(67) * 10.0 ** torch.randint(-6, 3, (67,)).float()
            grad[:3] = torch.tensor([0.0, -0.0, 1e-42])
            parameter.grad = grad
            optimizer.step()
            state = {k: hexes(v) for k, v in optimizer.state[parameter].items() if v.dim() == 1}
            entry["steps"].append(
                {"gradient": hexes(grad), "parameter": hexes(parameter.data), "state": state}
            )
        result.append(entry)
    torch.Tensor.sqrt = own_root
    return result


def run_lion():
    """DeepSpeed's own Lion. `zeros`: elements that never had a gradient."""
    from deepspeed.ops.lion import DeepSpeedCPULion

    torch.manual_seed(0)
    result = {"runs": [], "zeros": []}
    for kind, options in [
        ("runs", dict(lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)),
        ("runs", dict(lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)),
        ("runs", dict(lr=3e-4, betas=(0.95, 0.98), weight_decay=1.0)),
        ("zeros", dict(lr=1e-2, betas=(0.9, 0.99), weight_decay=0.0)),
    ]:
        count = 35 if kind == "runs" else 3
        parameter = torch.nn.Parameter(torch.randn(count))
        optimizer = DeepSpeedCPULion([parameter], **options)
        entry = {"kind": "Lion", "options": options, "start": hexes(parameter.data), "steps": []}
        for _ in range(4 if kind == "runs" else 2):
            grad = torch.randn(count) * 10.0 ** torch.randint(-6, 3, (count,)).float()
            parameter.grad = grad if kind == "runs" else torch.zeros(count)
            optimizer.step()
            entry["steps"].append({
                "gradient": hexes(parameter.grad), "parameter": hexes(parameter.data),
                "state": {"exp_avg": hexes(optimizer.state[parameter]["exp_avg"])}})
        result[kind].append(entry)
    return result


def run_schedules():
    from deepspeed.runtime import lr_schedules
    from deepspeed.runtime.fp16 import loss_scaler

    rates = []
    for kind, options in [
        ("WarmupLR", dict(warmup_min_lr=0.001, warmup_max_lr=0.01, warmup_num_steps=5,
                          warmup_type="linear")),
        ("WarmupLR", dict(warmup_min_lr=0.0, warmup_max_lr=0.01, warmup_num_steps=7,
                          warmup_type="log")),
        ("WarmupDecayLR", dict(total_num_steps=20, warmup_min_lr=0.0, warmup_max_lr=0.01,
                               warmup_num_steps=4, warmup_type="linear")),
        ("WarmupCosineLR", dict(total_num_steps=20, warmup_num_steps=4, cos_min_ratio=0.01,
                                warmup_min_ratio=0.0, warmup_type="linear")),
    ]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
        schedule = getattr(lr_schedules, kind)(optimizer, **options)
        values = []
        for _ in range(25):
            values.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        rates.append({"kind": kind, "options": options, "rates": [float(v).hex() for v in values]})
    loss_scaler.dist.get_rank = lambda: 1  # it asks before it prints
    scaler = loss_scaler.DynamicLossScaler(
        init_scale=256, scale_window=3, min_scale=1, delayed_shift=2,
        consecutive_hysteresis=False, raise_error_at_min_scale=False, dtype=torch.half)
    overflows = [0, 0, 0, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]
    scales = []
    for overflow in overflows:
        scaler.update_scale(bool(overflow))
        scales.append(scaler.cur_scale)
    return {"rates": rates, "overflows": overflows, "scales": scales}


def record(out):
    os.makedirs(out, exist_ok=True)
    import deepspeed

    versions = {"torch": torch.__version__, "transformers": transformers.__version__,
                "deepspeed": deepspeed.__version__,
                "command": "scripts/record_traces.py training OUT"}

    def write(name, value):
        with open(os.path.join(out, name + ".json"), "w") as file:
            json.dump({"provenance": versions, **value}, file, separators=(",", ":"))
            file.write("\n")
        print(name)

    for name, changes in MODELS.items():
        write("model_" + name, run_model({**BASE, **changes}))
    for name in STATES:
        write("state_" + name, run_states({**BASE, **MODELS[name]}))
    for dtype, ranks in (("fp32", 2), ("bf16", 1)):
        write("state_zero1_" + dtype, run_zero1(dtype, ranks, out))
    write("optimizer", {"runs": run_optimizers(True), "mkl_root": run_optimizers(False)})
    write("lion", run_lion())
    write("schedules", run_schedules())


if __name__ == "__main__":
    if sys.argv[1:3] == ["--rank", "zero1"]:
        zero1_rank(*sys.argv[3:5])
    else:
        sys.exit("record_training: run scripts/record_traces.py training OUT")
