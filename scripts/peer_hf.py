#!/usr/bin/env python3
"""Does the real transformers load what `isoshard export --to hf` wrote, with the live weights?

    peer_hf.py [--program PATH] [CASE…]        (a Python with torch and transformers)

Each recorded checkpoint of a Hugging Face model is exported and loaded by from_pretrained. The
weights must equal, bit for bit, those that DeepSpeed's own files hold (the module of the model
file; the recorded live parameters at stage 3; its own universal form, rounded, where ranks share a
tensor), no key may be missing or unexpected, and the logits must equal those of the same class
with these weights loaded by load_state_dict, in this process. `scripts/peer.py --export` calls it.
Exit status: 0 all equal, 1 something differs.

Not verified: GPUs, sizes above a toy's, tokenizers, remote code.
"""
import argparse
import glob
import json
import os
import subprocess
import sys
import tempfile

import torch
import transformers

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
RECORDINGS = os.path.join(ROOT, "traces", "deepspeed")
CASES = ["trainer_z2_dp2", "sp2_z1_dp2", "sp2_z3_dp1", "autotp_z1_tp2_dp1", "autotp_z1_tp2_dp2",
         "autotp_uneven_tp3", "autotp_qwen2_bias_tp2_dp2_z2", "autotp_tp2_to_tp4_dp1",
         "autoep_z1_ep2_dp2", "autoep_z2_ep4_dp4", "autoep_ep2_to_ep1_dp2"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}


def write_config(case, folder):
    """config.json of the model that the recording trained (its case.json has the sizes)."""
    dim, hidden, more = 32, 48, {}
    if case["model"] == "mixtral":
        dim, hidden = 16, 24
        more = {"num_local_experts": case.get("experts", 8), "num_experts_per_tok": 2}
    config = transformers.AutoConfig.for_model(
        case["model"], hidden_size=case.get("dim", dim),
        intermediate_size=case.get("hidden", hidden),
        num_hidden_layers=case.get("layers", 2), num_attention_heads=case.get("heads", 4),
        num_key_value_heads=case.get("kv_heads", 2), vocab_size=case.get("vocab", 64),
        max_position_embeddings=64, tie_word_embeddings=bool(case.get("tied", False)), **more)
    config.dtype = DTYPES[case.get("dtype", "bf16")]
    config.architectures = [type(transformers.AutoModelForCausalLM.from_config(config)).__name__]
    config.save_pretrained(folder)


def stacked(module, folder):
    """AutoEP's model file and expert files, as the model of transformers 5 holds them."""
    found = {name.replace(".router.", "."): tensor for name, tensor in module.items()
             if ".gate.gate." not in name}
    experts = {}
    for path in glob.glob(os.path.join(folder, "layer_*_expert_*")):
        experts.update(torch.load(path, weights_only=False))
    for prefix in sorted({name.rsplit(".", 2)[0] for name in experts}):
        w1, w2, w3 = (torch.stack([experts[f"{prefix}.{w}.{number}"] for number in range(
            sum(name.startswith(f"{prefix}.{w}.") for name in experts))])
            for w in ("w1", "w2", "w3"))
        found[prefix + ".gate_up_proj"] = torch.cat([w1, w3], 1)
        found[prefix + ".down_proj"] = w2
    return found


def live_weights(source, dtype):
    """name → tensor, by torch alone."""
    files = sorted(glob.glob(os.path.join(source, "ckpt", "*", "mp_rank_*_model_states.pt")))
    if len(files) == 1:
        return stacked(torch.load(files[0], weights_only=False)["module"],
                       os.path.dirname(files[0]))
    live = os.path.join(source, "truth", "rank0.pt")
    if not files:
        return {name: entry["param"] for name, entry in
                torch.load(live, weights_only=False).items() if isinstance(entry, dict)}
    found = {}
    with open(os.path.join(source, "case.json")) as file:  # A_to_B holds what A's form holds
        held_by = json.load(file).get("load_from", os.path.basename(source)).split("/")[0]
    zero = os.path.join(RECORDINGS, held_by, "universal", "*", "zero")
    for path in glob.glob(os.path.join(zero, "*", "fp32.pt")):
        held = torch.load(path, weights_only=False)
        held = held["param"] if isinstance(held, dict) else held
        found[os.path.basename(os.path.dirname(path))] = held.to(dtype)
    return found


def logits(model):
    torch.manual_seed(5)
    ids = torch.randint(0, model.config.vocab_size, (2, 9))
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def bits(tensor):
    return tensor.detach().contiguous().view(torch.uint8)


def check(program, name, work):
    """What is wrong; nothing if all is equal."""
    source = os.path.join(RECORDINGS, name)
    with open(os.path.join(source, "case.json")) as file:
        case = json.load(file)
    while "load_from" in case and "model" not in case:
        with open(os.path.join(RECORDINGS, case["load_from"].split("/")[0], "case.json")) as file:
            case = {**json.load(file), **case}
    target, config, flags = os.path.join(work, "hf"), os.path.join(work, "config"), []
    if not os.path.exists(os.path.join(source, "ckpt", "config.json")):
        write_config(case, config)
        flags = ["--config", config]
    done = subprocess.run([program, "export", os.path.join(source, "ckpt"), target, "--quiet",
                           *flags], capture_output=True, text=True)
    if done.returncode:
        return [done.stderr.strip()]
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        target, dtype="auto", output_loading_info=True)
    wrong = [f"{kind}: {sorted(info[kind])[:3]}" for kind in
             ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]]
    live, held = live_weights(source, model.dtype), model.state_dict()
    wrong += [f"{key} differs" for key in live if key not in held or live[key].dtype !=
              held[key].dtype or not torch.equal(bits(live[key]), bits(held[key]))]
    wrong += [f"{key} is not in DeepSpeed's files" for key in held if key not in live
              and not (key == "lm_head.weight" and model.config.tie_word_embeddings)]
    other = type(model)._from_config(model.config, dtype=model.dtype)  # buffers keep theirs
    other.load_state_dict(live, strict=False)
    if not torch.equal(bits(logits(model)), bits(logits(other))):
        wrong.append("logits differ")
    if not wrong:
        print(f"{name}: {len(live)} tensors ({model.dtype}) and the logits equal", flush=True)
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=CASES, metavar="CASE")
    parser.add_argument("--program", default=os.path.join(ROOT, "build", "release", "isoshard"))
    options = parser.parse_args()
    bad = 0
    for name in options.cases:
        with tempfile.TemporaryDirectory() as work:
            wrong = check(options.program, name, work)
        bad += bool(wrong)
        for text in wrong[:5]:
            print(f"{name}: WRONG: {text}")
    print(f"transformers {transformers.__version__}: {len(options.cases)} exports, {bad} wrong")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
