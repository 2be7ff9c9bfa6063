#!/usr/bin/env python3
"""What real ranks say to each other: Ulysses' attention, and one training step of DeepSpeed.

    record_exchanges.py traces/exchanges

Writes, with the Python that runs this (torch, DeepSpeed, transformers; one process a rank, gloo):

    ulysses_P_B_S_H_K_D/full.pt   q [B,H,S,D], k and v [B,K,S,D], grad_out [B,S,H·D], and what one
                                  process makes of them: out, dq, dk, dv (causal)
    ulysses_…/rankN.pt            UlyssesSPAttentionHF on P processes: the rank's out [B,S/P,H·D],
                                  dq, dk, dv [B,·,S/P,D], and `calls`: (operation, elements)
    steps.json                    one step (forward, backward, step) of a small Llama on 2 ranks, by
                                  stage and with Ulysses: [operation, dtype, elements, ranks] in
                                  order, as rank 0 made them; and its parameters' sizes

Elements are those of the tensor a rank hands over, or of a broadcast's and a reduction's own.
"""
import json
import os
import shutil
import socket
import subprocess
import sys

import record_traces

SHAPES = ["2_1_8_4_4_8", "2_2_12_4_2_8", "4_1_8_4_1_8", "4_2_16_8_2_16"]
STEPS = {"stage1": {"stage": 1}, "stage2": {"stage": 2}, "stage3": {"stage": 3},
         "ulysses_stage1": {"stage": 1, "sp": 2}}
OPERATIONS = {"all_reduce": 0, "reduce": 0, "broadcast": 0, "all_gather_into_tensor": 1,
              "all_gather": 1, "reduce_scatter_tensor": 1, "reduce_scatter": 1,
              "all_to_all_single": 1}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


def listen(calls):
    """Every collective of torch.distributed from here on; before DeepSpeed is imported."""
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
                          dist.get_world_size(group)])
            return function(*given, **named)
        return call

    for name, place in OPERATIONS.items():
        setattr(dist, name, wrapped(name, place, getattr(dist, name)))


def attention(module, q, k, v, *_, **__):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, q, k, v, None, dropout=0.0,
                                           scaling=q.shape[-1] ** -0.5, is_causal=True)


def ulysses_rank(shape, out):
    calls = []
    listen(calls)
    import deepspeed
    import torch
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    ranks, batch, length, heads, kv_heads, size = map(int, shape.split("_"))
    rank, part = torch.distributed.get_rank(), length // ranks
    own = slice(rank * part, (rank + 1) * part)
    numbers = torch.Generator().manual_seed(1)
    inputs = [torch.randn(batch, count, length, size, generator=numbers)
              for count in (heads, kv_heads, kv_heads)]
    upstream = torch.randn(batch, length, heads * size, generator=numbers)

    class Layer(torch.nn.Module):
        num_key_value_groups, is_causal, layer_idx = heads // kv_heads, True, 0

    def run(function, tensors, gradient, *more, **named):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        result = function(Layer(), *leaves, *more, **named)[0]
        result = result.reshape(batch, gradient.shape[1], -1)
        result.backward(gradient)
        parts = {"out": result.detach(), "dq": leaves[0].grad, "dk": leaves[1].grad,
                 "dv": leaves[2].grad}
        return {name: part.contiguous() for name, part in parts.items()}

    if rank == 0:
        whole = run(attention, inputs, upstream)
        torch.save({"q": inputs[0], "k": inputs[1], "v": inputs[2], "grad_out": upstream, **whole},
                   os.path.join(out, "full.pt"))
    layer = UlyssesSPAttentionHF(
        attn=attention, batch_size=batch, attn_head_count=heads, attn_head_size=size,
        kv_head_count=kv_heads, num_hidden_layers=1, seq_length_is_variable=True,
        process_group=torch.distributed.new_group(list(range(ranks))))
    layer.core_attn_implementation = "sdpa"
    calls.clear()
    places = torch.arange(length)[None, own].expand(batch, part).contiguous()
    found = run(layer, [t[:, :, own] for t in inputs], upstream[:, own], None, position_ids=places)
    torch.save({**found, "calls": [(name, count) for name, _, count, _ in calls]},
               os.path.join(out, f"rank{rank}.pt"))


def step_rank(name, out):
    calls = []
    listen(calls)
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
    mpu = None
    if "sp" in case:
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
        mpu = UlyssesSPAttentionHF.register_with_transformers(
            model_name_or_path=model, core_attn_implementation="sdpa", micro_batch_size=1,
            sequence_parallel_size=case["sp"], seq_length_is_variable=True, max_length=64)
    settings = record_traces.deepspeed_config({"stage": case["stage"]}, False)
    engine = deepspeed.initialize(model=model, config=settings, mpu=mpu,
                                  model_parameters=model.parameters())[0]
    rank = torch.distributed.get_rank()
    tokens = torch.randint(0, 64, (2, 1, 8), generator=torch.Generator().manual_seed(7))
    tokens = tokens[0][:, rank * 4:rank * 4 + 4] if mpu else tokens[rank]
    first = rank * 4 if mpu else 0
    places = torch.arange(first, first + tokens.shape[1])[None]
    for _ in range(2):  # the second step is recorded: the first also sets things up
        calls.clear()
        logits = engine(input_ids=tokens, position_ids=places).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
        engine.backward(loss)
        engine.step()
    if rank == 0:
        sizes = [int(getattr(p, "ds_numel", p.numel())) for p in engine.module.parameters()]
        with open(os.path.join(out, name + ".json"), "w") as file:
            json.dump({"calls": calls, "parameters": sizes}, file)


def run_ranks(kind, name, ranks, out):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank in range(ranks):
        env = {**record_traces.environment(sys.executable), "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": port, "RANK": str(rank), "LOCAL_RANK": str(rank),
               "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks)}
        processes.append(subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), "--rank", kind, name, out], env=env,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
    for process in processes:
        said = process.communicate(timeout=300)[1]
        if process.returncode:
            sys.exit(f"record_exchanges: {kind} {name} failed:\n" + said[-2000:])


def main():
    if sys.argv[1] == "--rank":
        kind, name, out = sys.argv[2:5]
        return {"ulysses": ulysses_rank, "step": step_rank}[kind](name, out)
    out = os.path.abspath(sys.argv[1])
    shutil.rmtree(out, ignore_errors=True)
    for shape in SHAPES:
        folder = os.path.join(out, "ulysses_" + shape)
        os.makedirs(folder)
        run_ranks("ulysses", shape, int(shape.split("_")[0]), folder)
        print(shape, flush=True)
    steps = {}
    for name in STEPS:
        run_ranks("step", name, 2, out)
        path = os.path.join(out, name + ".json")
        with open(path) as file:
            steps[name] = json.load(file)
        os.remove(path)
        print(name, flush=True)
    import deepspeed
    import torch
    import transformers
    steps["versions"] = {"deepspeed": deepspeed.__version__,
                         "torch": torch.__version__.split("+")[0],
                         "transformers": transformers.__version__}
    with open(os.path.join(out, "steps.json"), "w") as file:
        json.dump(steps, file, indent=None)
        file.write("\n")


if __name__ == "__main__":
    main()
