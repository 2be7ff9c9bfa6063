#!/usr/bin/env python3
"""What real ranks say to each other: Ulysses' attention, and training steps of DeepSpeed.

    record_traces.py exchanges traces/exchanges

Writes, with the Python that runs this (torch, DeepSpeed, transformers; one process a rank, gloo):

    ulysses_P_B_S_H_K_D[_packed|_single]/
        full.pt     q [B,H,S,D], k and v [B,K,S,D], grad_out [B,S,H·D], positions [B,S] as float32,
                    and what one process makes of them by autograd in float64, rounded to float32:
                    out [B,S,H·D], dq, dk, dv (causal; tokens of a document see only their own)
        rankN.pt    UlyssesSPAttentionHF on P processes: the rank's out [B,S/P,H·D], dq, dk, dv
                    [B,·,S/P,D]; `calls`: (operation, elements); `sent`: what it hands to its
                    all_to_all_single calls, one behind the other
    distributed.json    DistributedAttention on 2 and 4 processes, batch_dim_idx 0 and 1, heads that
                    the ranks share evenly or not. By case and rank: what the rank hands over (q, k,
                    v, grad_out), what its local attention sees (local_*) and what comes back (out,
                    dq, dk, dv). Whole numbers; the local attention is q·k + v, element by element
    steps.json      the second and third step (forward, backward, step) of a small Llama by stage
                    and with Ulysses: by rank [operation, dtype, elements, ranks of the group] in
                    order; and its parameters' sizes

`packed`: documents of several tokens; `single`: each token is its own document, and grad_out holds
whole numbers, so that the context is the value and dv is exact. Elements are those of the tensor
that a rank hands over, or of a broadcast's and a reduction's own.
"""
import json
import os
import shutil
import socket
import subprocess
import sys

import record_traces

SHAPES = ["2_1_8_4_4_8", "2_2_12_4_2_4", "4_1_8_4_1_8", "4_2_8_8_2_4", "2_2_12_4_2_2_packed",
          "4_1_16_8_2_4_packed", "2_2_4_4_2_2_single", "4_1_8_8_2_2_single"]
# Ranks, batch_dim_idx, batch, tokens of a rank, heads, key-value heads, head size.
DISTRIBUTED = [f"{ranks}_{layout}_2_2_{heads}_{kv_heads}_2"
               for ranks, heads, kv_heads in ((2, 4, 2), (2, 3, 3), (2, 6, 3), (4, 4, 4),
                                              (4, 5, 5), (4, 10, 5))
               for layout in (0, 1)]
WHERE_USED = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0,
              "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
STEPS = {"stage1": {"stage": 1}, "stage2": {"stage": 2}, "stage3": {"stage": 3},
         "stage3_where_used": {"stage": 3, "zero": WHERE_USED},
         "ulysses_stage1": {"stage": 1, "world": 4, "sp": 2}}
OPERATIONS = {"all_reduce": 0, "reduce": 0, "broadcast": 0, "all_gather_into_tensor": 1,
              "all_gather": 1, "reduce_scatter_tensor": 1, "reduce_scatter": 1,
              "all_to_all_single": 1}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


def listen(calls, moved):
    """Every collective of torch.distributed from here on; before DeepSpeed is imported. `moved`:
    what all_to_all_single is given."""
    import torch.distributed as dist

    def elements(value):
        return value.numel() if hasattr(value, "numel") else sum(v.numel() for v in value)

    def wrapped(name, place, function):
        def call(*given, **named):
            tensor = given[place] if len(given) > place else next(
                named[key] for key in ("input", "input_tensor", "tensor") if key in named)
            first = tensor if hasattr(tensor, "numel") else tensor[0]
            group = named.get("group") or next(
                (value for value in given if isinstance(value, dist.ProcessGroup)), None)
            calls.append([name, str(first.dtype)[6:], elements(tensor),
                          dist.get_process_group_ranks(group)])
            if name == "all_to_all_single":
                moved.append(tensor.detach().clone().flatten())
            return function(*given, **named)
        return call

    for name, place in OPERATIONS.items():
        setattr(dist, name, wrapped(name, place, getattr(dist, name)))


def attention(module, q, k, v, *_, position_ids, **__):
    import torch
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    document = (position_ids == 0).cumsum(1)
    seen = (document[:, :, None] == document[:, None, :]).tril()[:, None]
    mask = torch.zeros(seen.shape, dtype=q.dtype).masked_fill(~seen, -torch.inf)
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, mask, dropout=0.0,
                                           scaling=q.shape[-1] ** -0.5, is_causal=False)


