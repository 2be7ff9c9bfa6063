#!/usr/bin/env python3
"""Makes a ZeRO checkpoint of a GPT-like model in DeepSpeed 0.19.8's file format, untrained.

    make_checkpoint.py OUT [--stage 3] [--parameters 207e6] [--dp 8] [--hidden 1024]
                       [--sparse | --without-torch]

OUT is the save folder: OUT/latest and OUT/global_step3/. Needs torch, but not DeepSpeed; values are
random, padding is zero. Without torch: --without-torch has random bits for values; with --sparse
every storage is a hole, so that the files have their full size and take no room. DeepSpeed's own
tools read them, which scripts/bench shows for torch's. Prints one JSON object: parameters, files,
bytes.
"""
import argparse
import collections
import json
import math
import os

import random_torch_file
import sparse_torch_file

VOCABULARY, POSITIONS = 50304, 1024
TAG, STEP = "global_step3", 3.0
STATES = ("fp32", "exp_avg", "exp_avg_sq")

# ---- the model -----------------------------------------------------------------------------------


def parameter_shapes(parameters, hidden):
    """name → shape, in registration order; as many layers as come nearest to the count."""
    h = hidden
    layer = {"ln_1.weight": (h,), "ln_1.bias": (h,),
             "attn.qkv.weight": (3 * h, h), "attn.qkv.bias": (3 * h,),
             "attn.proj.weight": (h, h), "attn.proj.bias": (h,),
             "ln_2.weight": (h,), "ln_2.bias": (h,),
             "mlp.up.weight": (4 * h, h), "mlp.up.bias": (4 * h,),
             "mlp.down.weight": (h, 4 * h), "mlp.down.bias": (h,)}
    shapes = {"wte.weight": (VOCABULARY, h), "wpe.weight": (POSITIONS, h)}
    rest = parameters - sum(map(math.prod, shapes.values())) - 2 * h
    for number in range(max(1, round(rest / sum(map(math.prod, layer.values()))))):
        shapes.update({f"h.{number}.{name}": shape for name, shape in layer.items()})
    return {**shapes, "ln_f.weight": (h,), "ln_f.bias": (h,)}


def groups_of(shapes):
    """Two param groups, as usual: weight decay for matrices, none for the rest."""
    return [{name: shape for name, shape in shapes.items() if (len(shape) > 1) == decays}
            for decays in (True, False)]


# ---- torch, or what stands in for it -------------------------------------------------------------


class Torch:
    """The same calls as sparse_torch_file.Torch, on real tensors."""

    def register(self):
        import torch
        self.torch, self.Size = torch, torch.Size

    def random(self, numel, rank, kind):
        generator = self.torch.Generator().manual_seed(8 * rank + STATES.index(kind))
        made = self.torch.randn(numel, generator=generator)
        return made.square_() if kind == "exp_avg_sq" else made

    def zero(self, tensor, begin, end):
        tensor[begin:end] = 0

    def view(self, tensor, offset, shape, requires_grad=False):
        made = tensor[offset:offset + math.prod(shape)].view(shape)
        return made.requires_grad_(requires_grad)

    def low_precision(self, tensor):
        return tensor.bfloat16()

    def join(self, tensors):
        return self.torch.cat(tensors)

    def empty(self):
        return self.torch.empty(0, dtype=self.torch.bfloat16)

    def scalar(self, value):
        return self.torch.tensor(value)

    def save(self, tree, path):
        self.torch.save(tree, path)


# ---- files ---------------------------------------------------------------------------------------


