"""The models of `isoshard golden --model llama…` as a PipelineModule, for peer_parallel.py: it is
loaded and saved again, not run.

Embedding, decoder layers, norm, head, or, tied, the embedding's matrix as head; stages are cut by
"type:LlamaDecoderLayer".
"""


def build_model(case):
    import torch
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm
    config = AutoConfig.for_model(
        "llama", num_attention_heads=4, num_key_value_heads=2, vocab_size=64, hidden_size=32,
        intermediate_size=48, num_hidden_layers=2, max_position_embeddings=64)
    size = config.vocab_size, config.hidden_size
    tied = case["model"] == "llama-tied"

    def head(module, x):
        return x @ module.weight.t()

    torch.manual_seed(0)  # what is loaded must not depend on it
    embed = TiedLayerSpec("embed", torch.nn.Embedding, *size) if tied else LayerSpec(
        torch.nn.Embedding, *size)
    layers = [embed,
              *[LayerSpec(LlamaDecoderLayer, config, layer) for layer in range(2)],
              LayerSpec(LlamaRMSNorm, config.hidden_size),
              TiedLayerSpec("embed", torch.nn.Embedding, *size, forward_fn=head) if tied else
              LayerSpec(torch.nn.Linear, config.hidden_size, config.vocab_size, bias=False)]
    return PipelineModule(layers=layers, num_stages=case["stages"], loss_fn=lambda x, y: x.sum(),
                          partition_method="type:LlamaDecoderLayer")