def positions(kind, batch, length):
    """The first document of sample b has 3 + b tokens, the next 5, then 3 + b again, and so on."""
    import torch
    places = torch.arange(length).expand(batch, length)
    if kind == "single":
        return torch.zeros(batch, length, dtype=torch.int64)
    if kind == "packed":
        rows = [sum((list(range(n)) for _ in range(length) for n in (3 + b, 5)), [])[:length]
                for b in range(batch)]
        return torch.tensor(rows)
    return places.contiguous()


def ulysses_rank(ranks, out):
    calls, moved = [], []
    listen(calls, moved)
    import deepspeed
    import torch
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    for shape in SHAPES:
        if shape.startswith(ranks + "_"):
            moved.clear()
            ulysses_case(shape, os.path.join(out, "ulysses_" + shape), calls, moved)


def ulysses_case(shape, out, calls, moved):
    import torch
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    ranks, batch, length, heads, kv_heads, size = map(int, shape.split("_")[:6])
    kind = "".join(shape.split("_")[6:])
    rank, part = torch.distributed.get_rank(), length // ranks
    own = slice(rank * part, (rank + 1) * part)
    numbers = torch.Generator().manual_seed(1)
    inputs = [torch.randn(batch, count, length, size, generator=numbers)
              for count in (heads, kv_heads, kv_heads)]
    upstream = torch.randn(batch, length, heads * size, generator=numbers)
    if kind == "single":
        upstream = (upstream * 2).round() + 0.0  # no negative zero
    places = positions(kind, batch, length)

    class Layer(torch.nn.Module):
        num_key_value_groups, is_causal, layer_idx = heads // kv_heads, True, 0

    def run(function, tensors, gradient, *more, **named):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        result = function(Layer(), *leaves, *more, **named)[0]
        result = result.reshape(batch, gradient.shape[1], -1)
        result.backward(gradient)
        parts = {"out": result.detach(), "dq": leaves[0].grad, "dk": leaves[1].grad,
                 "dv": leaves[2].grad}
        return {name: part.float().contiguous() for name, part in parts.items()}

    if rank == 0:
        whole = run(attention, [t.double() for t in inputs], upstream.double(), position_ids=places)
        torch.save({"q": inputs[0], "k": inputs[1], "v": inputs[2], "grad_out": upstream,
                    "positions": places.float(), **whole}, os.path.join(out, "full.pt"))
    layer = UlyssesSPAttentionHF(
        attn=attention, batch_size=batch, attn_head_count=heads, attn_head_size=size,
        kv_head_count=kv_heads, num_hidden_layers=1, seq_length_is_variable=True,
        process_group=torch.distributed.new_group(list(range(ranks))))
    layer.core_attn_implementation = "sdpa"
    calls.clear()
    found = run(layer, [t[:, :, own] for t in inputs], upstream[:, own], None,
                position_ids=places[:, own].contiguous())
    torch.save({**found, "calls": [(name, count) for name, _, count, _ in calls],
                "sent": torch.cat(moved)},
               os.path.join(out, f"rank{rank}.pt"))


def distributed_rank(ranks, out):
    import deepspeed
    import torch
    from deepspeed.utils import groups

    class Mpu:  # uneven heads ask it; without one every rank takes itself for the first
        get_sequence_parallel_rank = staticmethod(torch.distributed.get_rank)

    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    groups.mpu = Mpu
    found = {case: distributed_case(case) for case in DISTRIBUTED if case.startswith(ranks + "_")}
    rank = torch.distributed.get_rank()
    with open(os.path.join(out, f"distributed.{rank}.json"), "w") as file:
        json.dump(found, file)


def distributed_case(case):
    import torch
    from deepspeed.sequence.layer import DistributedAttention
    ranks, layout, batch, tokens, heads, kv_heads, size = map(int, case.split("_"))
    rank = torch.distributed.get_rank()
    numbers = torch.Generator().manual_seed(2)

    def mine(count, most):
        whole = torch.randint(-most, most + 1, (batch, tokens * ranks, count, size),
                              generator=numbers).float()
        part = whole[:, rank * tokens:(rank + 1) * tokens]
        return part.transpose(0, 1).contiguous() if layout == 1 else part.contiguous()

    seen = {}

    class Local(torch.nn.Module):
        def forward(self, q, k, v):
            each = q.shape[2] // k.shape[2]
            o = q * k.repeat_interleave(each, 2) + v.repeat_interleave(each, 2)
            seen.update(q=q, k=k, v=v, out=o)
            for tensor in seen.values():
                tensor.retain_grad()
            return o

    leaves = {"q": mine(heads, 9), "k": mine(kv_heads, 5), "v": mine(kv_heads, 9)}
    upstream = mine(heads, 9)
    for leaf in leaves.values():
        leaf.requires_grad_()
    layer = DistributedAttention(Local(), torch.distributed.new_group(list(range(ranks))),
                                 scatter_idx=2, gather_idx=1 - layout)
    result = layer(*leaves.values(), layout)
    result.backward(upstream)
    found = {**leaves, "grad_out": upstream, "out": result,
             **{"d" + name: leaf.grad for name, leaf in leaves.items()},
             **{"local_" + name: tensor for name, tensor in seen.items()},
             **{"local_d" + name: tensor.grad for name, tensor in seen.items()}}
    return {name: [int(x) for x in tensor.detach().flatten().tolist()]
            for name, tensor in found.items()}


