"""A small set of captions and pairs, and tiny captioners of several kinds."""

from pathlib import Path
from typing import Any

import torch
from tiny_seq2seq import build

from mmskip.datasets.captioning.module import CaptionData
from mmskip.datasets.synthetic.captions import SceneCaptionsConfig
from mmskip.models.captioner.build import token_ids
from mmskip.models.captioner.module import Captioner

SMALL = SceneCaptionsConfig(train=12, val=4, test=4, pairs=2, steps=(0.5, 0.5))
_BART: dict[str, Any] = {
    "d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 2, "dropout": 0.0,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
}  # fmt: skip
TOWER: dict[str, Any] = {
    "tower": "timm/vit_tiny_patch16_224",
    "tower_kwargs": {"depth": 0, "embed_dim": 32, "num_heads": 2},
    "tower_size": 48,
}
TEXTS: dict[str, dict[str, Any]] = {
    "bart": {"model_type": "bart", **_BART},
    "mbart": {"model_type": "mbart", **_BART},
    "t5": {
        "model_type": "t5", "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 3, "num_heads": 2, "dropout_rate": 0.0
    },
}  # fmt: skip


def florence2() -> dict[str, Any]:
    """Settings of a tiny Florence-2 whose text model has no dropout."""
    config = build("florence2").config.to_dict()
    keys = ("text_config", "vision_config", "image_token_id")
    return {"model_type": "florence2", **{key: config[key] for key in keys}}


def data(root: Path, **settings: Any) -> CaptionData:
    """The small set, written to `root`."""
    given = CaptionData(str(root), SMALL, **{"batch_size": 3, "entailment_prompt": "{hypothesis}?", **settings})
    given.prepare_data()
    return given


def captioner(kind: str, given: CaptionData, **settings: Any) -> Captioner:
    """A tiny captioner of a kind in `TEXTS`, or "florence2"."""
    text = florence2() if kind == "florence2" else TEXTS[kind]
    tower = {} if kind == "florence2" else TOWER
    torch.manual_seed(0)
    tokens = token_ids(given.tokenizer, given.collate().answers)
    return Captioner(**{"text": text, **tower, "tokens": tokens, "max_new_tokens": 6, **settings})
