"""Tiny random encoder-decoders of transformers, with inputs of two samples of which one is padded."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    Florence2Config,
    Florence2ForConditionalGeneration,
    GPT2Config,
    MBartConfig,
    MBartForConditionalGeneration,
    PegasusConfig,
    PegasusForConditionalGeneration,
    Pix2StructConfig,
    Pix2StructForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    T5GemmaModuleConfig,
    TrOCRConfig,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
)

LAYERS, VOCABULARY, WIDTH = 4, 48, 32
_TOKENS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 3}
_BART: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "max_position_embeddings": 64, "forced_eos_token_id": None, "forced_bos_token_id": None, **_TOKENS,
}  # fmt: skip
_VIT = ViTConfig(
    hidden_size=WIDTH,
    num_hidden_layers=LAYERS,
    num_attention_heads=2,
    intermediate_size=48,
    image_size=16,
    patch_size=4,
)


def _t5() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCABULARY, d_model=WIDTH, d_kv=16, d_ff=48, num_layers=LAYERS, num_heads=2, **_TOKENS)
    )


def _florence2() -> nn.Module:
    vision: dict[str, Any] = {
        "embed_dim": [16, 16], "num_heads": [2, 2], "num_groups": [2, 2], "depths": [1, 1], "window_size": 4,
        "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1], "patch_prenorm": [False, True],
        "projection_dim": WIDTH, "max_temporal_embeddings": 5, "max_position_embeddings": 8,
    }  # fmt: skip
    text = {**_BART, "model_type": "bart"}
    config = Florence2Config(
        text_config=text, vision_config=vision, image_token_id=VOCABULARY - 1, is_encoder_decoder=True
    )
    return Florence2ForConditionalGeneration(config)


def _pix2struct() -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": WIDTH, "d_kv": 16, "d_ff": 48}
    text = {**sizes, "vocab_size": VOCABULARY, "num_layers": LAYERS, "num_heads": 2, "is_decoder": True, **_TOKENS}
    vision = {**sizes, "patch_embed_hidden_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    return Pix2StructForConditionalGeneration(Pix2StructConfig(text_config=text, vision_config=vision))


def _vision(decoder: Any) -> nn.Module:
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(_VIT, decoder, **_TOKENS)
    return VisionEncoderDecoderModel(config)


_BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "t5": _t5,
    "bart": lambda: BartForConditionalGeneration(BartConfig(**_BART)),
    "mbart": lambda: MBartForConditionalGeneration(MBartConfig(**_BART)),
    "pegasus": lambda: PegasusForConditionalGeneration(PegasusConfig(**_BART)),
    "florence2": _florence2,
    "vit_trocr": lambda: _vision(
        TrOCRConfig(
            vocab_size=VOCABULARY, d_model=WIDTH, decoder_layers=LAYERS, decoder_attention_heads=2, decoder_ffn_dim=48,
            max_position_embeddings=64, cross_attention_hidden_size=WIDTH, is_decoder=True, **_TOKENS,
        )
    ),
    "vit_gpt2": lambda: _vision(
        GPT2Config(
            vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=LAYERS, n_head=2, n_positions=64, add_cross_attention=True,
            is_decoder=True, **_TOKENS,
        )
    ),
}  # fmt: skip
_BUILDERS["pix2struct"] = _pix2struct
NAMES = tuple(_BUILDERS)


def t5gemma() -> Any:
    """A model whose layers with a window of four tokens alternate with those without one; its logits are capped."""
    size: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 4,
    }  # fmt: skip
    parts = {name: T5GemmaModuleConfig(**size) for name in ("encoder", "decoder")}
    torch.manual_seed(0)
    return T5GemmaForConditionalGeneration(T5GemmaConfig(**parts, vocab_size=VOCABULARY)).eval()


def vit_bert() -> Any:
    """A model whose decoder has a layer between its last state and its output projection."""
    size: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    decoder = BertConfig(
        vocab_size=VOCABULARY, intermediate_size=48, add_cross_attention=True, is_decoder=True, **size, **_TOKENS
    )
    return _vision(decoder).eval()


def build(name: str) -> Any:
    """A model in evaluation mode; its weights are large enough for layers to differ."""
    torch.manual_seed(0)
    model: Any = _BUILDERS[name]().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.25)
    model.generation_config.use_cache = True
    model.generation_config.update(max_new_tokens=7, do_sample=False, num_beams=1, eos_token_id=None, **{
        k: v for k, v in _TOKENS.items() if k != "eos_token_id"})  # fmt: skip
    return model


def inputs(name: str, row: int | None = None) -> dict[str, torch.Tensor]:
    """Encoder inputs of two samples (the second is padded where the model has text), or of one of them, unpadded."""
    generator = torch.Generator().manual_seed(1)
    if name.startswith("vit"):
        x = torch.randn(2, 3, 16, 16, generator=generator)
        return {"pixel_values": x if row is None else x[row : row + 1]}
    ids = torch.randint(4, VOCABULARY - 1, (2, 6), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, 4:], mask[1, 4:] = 1, 0
    given = {"input_ids": ids, "attention_mask": mask}
    if name == "pix2struct":
        patches = torch.randn(2, 6, 50, generator=generator)
        patches[..., 0], patches[..., 1] = torch.arange(6) // 3 + 1, torch.arange(6) % 3 + 1  # their rows and columns
        given = {"flattened_patches": patches, "attention_mask": mask}
    if row is None:
        return given
    length = int(mask[row].sum())
    return {key: value[row : row + 1, :length] for key, value in given.items()}
