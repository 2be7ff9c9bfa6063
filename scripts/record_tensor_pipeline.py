"""Layers of a PipelineModule whose tensors are cut over tensor-parallel ranks, as in Megatron-LM,
for record_pipeline.py. Written from that paper (arXiv 1909.08053, section 3): a matrix is cut by
its outputs or by its inputs, a vocabulary by its rows, padded to a multiple of the ranks.

The caller's client state names what is cut how (`universal_checkpoint_info`), as frameworks that
train so give it to DeepSpeed; ds_to_universal reads nothing else.
"""

VOCABULARY, WIDTH, HIDDEN, BLOCKS = 13, 10, 20, 3


def padded(case):
    return -(-VOCABULARY // case["tensor"]) * case["tensor"]


def universal_info(case):
    return {
        "universal_checkpoint_version": 0.2,
        "original_vocab_size": VOCABULARY,
        "padded_vocab_size": padded(case),
        "vocabulary_parameter_patterns": [r"tied_modules\.embed\.weight"],
        "tp_replicated_parameter_patterns": [r"\d+\.norm\.weight", r"\d+\.norm\.bias",
                                             r"\d+\.down\.bias", r"\d+\.scale"],
        "parameter_with_row_parallelism_patterns": [r"\d+\.down\.weight"],
        "parameter_with_2_sub_params_cat_dim_0": [r"\d+\.gate_up\.weight"],
    }


def layers_of(case, grid):
    import torch
    from deepspeed.pipe import LayerSpec, TiedLayerSpec
    from torch import nn
    ranks, rank = case["tensor"], torch.distributed.get_rank() % case["tensor"]

    def group():
        return grid[0].get_slice_parallel_group()

    class Copy(torch.autograd.Function):
        """Into the cut part of a layer: every rank's gradient is a summand."""

        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, gradient):
            gradient = gradient.contiguous().clone()
            torch.distributed.all_reduce(gradient, group=group())
            return gradient

    class Sum(torch.autograd.Function):
        """Out of it: every rank's output is a summand."""

        @staticmethod
        def forward(context, x):
            x = x.contiguous().clone()
            torch.distributed.all_reduce(x, group=group())
            return x

        @staticmethod
        def backward(context, gradient):
            return gradient

    def cut(whole, dim, parts=1):
        """This rank's share of each of the parts along the axis."""
        pieces = [part.chunk(ranks, dim)[rank] for part in whole.chunk(parts, dim)]
        own = nn.Parameter(torch.cat(pieces, dim).contiguous())
        own.tensor_model_parallel = True  # counts on every rank in the norm of the gradients
        return own

    class Embed(nn.Module):
        def __init__(self):
            super().__init__()
            whole = torch.randn(padded(case), WIDTH)
            self.weight = cut(whole, 0)
            self.first = rank * len(self.weight)

        def forward(self, tokens):
            local = tokens - self.first
            outside = (local < 0) | (local >= len(self.weight))
            rows = nn.functional.embedding(local.masked_fill(outside, 0), self.weight)
            return Sum.apply(rows.masked_fill(outside[..., None], 0))

        def logits(self, x):
            own = Copy.apply(x) @ self.weight.t()
            every = [torch.empty_like(own) for _ in range(ranks)]
            torch.distributed.all_gather(every, own.detach().contiguous(), group=group())
            every[rank] = own  # the gradient of its own columns is all a rank needs
            return torch.cat(every, -1)[..., :VOCABULARY]

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(WIDTH)
            self.gate_up = nn.Module()
            self.gate_up.weight = cut(torch.randn(2 * HIDDEN, WIDTH) / 3, 0, parts=2)
            self.gate_up.bias = cut(torch.randn(HIDDEN) / 3, 0)
            self.down = nn.Module()
            self.down.weight = cut(torch.randn(WIDTH, HIDDEN) / 3, 1)
            self.down.bias = nn.Parameter(torch.zeros(WIDTH))
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x):
            gate, up = (Copy.apply(self.norm(x)) @ self.gate_up.weight.t()).chunk(2, -1)
            inner = nn.functional.silu(gate) * (up + self.gate_up.bias)
            return x + self.scale * (Sum.apply(inner @ self.down.weight.t()) + self.down.bias)

    return [TiedLayerSpec("embed", Embed), *[LayerSpec(Block) for _ in range(BLOCKS)],
            TiedLayerSpec("embed", Embed, forward_fn=lambda module, x: module.logits(x))]
