"""At stage 0 the norm of the gradients is that of one tensor-parallel rank's shards

Two layers cut by AutoTP over two ranks, bf16 without ZeRO. The norm that `step` clips by holds the
shards of tensor-parallel rank 0 alone, so that gradients are clipped too little, and another step
is taken than at stage 1. Expected: the norm over all shards.
How: `FP16_UnfusedOptimizer.step` (runtime/fp16/unfused_optimizer.py) hands gradients, not
parameters, to `get_weight_norm` (runtime/utils.py), which asks each whether it is model-parallel;
a gradient lacks the attribute `tensor_model_parallel`, so that ranks other than 0 leave it out.
Seen in DeepSpeed 0.19.8 (torch 2.13.0, CPU).
Errata: row 58.
"""
import os
import sys
import tempfile
import traceback

os.environ.update(DS_ACCELERATOR="cpu", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")
import deepspeed
import torch
from torch.multiprocessing import start_processes

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # nothing is to be compiled
sys.excepthook = lambda *e: (traceback.print_exception(*e, file=sys.__stderr__), os._exit(2))


def train(rank, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", None, 2, rank)
    torch.manual_seed(1)
    layers = [torch.nn.Linear(4, n, bias=False) for n in (4, 3)]
    model = torch.nn.Sequential(*layers)
    specs = [{"patterns": ["0.weight$"], "partition_type": "column"},
             {"patterns": ["1.weight$"], "partition_type": "row"}]
    tp = {"autotp_size": 2, "partition_config": {"use_default_specs": False, "layer_specs": specs}}
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True},
              "gradient_clipping": 1.0, "zero_optimization": {"stage": 0}, "tensor_parallel": tp,
              "data_types": {"grad_accum_dtype": "bf16"}, "zero_allow_untested_optimizer": True}
    engine = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.1), config=config)[0]
    engine.backward(engine(torch.ones(1, 4, dtype=torch.bfloat16)).sum())
    squares = sum(p.grad.float().square().sum() for p in engine.module.parameters())
    both = squares.clone()
    torch.distributed.all_reduce(both)
    torch.no_grad()(engine.step)()
    found = torch.tensor([engine.get_global_grad_norm(), squares.sqrt(), both.sqrt()])
    torch.save(found, f"{folder}/{rank}.pt")


with tempfile.TemporaryDirectory() as folder:
    if deepspeed.__version__ < "0.18.3":
        sys.exit(print("cannot be tried: AutoTP takes no partition_config") or 77)
    start_processes(train, (folder,), 2, start_method="fork")
    norm, own, both = torch.load(f"{folder}/0.pt").tolist()
    if abs(norm - both) < 0.01 * both:
        sys.exit(print("gone: the norm holds the shards of both ranks"))
    assert abs(norm - own) < 0.01 * own, (norm, own, both)
    sys.exit(print(f"there: {norm:.4f}, of rank 0's shards; of both: {both:.4f}") or 1)
