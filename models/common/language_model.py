"""Building the language model of a video LLM: by name or from scratch, with LoRA and methods."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from mmskip.config import from_entry
from mmskip.registry import apply_, config_types
from mmskip.utils.pretrained import config_of

# the weights of a decoder block that write into the residual stream, under the names most decoders give them
RESIDUAL_OUTPUTS = ("o_proj.weight", "down_proj.weight")


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


def llm_config(llm: str | Mapping[str, Any]) -> PretrainedConfig:
    """The configuration of a causal LM: of a name or folder, or from a dict with `model_type`.

    Raises:
        ValueError: see `config_of`.
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
    """The causal LM itself, with room for `vocab_size` ids: weights by name, or random ones for a dict.

    `residual_init` multiplies the random weights that write into the residual stream (`RESIDUAL_OUTPUTS`).

    Raises:
        ValueError: the architecture is no causal LM, or an unknown dtype.
    """
    kwargs: dict[str, Any] = {"dtype": torch_dtype(dtype), "attn_implementation": attention}
    if isinstance(llm, str):
        model: Any = AutoModelForCausalLM.from_pretrained(llm, **kwargs)
        if model.get_input_embeddings().num_embeddings < vocab_size:
            model.resize_token_embeddings(vocab_size)
        return model
    config.vocab_size = vocab_size
    # ids of a config's own defaults would point outside a small vocabulary
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    model = AutoModelForCausalLM.from_config(config, **kwargs)
    with torch.no_grad():
        for weight in _residual_outputs(model):
            weight.mul_(residual_init)
    return model


def _residual_outputs(model: PreTrainedModel) -> list[torch.Tensor]:
    return [weight for name, weight in model.named_parameters() if name.endswith(RESIDUAL_OUTPUTS)]


def check_residual_init(llm: str | Mapping[str, Any], config: PretrainedConfig, residual_init: float) -> None:
    """Whether `build_llm` can do what `residual_init` asks for; builds no weights.

    Raises:
        ValueError: other than 1 for a pretrained model, or for blocks whose weights have other names; or negative.
    """
    if not residual_init >= 0:
        raise ValueError(f"residual_init is {residual_init!r}; expected a number >= 0.")
    if residual_init == 1:
        return
    if isinstance(llm, str):
        raise ValueError(f"residual_init={residual_init} would spoil the pretrained weights of {llm!r}; leave it at 1.")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    if not _residual_outputs(model):
        raise ValueError(
            f"residual_init={residual_init} needs blocks that write by {' and '.join(RESIDUAL_OUTPUTS)}; "
            f"{type(model).__name__} has other names, so leave it at 1."
        )


def check_methods(config: PretrainedConfig, attention: str, methods: Sequence[Any]) -> None:
    """Apply the methods to a model without weights, so that what does not fit is known before any work starts.

    Raises:
        ValueError: a method does not fit a language model of this config.
    """
    if methods:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=attention)
        for method in methods:
            apply_(model, method)


def torch_dtype(name: str) -> torch.dtype:
    """The floating-point dtype of that name.

    Raises:
        ValueError: unknown name.
    """
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise ValueError(f"llm_dtype is {name!r}; expected one of {', '.join(dtypes)}")
    return dtypes[name]


def add_lora(llm: PreTrainedModel, lora: LoRA) -> None:
    """Put LoRA adapters into `llm` in place; everything else of it is frozen, and adapters are kept in fp32.

    Raises:
        ValueError: no layer has one of the names.
    """
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    peft.inject_adapter_in_model(config, llm)
    for parameter in llm.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def methods_to_dicts(methods: Sequence[Any] | None) -> list[dict[str, Any]]:
    """Method configs as plain dicts (`class_path`, `init_args`), as they stand in YAML and checkpoints."""
    return [
        method
        if isinstance(method, dict)
        else {"class_path": f"mmskip.{type(method).__name__}", "init_args": method.to_dict()}
        for method in methods or ()
    ]


def methods_from_dicts(methods: Sequence[dict[str, Any]]) -> list[Any]:
    """The configs that `methods_to_dicts` wrote down.

    Raises:
        ValueError: an unknown method, or an unknown or bad setting of one.
    """
    types = config_types()
    configs = []
    for method in methods:
        name = method["class_path"].rpartition(".")[2]
        configs.append(from_entry(types, name, method.get("init_args", {})))
    return configs
