"""The PipelineModule of the recorded pipe_* cases, for record_traces.py and peer_parallel.py.

An embedding, 4 blocks, and a head that projects by a matrix of its own, or, `tied`, by the
embedding's. Settings of a case, beside those of record_traces.py:

    pipeline   number of stages; `world` ranks are pipeline · dp
    method     partition_method ("uniform")
    functions  a function and a Dropout stand before the head, a function behind it: layers without
               a file, and with an empty one
    frozen, buffers   each block's bias does not train; each block has a buffer
    tensor     tensor-parallel ranks: `world` is pipeline · dp · tensor, and the layers are those of
               record_tensor_pipeline.py
"""

VOCABULARY, WIDTH, HIDDEN, BLOCKS, TOKENS = 13, 10, 17, 4, 8
SEED_WEIGHTS, SEED_TOKENS, STEPS = 3, 5, 2


def layers_of(case, grid):
    if "tensor" in case:
        import record_tensor_pipeline
        return record_tensor_pipeline.layers_of(case, grid)
    import torch
    from deepspeed.pipe import LayerSpec, TiedLayerSpec
    from torch import nn

    class Embed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(VOCABULARY, WIDTH))

        def forward(self, tokens):
            return nn.functional.embedding(tokens, self.weight)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(WIDTH)
            self.up = nn.Linear(WIDTH, HIDDEN)
            self.down = nn.Linear(HIDDEN, WIDTH, bias=False)
            self.up.bias.requires_grad_(not case.get("frozen"))
            if case.get("buffers"):
                self.register_buffer("scale", torch.tensor([1.0, 2.0]))

        def forward(self, x):
            return x + self.down(nn.functional.gelu(self.up(self.norm(x))))

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(WIDTH, VOCABULARY, bias=False)

        def forward(self, x):
            return self.proj(x)

    def same(x):
        return x

    middle = [LayerSpec(Block) for _ in range(BLOCKS)]
    if case.get("functions"):
        middle += [same, LayerSpec(nn.Dropout, 0.0)]
    end = [same] if case.get("functions") else []
    if case.get("tied"):
        return [TiedLayerSpec("embed", Embed), *middle, TiedLayerSpec(
            "embed", Embed, forward_fn=lambda module, x: x @ module.weight.t()), *end]
    return [LayerSpec(Embed), *middle, LayerSpec(Head), *end]


def build_model(case):
    import torch
    from deepspeed.pipe import PipelineModule

    def loss(found, labels):
        return torch.nn.functional.cross_entropy(found.float().flatten(0, 1), labels.flatten())

    torch.manual_seed(SEED_WEIGHTS)
    grid = []  # of the ranks, once there is one
    model = PipelineModule(layers=layers_of(case, grid), loss_fn=loss, **stages_of(case),
                           partition_method=case.get("method", "uniform"))
    grid.append(model.mpu())
    return model


def stages_of(case):
    if "tensor" not in case:
        return {"num_stages": case["pipeline"]}
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
    ranks = case["world"] // case["pipeline"] // case["tensor"]
    return {"topology": PipeModelDataParallelTopology(case["pipeline"], case["tensor"], ranks)}


def client_state(case):
    if "tensor" not in case:
        return {"epoch": 2}
    import record_tensor_pipeline
    return {"epoch": 2, "universal_checkpoint_info": record_tensor_pipeline.universal_info(case)}


def parameters_of(case, model):
    """Two groups, by dimensions, where the case says groups: the config's optimizer takes them."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not case.get("groups"):
        return trainable
    return [{"params": [p for p in trainable if p.dim() > 1]},
            {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0}]


def deepspeed_config(case):
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2,
              "zero_optimization": {"stage": case["stage"]},
              "bf16": {"enabled": case["dtype"] == "bf16"},
              "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
              "steps_per_print": 100000, "zero_allow_untested_optimizer": True}
    if case.get("load_universal"):
        config["checkpoint"] = {"load_universal": True}
    return config


def make_engine(case):
    import deepspeed
    model = build_model(case)
    return deepspeed.initialize(model=model, config=deepspeed_config(case),
                                model_parameters=parameters_of(case, model))[0]


def train(engine, steps):
    """Every rank draws the same tokens: what a stage gets depends on no topology but dp = 1."""
    import torch
    generator = torch.Generator().manual_seed(SEED_TOKENS)

    def batches():
        while True:
            tokens = torch.randint(0, VOCABULARY, (1, TOKENS), generator=generator)
            yield tokens, tokens.roll(1, -1)

    source = batches()
    for _ in range(steps):
        engine.train_batch(source)


def truth_of(engine):
    """This stage's parameters, as the model computes with them."""
    return {name: p.detach().clone() for name, p in engine.module.named_parameters()}