class Maker:
    def __init__(self, options):
        self.folder = os.path.join(options.out, TAG)
        self.stage, self.dp, self.sparse = options.stage, options.dp, options.sparse
        self.torch = (sparse_torch_file.Torch() if options.sparse else
                      random_torch_file.Torch() if options.without_torch else Torch())
        self.classes = sparse_torch_file.deepspeed_classes()
        self.torch.register()
        self.shapes = parameter_shapes(options.parameters, options.hidden)
        self.groups = groups_of(self.shapes)
        self.config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1,
                       "zero_optimization": {"stage": self.stage}, "bf16": {"enabled": True}}
        self.templates = {}

    def param_groups(self):
        return [{"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": decay,
                 "amsgrad": False, "maximize": False, "foreach": None, "capturable": False,
                 "differentiable": False, "fused": None, "decoupled_weight_decay": True,
                 "params": [number]} for number, decay in enumerate((0.1, 0.0))]

    def scaler(self):
        return {"loss_scaler": self.classes.LossScaler(cur_scale=1.0, dynamic=False),
                "dynamic_loss_scale": False, "overflow": False}

    def base_state(self, moments):
        """moments: per group {state: tensor}."""
        return {"state": {number: {"step": self.torch.scalar(STEP), **group}
                          for number, group in enumerate(moments)},
                "param_groups": self.param_groups()}

    def model_states(self, module):
        ordered, zero3 = collections.OrderedDict, self.stage == 3
        shapes = [ordered((name, self.torch.Size(shape)) for name, shape in group.items())
                  for group in self.groups]
        return {"module": ordered(module), "buffer_names": [], "optimizer": None,
                "param_shapes": shapes, "frozen_param_shapes": ordered() if zero3 else None,
                "shared_params": {}, "frozen_param_fragments": ordered() if zero3 else None,
                "lr_scheduler": None, "data_sampler": None, "random_ltd": None, "skipped_steps": 0,
                "global_steps": int(STEP), "global_samples": int(STEP) * self.dp,
                "dp_world_size": self.dp, "mp_world_size": 1,
                "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
                "ds_config": self.config, "ds_version": "0.19.8"}

    def save(self, name, tree):
        self.torch.save(tree, os.path.join(self.folder, name))

    def save_optimizer(self, rank, states):
        self.save(f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
                  {"optimizer_state_dict": states, "ds_config": self.config,
                   "ds_version": "0.19.8"})

    # ---- stage 3: each parameter is cut for itself -----------------------------------------------

    def flat_slots(self, group, rank, kind):
        """Slots of ceil(n / dp) elements; what lies behind a parameter's end is zero."""
        slots = [-(-math.prod(shape) // self.dp) for shape in group.values()]
        flat, begin = self.torch.random(sum(slots), rank, kind), 0
        for shape, slot in zip(group.values(), slots):
            real = min(max(math.prod(shape) - rank * slot, 0), slot)
            if real < slot:
                self.torch.zero(flat, begin + real, begin + slot)
            begin += slot
        return flat

    def zero3_rank(self, rank):
        module = {name: self.torch.empty() for name in self.shapes}
        self.save(f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", self.model_states(module))
        numbers = {name: number for number, name in enumerate(self.shapes)}
        masters, moments = [], []
        for group in self.groups:
            master = self.flat_slots(group, rank, "fp32")
            master.requires_grad = True
            master.ds_id = f"{numbers[min(group, key=numbers.get)]}_{numbers[list(group)[-1]]}"
            masters.append(master)
            moments.append({kind: self.flat_slots(group, rank, kind) for kind in STATES[1:]})
        self.save_optimizer(rank, {
            "zero_stage": self.classes.ZeroStageEnum(3), **self.scaler(),
            "partition_count": self.dp, "optimizer_state_dict": self.base_state(moments),
            "fp32_flat_groups": masters})

    def zero3_copy(self, rank):
        """Sparse files of ranks whose numbers have equally many digits differ in names only."""
        first = 10 ** (len(str(rank)) - 1)
        for pattern in ("zero_pp_rank_{}_mp_rank_00_model_states.pt",
                        "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"):
            pieces, size = self.templates[pattern.format(first)]
            old, new = (f"zero_pp_rank_{number}_".encode() for number in (first, rank))
            sparse_torch_file.write_pieces(
                os.path.join(self.folder, pattern.format(rank)),
                [(offset, data.replace(old, new)) for offset, data in pieces], size)

    def make_zero3(self):
        for rank in range(self.dp):
            # 0 stands alone; all ranks but it copy the first of their number of digits.
            if not self.sparse or rank == 0 or rank == 10 ** (len(str(rank)) - 1):
                self.zero3_rank(rank)
                if self.sparse:
                    self.remember(rank)
            else:
                self.zero3_copy(rank)

    def remember(self, rank):
        for name in (f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt",
                     f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"):
            self.templates[name] = read_pieces(os.path.join(self.folder, name))

    # ---- stages 1 and 2: each group is cut as one buffer -----------------------------------------

    def partition(self, group, rank):
        """(elements a rank, padding at the end of this rank's part, {name: fragment_address})."""
        total = sum(map(math.prod, group.values()))
        part = 2 * -(-total // (2 * self.dp))
        low, addresses, begin = rank * part, collections.OrderedDict(), 0
        for name, shape in group.items():
            start, end = max(begin, low), min(begin + math.prod(shape), low + part)
            if start < end:
                addresses[name] = self.classes.fragment_address(numel=end - start,
                                                                start=start - low)
            begin += math.prod(shape)
        return part, min(part, max(0, low + part - total)), addresses

    def zero12_rank(self, rank):
        masters, moments, paddings, maps = [], [], [], []
        for group in self.groups:
            part, padding, addresses = self.partition(group, rank)
            flat = {kind: self.torch.random(part, rank, kind) for kind in STATES}
            for tensor in flat.values():
                self.torch.zero(tensor, part - padding, part)
            masters.append(flat.pop("fp32"))
            moments.append(flat)
            paddings.append(padding)
            maps.append(addresses)
        self.save_optimizer(rank, {
            **self.scaler(), "clip_grad": 1.0, "base_optimizer_state": self.base_state(moments),
            "single_partition_of_fp32_groups": [
                self.torch.view(master, 0, (master.shape[0] - padding,), True)
                for master, padding in zip(masters, paddings)],
            "zero_stage": self.classes.ZeroStageEnum(self.stage), "group_paddings": paddings,
            "param_alignment_paddings": [[0] * len(group) for group in self.groups],
            "partition_count": [self.dp] * len(self.groups), "ds_version": "0.19.8",
            "param_slice_mappings": maps})
        return [self.torch.low_precision(master) for master in masters]

    def make_zero12(self):
        parts = [self.zero12_rank(rank) for rank in range(self.dp)]
        module = {}
        for group, buffers in zip(self.groups, zip(*parts)):
            flat, begin = self.torch.join(list(buffers)), 0
            for name, shape in group.items():
                module[name] = self.torch.view(flat, begin, shape)
                begin += math.prod(shape)
        self.save("mp_rank_00_model_states.pt",
                  self.model_states({name: module[name] for name in self.shapes}))

    def make(self):
        os.makedirs(self.folder)
        self.make_zero3() if self.stage == 3 else self.make_zero12()
        with open(os.path.join(os.path.dirname(self.folder), "latest"), "w") as stream:
            stream.write(TAG)


def read_pieces(path):
    """What write_pieces was given, found again by asking for the holes."""
    pieces, at, size = [], 0, os.path.getsize(path)
    with open(path, "rb") as stream:
        while at < size:
            try:
                begin = os.lseek(stream.fileno(), at, os.SEEK_DATA)
            except OSError:  # only a hole follows
                break
            at = os.lseek(stream.fileno(), begin, os.SEEK_HOLE)
            pieces.append((begin, os.pread(stream.fileno(), at - begin, begin)))
    return pieces, size


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("out")
    parser.add_argument("--stage", type=int, default=3, choices=(1, 2, 3))
    parser.add_argument("--parameters", type=float, default=207e6, help="about this many")
    parser.add_argument("--dp", type=int, default=8, help="ranks")
    parser.add_argument("--hidden", type=int, default=1024)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--sparse", action="store_true", help="storages are holes; no torch")
    kind.add_argument("--without-torch", action="store_true", help="storages are random bits")
    options = parser.parse_args()
    maker = Maker(options)
    maker.make()
    files = [entry.stat() for entry in os.scandir(maker.folder)]
    print(json.dumps({"folder": maker.folder, "stage": options.stage, "dp": options.dp,
                      "tensors": len(maker.shapes),
                      "parameters": sum(map(math.prod, maker.shapes.values())),
                      "files": len(files), "bytes": sum(status.st_size for status in files),
                      "bytes_on_disk": sum(status.st_blocks for status in files) * 512}))


if __name__ == "__main__":
    main()
