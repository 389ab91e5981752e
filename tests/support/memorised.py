"""Tiny models of several architectures that have learned their videos by heart: what they say is no near tie."""

import functools

import torch
from narration_data import FEATURES, FPS, LLAMA, sample, token_ids

import mmskip
from mmskip.datasets.narration.turns import collate_narration
from mmskip.models.video_llm.module import VideoLLM

MOD = mmskip.MoDConfig(keep=0.4, gate="sigmoid")
LENGTHS = ([2, 3, 4], [4, 2, 3], [3, 5])
SMALL = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
ARCHITECTURES = {
    "llama": LLAMA,
    "qwen3": {**SMALL, "model_type": "qwen3", "intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8},
    "mistral": {
        **SMALL,
        "model_type": "mistral",
        "intermediate_size": 24,
        "num_key_value_heads": 1,
        "sliding_window": 24,
    },
    # caps on the logits behind the head, and windows in every other block
    "gemma2": {
        **SMALL,
        "model_type": "gemma2",
        "intermediate_size": 24,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "sliding_window": 24,
        "query_pre_attn_scalar": 8,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 3, "n_head": 2},
}


def samples() -> list[dict]:
    """The videos with what is said in them."""
    return [sample(list(lengths), seed) for seed, lengths in enumerate(LENGTHS)]


@functools.cache
def _trained(name: str, routed: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = _build(name, routed, "float32").train()
    batch = collate_narration(samples(), 0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.03, weight_decay=0.0)
    for _ in range(60):
        sums = model.loss_sums(batch)
        (sums[0] / sums[3:].sum()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def _build(name: str, routed: bool, dtype: str) -> VideoLLM:
    return VideoLLM(
        ARCHITECTURES[name],
        methods=[MOD] if routed else [],
        llm_dtype=dtype,
        attention="eager" if name == "gemma2" else "sdpa",
        feature_dim=FEATURES,
        fps=FPS,
        tokens=token_ids().to_dict(),
    )


def memorised(name: str, dtype: str = "bfloat16", routed: bool = True) -> VideoLLM:
    """A trained model of an architecture; trained in fp32, once for all dtypes."""
    model = _build(name, routed, dtype)
    model.load_state_dict(_trained(name, routed))
    return model.eval()
