"""Tiny random decoders of many architectures, and batches for them."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

VOCAB = 61
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = 9
_MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
    "head_dim": 4,
    "num_key_value_heads": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
_LINEAR = {
    "head_dim": 8,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 16,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
DECODERS = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": None},
    "mistral_window": {"model_type": "mistral", "sliding_window": WINDOW},
    "qwen3_mixed_window": {
        "model_type": "qwen3",
        "head_dim": 8,
        "sliding_window": WINDOW,
        "use_sliding_window": True,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "num_hidden_layers": 4,
    },
    "qwen2": {},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": {"head_dim": 8, "sliding_window": WINDOW, "attn": "eager"},
    "gemma3_text": {"head_dim": 8, "sliding_window": WINDOW, "sliding_window_pattern": 2},
    "phi3": {},
    "olmo2": {},
    "granite": {"residual_multiplier": 0.3, "embedding_multiplier": 2.0},
    "smollm3": {},
    "cohere": {},
    "stablelm": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "gpt2": {"n_positions": 512, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neox": {"rotary_pct": 0.5},
    "gpt_bigcode": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "starcoder2": {"sliding_window": WINDOW},
    "phi": {},
    "persimmon": {},
    "gemma": {"head_dim": 8},
    "gemma4_text": {
        "head_dim": 8,
        "global_head_dim": 8,
        "sliding_window": WINDOW,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8,
    },
    "glm4": {"head_dim": 8},
    "exaone4": {"sliding_window": WINDOW},
    "cohere2": {"sliding_window": WINDOW},
    "nemotron": {},
    "olmo": {},
    "olmo3": {"sliding_window": WINDOW},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "ernie4_5": {},
    "hunyuan_v1_dense": {"head_dim": 8},
    "seed_oss": {"head_dim": 8},
    "deepseek_v2": _MLA,
    "deepseek_v3": {**_MLA, "n_routed_experts": 4},
    "minicpm3": _MLA,
    "gpt_oss": {
        "head_dim": 8,
        "sliding_window": WINDOW,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "attn": "eager",
    },
    # hybrids: the blocks with attention are routed, those with a state are not
    "qwen3_next": {**_LINEAR, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "qwen3_5_text": _LINEAR,
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "nemotron_h": {
        "layer_types": ["linear_attention", "full_attention", "mlp", "full_attention"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
    },
}
HYBRIDS = ("qwen3_next", "qwen3_5_text", "lfm2", "nemotron_h")
# learned positions are counted from the start of the padded row, so a left-padded batch must name them
PLACED = ("gpt2", "gpt_bigcode")


def tiny_decoder(name: str, seed: int = 0, **overrides) -> PreTrainedModel:
    """A tiny random causal LM in evaluation mode, fp32."""
    settings = {**_COMMON, **DECODERS[name], **overrides}
    attention = settings.pop("attn", "sdpa")
    config = CONFIG_MAPPING[settings.pop("model_type", name)](**settings)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def stream_layout(frames: int, tokens: int = 10, text: int = 1, lead: int = 2) -> torch.Tensor:
    """Layout [T] of `lead` text tokens, then `frames` times `tokens` vision tokens and `text` text tokens."""
    parts = [torch.full((lead,), -1)]
    for frame in range(frames):
        parts += [torch.full((tokens,), frame), torch.full((text,), -1)]
    return torch.cat(parts)


def randomize_routers(model: torch.nn.Module, seed: int = 1) -> None:
    """Routers with random weights, so that selections differ between tokens and layers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mmskip_router" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def sharpen(model: torch.nn.Module, factor: float = 40.0) -> None:
    """Larger logits from an output layer of its own, so that tokens and beams depend on what came before."""
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach() * factor)


def assert_same_generation(model: torch.nn.Module, seed: int = 0, **call) -> None:
    """Generation with a cache equals that without: tokens, the logits and scores of every step, those of beams."""
    call |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    outputs = []
    for use_cache in (True, False):
        torch.manual_seed(seed)
        outputs.append(model.generate(**call, use_cache=use_cache))
    cached, plain = outputs
    for key in ("logits", "scores"):
        torch.testing.assert_close(torch.stack(cached[key]), torch.stack(plain[key]), atol=1e-4, rtol=1e-4)
    assert torch.equal(cached.sequences, plain.sequences)
    if call.get("num_beams", 1) > 1:
        torch.testing.assert_close(cached.sequences_scores, plain.sequences_scores, atol=1e-4, rtol=1e-4)
        assert torch.equal(cached.beam_indices, plain.beam_indices)


def blocks_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The decoder layers, whatever the list is called."""
    return list(next(m for m in model.get_decoder().modules() if isinstance(m, torch.nn.ModuleList)))


def routers_of(model: torch.nn.Module) -> dict[int, torch.Tensor]:
    """Weights of the linear routers by block index."""
    return {i: b.mmskip_router.weight for i, b in enumerate(blocks_of(model)) if hasattr(b, "mmskip_router")}


def mlp_scores(router: torch.nn.Module):
    """The score of an MLP router, one token at a time."""

    def score(x):
        x = x.float() / (x.float().square().mean() + 1e-6).sqrt()
        hidden = router.hidden_weight.float() @ x + router.hidden_bias.float()
        return (hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))) @ router.weight.float()

    return lambda x_TD: torch.stack([score(x) for x in x_TD])


def pad_rows(rows: list[torch.Tensor], value: int, side: str) -> torch.Tensor:
    """Stack rows of different lengths, [B, T]."""
    length = max(len(row) for row in rows)
    fills = [torch.full((length - len(row),), value) for row in rows]
    pairs = zip(rows, fills, strict=True)
    return torch.stack([torch.cat([row, fill] if side == "right" else [fill, row]) for row, fill in pairs])


def saturating(name: str = "llama") -> PreTrainedModel:
    """A model of six blocks whose feed-forwards add less and less."""
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 3} if name == "qwen3_mixed_window" else {}
    model = tiny_decoder(name, num_hidden_layers=6, **kinds)
    sharpen(model)
    with torch.no_grad():
        for index, block in enumerate(blocks_of(model)):
            for parameter in block.mlp.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(6.0 * 0.75**index)
    return model
