"""The Llama of the recordings `sp2_*`, with or without Ulysses, for scripts/peer_case.py.

The same small model, seed and loss as the recordings: a rank has its own part of one sequence of
eight tokens, and the labels are the tokens themselves. Without Ulysses (sp=1) a rank has a sequence
of its own. Needs transformers beside DeepSpeed.

Not verified: attention itself; what is compared is the state before and after a step.
"""
import record_traces

VOCABULARY, SEQUENCE = 64, record_traces.TOKENS


def build_model(case):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    config = AutoConfig.for_model(
        "llama", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=case["kv_heads"], vocab_size=VOCABULARY, max_position_embeddings=64,
        tie_word_embeddings=False)
    config._attn_implementation = "sdpa"
    torch.manual_seed(record_traces.SEED_WEIGHTS)
    return AutoModelForCausalLM.from_config(config)


def register(case, model):
    """What `deepspeed.initialize` calls mpu; None without Ulysses."""
    if case.get("ulysses", 1) == 1:
        return None
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    return UlyssesSPAttentionHF.register_with_transformers(
        model_name_or_path=model, core_attn_implementation="sdpa",
        sequence_parallel_size=case["ulysses"], micro_batch_size=1, seq_length_is_variable=True,
        max_length=64)


def loss_of(engine, case, generator, rank):
    """One sequence for each data rank; its Ulysses ranks take consecutive parts of it."""
    import torch
    degree = case.get("ulysses", 1)
    size = (case["world"] // degree, 1, SEQUENCE)
    tokens = torch.randint(0, VOCABULARY, size, generator=generator)[rank // degree]
    part = SEQUENCE // degree
    mine = slice(rank % degree * part, (rank % degree + 1) * part)
    tokens, positions = tokens[:, mine], torch.arange(SEQUENCE)[None, mine]
    logits = engine(input_ids=tokens, position_ids=positions).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
