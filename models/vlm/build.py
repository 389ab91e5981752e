"""Building a VLM of transformers for tuning: by name or from scratch, with LoRA, methods, and what of it is trained."""

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn
from transformers import AutoModelForImageTextToText, PretrainedConfig, PreTrainedModel

import mmskip
from mmskip.models.common.methods import check_methods
from mmskip.models.common.pretrained import ADAPTER, METHOD, NO_IDS, LoRA, adapt, build, set_ids
from mmskip.models.common.pretrained import token_ids as plain_ids
from mmskip.utils.files import atomic_path
from mmskip.utils.pretrained import config_of, refuse_unknown

TRAINABLE = ("all", "router", "lora", "router+lora")
TOKENS = ("vocab_size", "image_token_id", "video_token_id", "pad_token_id", "eos_token_id")


def vlm_config(vlm: str | Mapping[str, Any]) -> PretrainedConfig:
    """The configuration of a VLM: of a name or folder, or from a dict with `model_type`.

    Raises:
        ValueError: a name that is neither in the local cache nor to be reached, a model that is no VLM, an unknown
            `model_type` or an unknown key of the dict.
    """
    examples = "a VLM that transformers knows, such as 'llava_onevision', 'qwen2_5_vl' or 'smolvlm'"
    config = config_of(
        "vlm",
        vlm,
        examples,
        "Give a folder, download it first, or give a dict with a model_type for a model from scratch. (The folder "
        "data/vlm_base of the recipes is written by training vlm_dense.yaml.)",
    )
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise ValueError(
            f"vlm has model_type={config.model_type!r}, which has no AutoModelForImageTextToText; expected a VLM such "
            "as 'llava_onevision', 'qwen2_5_vl' or 'smolvlm'"
        )
    return config


def token_ids(processor: Any) -> dict[str, Any]:
    """Collect the facts of its processor that a VLM from scratch needs, as plain numbers (see `TOKENS`)."""
    tokenizer = processor.tokenizer
    found = plain_ids(tokenizer)
    for name in TOKENS[1:]:
        owner = processor if hasattr(processor, name) else tokenizer
        found[name] = getattr(owner, name, None)
    return found


def build_vlm(
    vlm: str | Mapping[str, Any], config: PretrainedConfig, tokens: Mapping[str, Any], dtype: str, attention: str
) -> PreTrainedModel:
    """The VLM itself: weights by name, or random ones for a dict, with the processor's token ids.

    Raises:
        ValueError: an unknown dtype.
    """
    if isinstance(vlm, str):
        return build(AutoModelForImageTextToText, vlm, config, dtype, attention)
    config = copy.deepcopy(config)
    text: Any = config.get_text_config()
    text.vocab_size = tokens["vocab_size"]
    set_ids([text, config], NO_IDS)
    for name in ("image_token_id", "video_token_id"):
        if hasattr(config, name):
            setattr(config, name, tokens[name])
    model = build(AutoModelForImageTextToText, vlm, config, dtype, attention)
    model.generation_config.pad_token_id = tokens["pad_token_id"]
    model.generation_config.eos_token_id = tokens["eos_token_id"]
    return model


def check_fit(config: PretrainedConfig, attention: str, methods: Sequence[Any], trainable: str, lora: Any) -> None:
    """Whether methods, LoRA and `trainable` fit the model and one another, without building its weights.

    Raises:
        ValueError: they do not.
    """
    refuse_unknown("trainable", [trainable], TRAINABLE)
    if ("lora" in trainable) != (lora is not None):
        raise ValueError(
            f"trainable is {trainable!r} and lora is {'given' if lora is not None else 'not given'}; 'lora' and "
            "'router+lora' need the settings of lora, 'all' and 'router' go without"
        )
    if not methods and "router" in trainable:
        raise ValueError(f"trainable is {trainable!r}, but methods is empty; give e.g. a mmskip.MoDConfig")
    model = check_methods(
        lambda: AutoModelForImageTextToText.from_config(copy.deepcopy(config), attn_implementation=attention), methods
    )
    if model is None:
        return
    routers = [p for name, p in model.named_parameters() if METHOD in name and p.requires_grad]
    if "router" in trainable and not routers:
        raise ValueError(f"trainable is {trainable!r}, but none of {list(methods)} has a router that learns")
    if trainable == "lora" and routers:
        raise ValueError(
            "trainable is 'lora', which does not train the routers; use 'router+lora', or a router that has no weights"
        )


def has_grid_positions(model: nn.Module) -> bool:
    """Whether a VLM reckons positions in time, height and width (M-RoPE) from its inputs."""
    return any(hasattr(module, "get_rope_index") for module in model.modules())


def tune(model: PreTrainedModel, methods: Sequence[Any], trainable: str, lora: LoRA | None) -> None:
    """Put LoRA and methods on `model`, in this order, and let only what `trainable` says receive gradients. Adapters
    and routers are kept in fp32: small updates vanish in bf16."""
    if trainable != "all":
        model.requires_grad_(False)
    adapt(model, lora, methods)


def trained_counts(model: nn.Module) -> dict[str, int]:
    """Numbers of trained parameters: `routers`, `LoRA`, `base`; and `all` parameters, trained or not."""
    counts = {"routers": 0, "LoRA": 0, "base": 0, "all": 0}
    for name, parameter in model.named_parameters():
        counts["all"] += parameter.numel()
        if parameter.requires_grad:
            kind = "routers" if METHOD in name else "LoRA" if ADAPTER in name else "base"
            counts[kind] += parameter.numel()
    return counts


def save_tuned(model: PreTrainedModel, folder: str | Path, processor: Any = None) -> list[Path]:
    """Write the trained parts, each folder atomically: `mmskip/` (configs and routers, by `mmskip.save`), `lora/`
    (peft's format), and `model/` where base weights were trained (with the processor, so that it is complete).

    Returns:
        The folders written.
    """
    folder = Path(folder)
    written = []
    if mmskip.applied(model):
        mmskip.save(model, folder / "mmskip")
        written.append(folder / "mmskip")
    if getattr(model, "_hf_peft_config_loaded", False):
        with atomic_path(folder / "lora") as partial:
            model.save_pretrained(str(partial))
        written.append(folder / "lora")
    if trained_counts(model)["base"]:
        save_base(model, folder / "model", processor)
        written.append(folder / "model")
    return written


def save_base(model: PreTrainedModel, folder: str | Path, processor: Any = None) -> None:
    """Write a VLM as transformers does, without what methods added, and its processor. Files of an older model in the
    folder are replaced one by one."""
    state = {name: value for name, value in model.state_dict().items() if METHOD not in name}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".writing-", dir=folder) as partial:
        model.save_pretrained(partial, state_dict=state)
        if processor is not None:
            processor.save_pretrained(partial)
        for path in sorted(Path(partial).iterdir()):
            os.replace(path, folder / path.name)


def load_tuned(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """Put what `save_tuned` wrote into `folder` on the base model, in place, and return it.

    Raises:
        ValueError: the folder holds neither `mmskip` nor `lora`.
    """
    folder = Path(folder)
    found = [name for name in ("lora", "mmskip") if (folder / name).is_dir()]
    if not found:
        raise ValueError(f"{folder} holds no folder lora or mmskip; expected the adapter folder of a run")
    if "lora" in found:
        model.load_adapter(str(folder / "lora"))
    if "mmskip" in found:
        mmskip.load_(model, folder / "mmskip")
    return model
