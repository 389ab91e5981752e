"""Building a captioner: its text encoder-decoder, its image tower, and what both must know of the tokenizer.

Shapes: I images, H and W pixels.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)

from mmskip.families.encoder_decoder import EncoderDecoderView, match
from mmskip.models.captioner.exit_training import layer_weights
from mmskip.models.common.optim import RANGES, check_ranges, check_schedule, is_decayed
from mmskip.models.common.pretrained import build, set_ids, torch_dtype
from mmskip.models.common.pretrained import token_ids as plain_ids
from mmskip.utils.pretrained import config_of

LIMITS = RANGES | {
    "tower_lr": "(0, inf)",
    "grid": "[1, inf)",
    "random_exits": "[0, 1]",
    "random_token_exits": "[0, 1]",
    "settle_weight": "[0, inf)",
    "caption_weight": "(0, inf)",
    "label_smoothing": "[0, 1)",
    "residual_init": "[0, inf)",
    "num_beams": "[1, inf)",
    "max_new_tokens": "[1, inf)",
    "no_repeat_ngram": "[0, inf)",
    "val_captions": "[0, inf)",
}


def check_settings(hparams: Mapping[str, Any]) -> None:
    """Check the numbers and names among a captioner's settings.

    Raises:
        ValueError: one is out of range, or unknown.
    """
    check_ranges(hparams, LIMITS)
    check_schedule(hparams["schedule"])
    layer_weights(hparams["layer_loss"], 1)
    torch_dtype(hparams["dtype"])
    if isinstance(hparams["text"], str) and hparams["residual_init"] != 1:
        raise ValueError(f"residual_init={hparams['residual_init']} would spoil pretrained weights; leave it at 1")


def text_config(text: str | Mapping[str, Any]) -> PretrainedConfig:
    """The configuration of an encoder-decoder: of a name or folder, or from a dict with `model_type`.

    Raises:
        ValueError: a name that is neither in the local cache nor to be reached, a model that is no encoder-decoder, an
            unknown `model_type` or an unknown key of the dict.
    """
    examples = "an encoder-decoder that transformers knows, such as 'bart', 'mbart', 't5' or 'florence2'"
    hint = "Give a folder, download it first, or give a dict with a model_type for a model from scratch."
    config = config_of("text", text, examples, hint)
    if _auto(config) is None:
        raise ValueError(
            f"text has model_type={config.model_type!r}, which is no encoder-decoder with text generation; expected "
            "one such as 'bart', 'mbart', 't5' or 'florence2'"
        )
    return config


def _auto(config: PretrainedConfig) -> Any:
    """The auto class of an encoder-decoder's generating model, or None."""
    if type(config) in AutoModelForSeq2SeqLM._model_mapping:
        return AutoModelForSeq2SeqLM
    images = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if images and config.model_type == "florence2" else None


def sees(config: PretrainedConfig) -> bool:
    """Whether the model has its own image tower (Florence-2)."""
    return _auto(config) is AutoModelForImageTextToText


def token_ids(tokenizer: Any, answers: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Collect the tokenizer facts a model needs, as plain numbers; `answers` are the ids of the three answers."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.pad_token_id
    return {
        **plain_ids(tokenizer),
        "start_token_id": start,
        "answers": [list(map(int, ids)) for ids in answers],
    }


def build_meta(config: PretrainedConfig, attention: str) -> PreTrainedModel:
    """The encoder-decoder of a config, with its vocabulary; for torch's meta device."""
    return _auto(config).from_config(copy.deepcopy(config), attn_implementation=attention)


def build_text(
    text: str | Mapping[str, Any], config: PretrainedConfig, tokens: Mapping[str, Any], dtype: str, attention: str
) -> PreTrainedModel:
    """The encoder-decoder: weights by name, or random ones for a dict, with the tokenizer's ids.

    Raises:
        ValueError: an unknown dtype, or a tokenizer with more ids than a named model has embeddings.
    """
    auto = _auto(config)
    if isinstance(text, str):
        model: Any = build(auto, text, config, dtype, attention)
        room = model.get_input_embeddings().num_embeddings
        if room < tokens["vocab_size"]:
            raise ValueError(
                f"the tokenizer has {tokens['vocab_size']} ids and {text!r} only {room} embeddings; give the tokenizer "
                "of the model (data.tokenizer)"
            )
        return model
    config = copy.deepcopy(config)
    inner: Any = config.get_text_config() if sees(config) else config
    ids = {
        "pad_token_id": tokens["pad_token_id"],
        "eos_token_id": tokens["eos_token_id"],
        "bos_token_id": tokens["start_token_id"],
        "decoder_start_token_id": tokens["start_token_id"],
        "forced_bos_token_id": None,
        "forced_eos_token_id": None,
    }
    inner.vocab_size = tokens["vocab_size"]
    set_ids([inner, config], ids)
    if sees(config):
        config.image_token_id = tokens["pad_token_id"]  # pictures do not come by way of the prompt
    model = build(auto, text, config, dtype, attention)
    set_ids([model.generation_config], ids)
    return model


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], table: Tensor, hparams: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The trained weights for AdamW: the tower at its own rate; weight decay on matrices other than the embeddings."""
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            key = name.startswith("tower."), is_decayed(parameter, [table])
            groups.setdefault(key, []).append(parameter)
    rates = {False: hparams["lr"], True: hparams["tower_lr"] or hparams["lr"]}
    return [
        {"params": group, "lr": rates[tower], "weight_decay": hparams["weight_decay"] if matrix else 0.0}
        for (tower, matrix), group in groups.items()
    ]


def view_of(model: nn.Module) -> EncoderDecoderView:
    """The layers, norm and head of an encoder-decoder.

    Raises:
        ValueError: its structure is not known.
    """
    view, reason = match(model)
    if view is None:
        raise ValueError(f"text is no encoder-decoder whose layers are found: {reason}")
    return view


def decoder_of(model: Any) -> Any:
    """The stack of decoder layers, without an output projection; some models name the encoder-decoder in them first."""
    part = model.get_decoder()
    while hasattr(part, "encoder"):
        part = part.get_decoder()
    return part


def normalised(images: Tensor) -> Tensor:
    """Images [I, 3, H, W] in 0..1 as Florence-2's tower takes them."""
    mean, std = (images.new_tensor(values)[:, None, None] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (images - mean) / std
