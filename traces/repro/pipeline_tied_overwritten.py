"""Two pipeline stages that hold different values of a tied weight: the converter keeps the last

A tied weight is stored by the first and by the last stage. Here the files of a save on two stages
are from two runs: stage 1's master of the tied weight is another. `ds_to_universal` succeeds, and
`fp32.pt` holds stage 1's values. Expected: a refusal, or at least a warning. How: `dump_param_fragment`
(checkpoint/ds_to_universal.py) names a fragment by parameter, tensor-parallel rank and partition rank;
the second stage overwrites the first. Seen in DeepSpeed 0.19.8 (torch 2.13.0, CPU).
Errata: row 53.
"""
import os
import sys
import tempfile
import traceback
os.environ.update(DS_ACCELERATOR="cpu", TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD="1")
import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from torch.multiprocessing import start_processes

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # nothing is to be compiled
sys.excepthook = lambda *e: (traceback.print_exception(*e, file=sys.__stderr__), os._exit(2))


def train(rank, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", None, 2, rank)
    deepspeed.init_distributed("gloo")
    tied = [TiedLayerSpec("t", torch.nn.Linear, 4, 4, bias=False) for _ in range(2)]
    plain = LayerSpec(torch.nn.Linear, 4, 4)
    model = PipelineModule(layers=[tied[0], plain, plain, tied[1]], num_stages=2,
                           loss_fn=torch.nn.functional.mse_loss, partition_method="uniform")
    engine = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.1), config={
            "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": 1}})[0]
    engine.train_batch(iter([(torch.ones(1, 4), torch.ones(1, 4))] * 9))
    engine.save_checkpoint(folder, "saved")


with tempfile.TemporaryDirectory() as folder:
    start_processes(train, (folder,), 2, start_method="fork")
    path = f"{folder}/saved/zero_pp_rank_0_mp_rank_01_optim_states.pt"
    state = torch.load(path, weights_only=False)
    with torch.no_grad():
        state["optimizer_state_dict"]["single_partition_of_fp32_groups"][0][:16] = 7.0
    torch.save(state, path)
    flags = "--num_extract_workers 1 --num_merge_workers 1 --inject_missing_state".split()
    sys.argv[1:] = ["--input_folder", f"{folder}/saved", "--output_folder", f"{folder}/u", *flags]
    try:
        ds_to_universal.main(ds_to_universal.parse_arguments())
        found = torch.load(f"{folder}/u/zero/tied_modules.t.weight/fp32.pt")["param"][0, 0].item()
    except (AssertionError, ValueError, RuntimeError) as error:
        found = error
print(f"there: {found} is stage 1's value" if found == 7.0 else f"gone: {found}")
sys.exit(found == 7.0)
