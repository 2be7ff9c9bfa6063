"""Under Ulysses the scale of the gradients depends on the ZeRO stage and on how losses are added

With `parallel_state_sp` as mpu, two ranks a sequence, gradients are those of the whole sequence
times 2.0 at stages 0, 1, 2 and times 1.0 at stage 3, where the losses are put together by a
differentiable all_gather, as the tutorial does; and times 1.0 and 0.5 where they are put together
by an in-place all_reduce, which autograd does not see. The losses are equal each time.

Expected: one factor. How: the backward of the all_gather adds what both ranks ask for (factor P);
stages 0 to 2 divide the sum over all W ranks by W/P, and so does stage 3 without `reduce_scatter`
(2.0); with it, which is its default, stage 3 divides by W. Adam hides a constant factor; clipping, the norm, SGD and float16's overflow do not. Seen in
DeepSpeed 0.19.8 (torch 2.13.0, CPU).
Errata: row 61.
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

try:
    from deepspeed.runtime.sequence_parallel import parallel_state_sp
except ImportError as error:
    sys.exit(print(f"cannot be tried: {error}") or 77)

TOKENS, WIDTH = 6, 4
EXPECTED = {("gathered", 0): 2.0, ("gathered", 1): 2.0, ("gathered", 2): 2.0, ("gathered", 3): 1.0,
            ("reduced", 2): 1.0, ("reduced", 3): 0.5, ("gathered without reduce_scatter", 3): 2.0}


def network():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(WIDTH, 8), torch.nn.Tanh(), torch.nn.Linear(8, WIDTH))


def loss_of(model, tokens, wanted):
    return torch.nn.functional.mse_loss(model(tokens), wanted)


def train(rank, folder, aggregation, stage):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo", f"file://{folder}/ranks", None, 2, rank)
    deepspeed.init_distributed("gloo")
    parallel_state_sp.initialize_sequence_parallel(2)
    zero = {"stage": stage, "reduce_scatter": "without" not in aggregation}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero,
              "sequence_parallel_size": 2}
    model = network()
    engine = deepspeed.initialize(None, model, torch.optim.SGD(model.parameters(), 1.0),
                                  mpu=parallel_state_sp,
                                  config={**config, "gradient_clipping": 0.0,
                                          "zero_allow_untested_optimizer": True})[0]
    tokens, wanted = torch.load(f"{folder}/batch")
    part = slice(rank * TOKENS // 2, (rank + 1) * TOKENS // 2)
    loss = loss_of(engine, tokens[part], wanted[part])
    if aggregation.startswith("gathered"):
        losses = torch.distributed.nn.functional.all_gather(loss)
        loss = sum(losses) / 2
    else:
        loss = loss / 2
        torch.distributed.all_reduce(loss)
    engine.backward(loss)
    from deepspeed.utils import safe_get_full_grad
    found = [safe_get_full_grad(p) for p in engine.module.parameters()]
    if rank == 0:
        torch.save([loss.detach(), *[one.clone() for one in found]], f"{folder}/found")


def factor(aggregation, stage):
    with tempfile.TemporaryDirectory() as folder:
        generator = torch.Generator().manual_seed(2)
        tokens, wanted = (torch.randn(TOKENS, WIDTH, generator=generator) for _ in range(2))
        torch.save((tokens, wanted), f"{folder}/batch")
        start_processes(train, (folder, aggregation, stage), 2, start_method="fork")
        loss, *found = torch.load(f"{folder}/found")
    model = network()
    exact = loss_of(model, tokens, wanted)
    exact.backward()
    assert abs(loss - exact) < 1e-5, (loss, exact)
    ratios = torch.cat([(a / p.grad).flatten() for a, p in zip(found, model.parameters())])
    return round(ratios.median().item(), 3)


found = {key: factor(*key) for key in EXPECTED}
text = ", ".join(f"{way} at stage {stage}: {value}" for (way, stage), value in found.items())
if set(found.values()) == {1.0}:
    sys.exit(print(f"gone: {text}") or 0)
assert found == EXPECTED, text
sys.exit(print(f"there: {text}") or 1)