def step_rank(name, out):
    calls = []
    listen(calls, [])
    import deepspeed
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    case = STEPS[name]
    config = AutoConfig.for_model("llama", **SIZES, tie_word_embeddings=False)
    config._attn_implementation = "sdpa"
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config)
    mpu, sp = None, case.get("sp", 1)
    if sp > 1:
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
        mpu = UlyssesSPAttentionHF.register_with_transformers(
            model_name_or_path=model, core_attn_implementation="sdpa", micro_batch_size=1,
            sequence_parallel_size=sp, seq_length_is_variable=True, max_length=64)
    settings = record_traces.deepspeed_config(
        {"stage": case["stage"], "zero": case.get("zero", {})}, False)
    engine = deepspeed.initialize(model=model, config=settings, mpu=mpu,
                                  model_parameters=model.parameters())[0]
    rank = torch.distributed.get_rank()
    tokens = torch.randint(0, 64, (2, 1, 8), generator=torch.Generator().manual_seed(7))
    first, count = rank % sp * (8 // sp), 8 // sp
    tokens = tokens[rank // sp][:, first:first + count]
    places = torch.arange(first, first + count)[None]
    steps = []
    for _ in range(3):  # the first also sets things up and is not recorded
        calls.clear()
        logits = engine(input_ids=tokens, position_ids=places).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
        engine.backward(loss)
        engine.step()
        steps.append(list(calls))
    sizes = [int(getattr(p, "ds_numel", p.numel())) for p in engine.module.parameters()]
    with open(os.path.join(out, f"{name}.{rank}.json"), "w") as file:
        json.dump({"calls": steps[1], "third": steps[2], "parameters": sizes}, file)


def run_ranks(kind, name, ranks, out, script=os.path.abspath(__file__)):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank in range(ranks):
        env = {**record_traces.environment(sys.executable), "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": port, "RANK": str(rank), "LOCAL_RANK": str(rank),
               "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
        processes.append(subprocess.Popen(
            [sys.executable, script, "--rank", kind, name, out], env=env,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
    for process in processes:
        said = process.communicate(timeout=600)[1]
        if process.returncode:
            sys.exit(f"record_exchanges: {kind} {name} failed:\n" + said[-2000:])
    print(kind, name, flush=True)


def take(out, name, ranks):
    """What the ranks wrote of a case, in their order."""
    found = []
    for rank in range(ranks):
        path = os.path.join(out, f"{name}.{rank}.json")
        with open(path) as file:
            found.append(json.load(file))
        os.remove(path)
    return found


def record_distributed(out):
    cases = {}
    for ranks in (2, 4):
        run_ranks("distributed", str(ranks), ranks, out)
        by_rank = take(out, "distributed", ranks)
        cases.update({case: [rank[case] for rank in by_rank] for case in by_rank[0]})
    return {"cases": cases}


def record_steps(out):
    steps = {}
    for name, case in STEPS.items():
        ranks = case.get("world", 2)
        run_ranks("step", name, ranks, out)
        found = take(out, name, ranks)
        steps[name] = {"calls": [rank["calls"] for rank in found],
                       "third": [rank["third"] for rank in found],
                       "parameters": found[0]["parameters"]}
    return steps


def record(out):
    import deepspeed
    import torch
    import transformers
    out = os.path.abspath(out)
    shutil.rmtree(out, ignore_errors=True)
    for shape in SHAPES:
        os.makedirs(os.path.join(out, "ulysses_" + shape))
    for ranks in (2, 4):
        run_ranks("ulysses", str(ranks), ranks, out)
    versions = {"deepspeed": deepspeed.__version__, "torch": torch.__version__.split("+")[0],
                "transformers": transformers.__version__}
    for name, value in (("distributed", record_distributed(out)), ("steps", record_steps(out))):
        with open(os.path.join(out, name + ".json"), "w") as file:
            json.dump({**value, "versions": versions}, file, separators=(",", ":"))
            file.write("\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        ranks_do = {"ulysses": ulysses_rank, "distributed": distributed_rank, "step": step_rank}
        ranks_do[sys.argv[2]](*sys.argv[3:5])
    else:
        sys.exit("record_exchanges: run scripts/record_traces.py exchanges OUT")
