#!/usr/bin/env python3
"""What a case costs with real processes, and with simulated ranks, in the same run.

    build/peer/venv/bin/python bench/real_case.py [--program build/release/isoshard] [--rounds 3]

A real case: two processes start torch, DeepSpeed 0.19.8 and gloo, train a model of one matrix for a
step at ZeRO 1, and save. A simulated one: 20 steps, a change of topology and stage every three, and
one rank beside it, compared bit for bit (isoshard simulate on all cores, as the two processes have
them). They take turns; the medians and their ratio are printed.
"""
import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time

RANK = """
import sys, torch, deepspeed
torch.set_num_threads(1)
deepspeed.init_distributed(dist_backend="gloo")
model = torch.nn.Linear(8, 8, bias=False)
config = {"train_batch_size": 2, "train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True},
          "zero_optimization": {"stage": 1}, "zero_force_ds_cpu_optimizer": False,
          "zero_allow_untested_optimizer": True,
          "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}}
engine = deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())[0]
loss = engine(torch.ones(1, 8, dtype=torch.bfloat16)).float().pow(2).mean()
engine.backward(loss)
engine.step()
engine.save_checkpoint(sys.argv[1])
"""


def real_case():
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        begin = time.monotonic()
        ranks, logs = [], []
        for rank in range(2):
            environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
                           "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            logs.append(tempfile.TemporaryFile("w+"))
            ranks.append(subprocess.Popen([sys.executable, "-c", RANK, folder], env=environment,
                                          stdout=subprocess.DEVNULL, stderr=logs[-1]))
        try:
            for rank in ranks:
                rank.wait(timeout=300)
        finally:
            for rank in ranks:
                rank.kill()
        seconds = time.monotonic() - begin
        if any(rank.returncode for rank in ranks):
            for log in logs:
                log.seek(0)
            sys.exit("a real case failed:\n" + "\n".join(log.read()[-2000:] for log in logs))
        if not os.path.exists(os.path.join(folder, "latest")):
            sys.exit("a real case saved nothing")
        return seconds


def simulated_case(program, cases):
    begin = time.monotonic()
    out = subprocess.run([program, "simulate", "--cases", str(cases), "--json"], check=True,
                         capture_output=True, text=True).stdout
    seconds = time.monotonic() - begin
    told = json.loads(out.splitlines()[-1])
    if (told["cases"], told["failed"]) != (cases, 0):
        sys.exit("the simulated cases do not hold: " + out)
    return seconds / cases


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default="build/release/isoshard")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    real, simulated = [], []
    real_case()  # reads the libraries in
    for _ in range(options.rounds):
        simulated.append(simulated_case(options.program, 100))
        real.append(real_case())
    print(f"a real case of two processes   {statistics.median(real):.1f} s "
          f"({min(real):.1f} to {max(real):.1f})")
    print(f"a simulated case               {1000 * statistics.median(simulated):.0f} ms "
          f"({1000 * min(simulated):.0f} to {1000 * max(simulated):.0f})")
    print(f"ratio                          "
          f"{statistics.median(real) / statistics.median(simulated):.0f}")


if __name__ == "__main__":
    main()
