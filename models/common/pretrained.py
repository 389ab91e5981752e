"""Models of transformers by name or from scratch, their token ids, initial weights and LoRA adapters."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from mmskip.models.common.methods import apply_methods
from mmskip.utils.pretrained import config_of

METHOD, ADAPTER = "mmskip_", "lora_"
"""In the name of every weight that a method, or LoRA, added."""
RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight")
"""The weights of a decoder block that write into the residual stream, under the names most decoders give them."""


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters by peft; the base model is frozen.

    Attributes:
        r: rank, >= 1.
        alpha: scale of the update times r.
        dropout: in [0, 1).
        target_modules: names of the linear layers; a single string is a regular expression or "all-linear".
    """

    r: int = 128
    alpha: float = 256
    dropout: float = 0.05
    target_modules: str | list[str] = "all-linear"

    def __post_init__(self) -> None:
        if self.r < 1 or not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA needs r >= 1 and dropout in [0, 1), got r={self.r}, dropout={self.dropout}")


def adapt(model: PreTrainedModel, lora: LoRA | None, methods: Sequence[Any]) -> None:
    """Add LoRA (which freezes the rest), then apply the methods, in place. Their trained weights are kept in fp32:
    small updates vanish in bf16.

    Raises:
        ValueError: no layer has one of LoRA's names, or a method does not fit.
    """
    if lora is not None:
        config = peft.LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
        )
        model.add_adapter(config)
    apply_methods(model, methods)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (METHOD in name or ADAPTER in name):
            parameter.data = parameter.data.float()


def torch_dtype(name: str) -> torch.dtype:
    """The floating-point dtype of that name.

    Raises:
        ValueError: unknown name.
    """
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise ValueError(f"llm_dtype is {name!r}; expected one of {', '.join(dtypes)}")
    return dtypes[name]


def build(auto: Any, given: str | Mapping[str, Any], config: PretrainedConfig, dtype: str, attention: str) -> Any:
    """Build a model of an auto class: weights by name or folder, or random ones of `config` for a dict.

    Raises:
        ValueError: an unknown dtype, or the architecture is none of the auto class.
    """
    kwargs: dict[str, Any] = {"dtype": torch_dtype(dtype), "attn_implementation": attention}
    return auto.from_pretrained(given, **kwargs) if isinstance(given, str) else auto.from_config(config, **kwargs)


def set_ids(configs: Iterable[Any], ids: Mapping[str, int | None]) -> None:
    """Set token ids on configurations. Those of a config's own defaults would point outside a small vocabulary."""
    for config in configs:
        for name, value in ids.items():
            setattr(config, name, value)


NO_IDS = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
"""For `set_ids`: no special tokens."""


def token_ids(tokenizer: Any) -> dict[str, Any]:
    """Collect the facts of its tokenizer that a model from scratch needs, as plain numbers fit for a checkpoint."""
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def scale_residual(model: nn.Module, factor: float, endings: tuple[str, ...] = RESIDUAL_OUTPUTS) -> None:
    """Multiply the weights that write into the residual stream, those whose names have one of the `endings`."""
    with torch.no_grad():
        for weight in residual_outputs(model, endings):
            weight.mul_(factor)


def residual_outputs(model: nn.Module, endings: tuple[str, ...] = RESIDUAL_OUTPUTS) -> list[Tensor]:
    """The weights that `scale_residual` changes."""
    return [weight for name, weight in model.named_parameters() if name.endswith(endings)]


def check_residual_init(factor: float, given: str | Mapping[str, Any], build: Callable[[], nn.Module]) -> None:
    """Check that `scale_residual` can do its work; builds no weights.

    Args:
        factor: the setting `residual_init`.
        given: the setting that names or describes the model.
        build: makes the model; called on torch's meta device.

    Raises:
        ValueError: other than 1 for a pretrained model, or for blocks whose weights have other names; or negative.
    """
    if not factor >= 0:
        raise ValueError(f"residual_init is {factor!r}; expected a number >= 0.")
    if factor == 1:
        return
    if isinstance(given, str):
        raise ValueError(f"residual_init={factor} would spoil the pretrained weights of {given!r}; leave it at 1.")
    with torch.device("meta"):
        model = build()
    if not residual_outputs(model):
        raise ValueError(
            f"residual_init={factor} needs blocks that write by {' and '.join(RESIDUAL_OUTPUTS)}; "
            f"{type(model).__name__} has other names, so leave it at 1."
        )


# --- causal language models -----------------------------------------------------------------------------------------


def llm_config(llm: str | Mapping[str, Any]) -> PretrainedConfig:
    """The configuration of a causal LM: of a name or folder, or from a dict with `model_type`.

    Raises:
        ValueError: see `mmskip.utils.pretrained.config_of`.
    """
    return config_of(
        "llm",
        llm,
        "a causal LM that transformers knows, such as 'llama', 'qwen3' or 'mistral'",
        "Give a folder, download it first (a gated model needs its licence accepted and a login), or give a dict with "
        "a model_type for a model from scratch.",
    )


def build_llm(
    llm: str | Mapping[str, Any],
    config: PretrainedConfig,
    vocab_size: int,
    dtype: str,
    attention: str,
    residual_init: float = 1.0,
) -> PreTrainedModel:
    """Build a causal LM with room for `vocab_size` ids: weights by name, or random ones for a dict.

    `residual_init` multiplies the random weights that write into the residual stream (`RESIDUAL_OUTPUTS`).

    Raises:
        ValueError: the architecture is no causal LM, or an unknown dtype.
    """
    if not isinstance(llm, str):
        config.vocab_size = vocab_size
        set_ids([config], NO_IDS)
    model: Any = build(AutoModelForCausalLM, llm, config, dtype, attention)
    if not isinstance(llm, str):
        scale_residual(model, residual_init)
    elif model.get_input_embeddings().num_embeddings < vocab_size:
        model.resize_token_embeddings(vocab_size)
    return model
