"""Building a captioner: its text encoder-decoder, its image tower, and what both must know of the tokenizer.

Shapes: L decoder layers, B rows, T tokens, D width.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
)

from mmskip.families.encoder_decoder import EncoderDecoderView, match
from mmskip.models.common.optim import RANGES, check_ranges, check_schedule, is_decayed
from mmskip.models.common.pretrained import build, set_ids, torch_dtype
from mmskip.models.common.pretrained import token_ids as plain_ids
from mmskip.utils.pretrained import config_of, refuse_unknown

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
LAYER_LOSSES = ("last", "sum", "uniform", "linear", "sqrt", "inverse")


def layer_weights(name: str, layers: int) -> list[float]:
    """Weights of the losses of the decoder's layers, first layer first.

    | name | weight of layer l of L |
    |---|---|
    | `last` | 0 below the last, 1 there |
    | `sum` | 1 (MuE) |
    | `uniform` | 1 / L |
    | `linear` | l, scaled to the sum 1 |
    | `sqrt` | square root of l, scaled to the sum 1 |
    | `inverse` | 1 / l, scaled to the sum 1: early layers weigh most |

    Raises:
        ValueError: another name.
    """
    refuse_unknown("layer_loss", [name], LAYER_LOSSES)
    numbers = range(1, layers + 1)
    if name == "last":
        return [float(n == layers) for n in numbers]
    if name == "sum":
        return [1.0] * layers
    kinds = {"uniform": [1.0] * layers, "linear": [float(n) for n in numbers]}
    kinds |= {"sqrt": [math.sqrt(n) for n in numbers], "inverse": [1 / n for n in numbers]}
    total = sum(kinds[name])
    return [weight / total for weight in kinds[name]]


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
    """Whether the model has an image tower of its own (Florence-2)."""
    return _auto(config) is AutoModelForImageTextToText


def token_ids(tokenizer: Any, answers: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What a model must know of its tokenizer, as plain numbers; `answers` are the ids of the three answers."""
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


@contextmanager
def captured(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """The states [B, T, D] behind each block, in the order in which they run inside the context."""
    found: list[Tensor] = []

    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def drawn(share: float, shape: Sequence[int], layers: int, device: torch.device) -> Tensor | None:
    """Layers that count for each state, of shape `shape`: a random number from 1 for a share of them, all for the
    others; None: all for all of them."""
    if not share:
        return None
    some = torch.randint(1, layers + 1, tuple(shape))
    return torch.where(torch.rand(tuple(shape)) < share, some, layers).to(device)


@contextmanager
def left_behind(blocks: Sequence[nn.Module], layers: Tensor) -> Iterator[None]:
    """Every row, or token, keeps inside the context the state behind its layer: what an exit there would hand on. All
    blocks run.

    Args:
        blocks: in order.
        layers: LongTensor [B] (or [B, T]), layers that count for each row (or token), 1 to the number of blocks.
    """
    handles = []
    last: list[Tensor] = []
    depth = layers.view(*layers.shape, *(1,) * (3 - layers.dim()))

    def hook(number: int) -> Any:
        def run(module: nn.Module, arguments: Any, output: Any) -> Any:
            after = output[0] if isinstance(output, tuple) else output
            if last:
                after = torch.where(depth >= number, after, last[0])
            last[:] = [after]
            return (after, *output[1:]) if isinstance(output, tuple) else after

        return run

    for number, block in enumerate(blocks, 1):
        handles.append(block.register_forward_hook(hook(number)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def moved(states: Sequence[Tensor], logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """How far states move that need not, summed over layers and labels: 1 - cosine of the states before and behind a
    layer, where the head is sure of the label (probability above 0.9) already before it. Gradients reach the layer, not
    what came before.

    Args:
        states: [P, D] behind each layer.
        logits: [P, V] behind each layer.
        labels: [P].
    """
    total = states[0].new_zeros((), dtype=torch.float32)
    for before, behind, said in zip(states[:-1], states[1:], logits[:-1], strict=True):
        sure_P = said.detach().float().softmax(-1).gather(1, labels[:, None])[:, 0] > 0.9
        cosine_P = F.cosine_similarity(behind.float(), before.detach().float(), dim=-1)
        total = total + ((1 - cosine_P) * sure_P).sum()
    return total


def gathered(captions: dict[str, Any]) -> dict[str, Any]:
    """The captions of all ranks."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return captions
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, captions)
    return {uid: told for part in parts for uid, told in part.items()}
