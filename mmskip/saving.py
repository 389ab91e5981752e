"""Save and load the configs and the `mmskip_*` weights of a model, nothing else."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmskip.config import from_entry
from mmskip.registry import M, applied, apply_, config_types, remove_
from mmskip.swap import added, replacements
from mmskip.utils.files import atomic_path, write_json

CONFIG_FILE = "mmskip.json"
WEIGHTS_FILE = "mmskip.safetensors"
_FORMAT = 2


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write `mmskip.json` and `mmskip.safetensors` into `folder` (made if missing), both atomically. Under FSDP2 every
    rank must call it.

    Raises:
        ValueError: no method is applied to `model`.
    """
    records = applied(model, details=True)
    if not records:
        raise ValueError(f"nothing to save: no mmskip method is applied to this {type(model).__name__}.")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    description = {
        "format": _FORMAT,
        "methods": [
            {
                "type": type(r.config).__name__,
                "version": r.config.VERSION,
                "family": r.family,
                "config": r.config.to_dict(),
            }
            for r in records
        ],
    }
    weights = {name: _gathered(tensor).cpu().contiguous() for name, tensor in added_weights(model).items()}
    with atomic_path(target / WEIGHTS_FILE) as partial:
        save_file(weights, str(partial))
    write_json(description, target / CONFIG_FILE)


def _gathered(parameter: Tensor) -> Tensor:
    """Return the full tensor of a parameter that FSDP2 may have sharded."""
    tensor: Any = parameter.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _like(value: Tensor, parameter: Any) -> Tensor:
    """`value` sharded as `parameter` is."""
    if not hasattr(parameter, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def added_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights mmskip added, by site: `block.1.mmskip_router.weight`, whatever wraps the model (peft, ...); of
    modules that stand in the place of others, all: `conv.stem.weight`."""
    found: dict[str, Tensor] = {}
    for site, module in replacements(model):
        found |= {f"{site}.{key}": parameter for key, parameter in module.named_parameters()}
    for site, name, module in added(model):
        for key, parameter in getattr(module, name).named_parameters():
            if "original_module." in key:
                continue
            # peft's modules_to_save keeps one trained copy per adapter beside the original
            _, copied, rest = key.partition("modules_to_save.")
            adapter, _, own = rest.partition(".")
            if not copied or adapter in getattr(module, name).active_adapters:
                found[f"{site}.{name}.{own or key}"] = parameter
    return found


def load_(model: M, folder: str | os.PathLike[str]) -> M:
    """Apply the methods saved in `folder` to `model` in place (unless they are applied already), load their weights,
    and return it.

    Raises:
        FileNotFoundError: `folder` holds no mmskip files.
        ValueError: the model carries other methods or settings, or the weights do not fit; the model is then as it
            was.
    """
    configs = _read_configs(Path(folder))
    weights = _read_weights(Path(folder))
    present = applied(model)
    if present and sorted(map(repr, present)) != sorted(map(repr, configs)):
        raise ValueError(
            f"{folder} was saved with {configs}, but the model carries {present}; remove_ those first, or load into an "
            "untouched model."
        )
    try:
        if not present:
            for config in configs:
                apply_(model, config)
        _copy(added_weights(model), weights, folder)
    except BaseException:
        if not present:
            remove_(model)
        raise
    return model


def _read_configs(folder: Path) -> list[Any]:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}; expected a folder written by mmskip.save.")
    try:
        description = json.loads((folder / CONFIG_FILE).read_text())
        entries = [(entry["type"], entry["config"], entry.get("version", 1)) for entry in description["methods"]]
        found_format = description["format"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} is not a file written by mmskip.save ({error!r}).") from error
    if found_format not in range(1, _FORMAT + 1):
        raise ValueError(
            f"{folder / CONFIG_FILE} has format {found_format!r}; this mmskip reads formats up to {_FORMAT}."
        )
    types = config_types()
    try:
        return [from_entry(types, name, values, version) for name, values, version in entries]
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_FILE}: {error}") from error


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Return the weights of a folder. Format 1 counted the layers of encoders and encoder-decoders from 1."""
    weights: dict[str, Tensor] = load_file(str(folder / WEIGHTS_FILE))
    if json.loads((folder / CONFIG_FILE).read_text())["format"] > 1:
        return weights
    stacks = {"encoder", "decoder", "image", "text"}
    parts = {name: name.split(".", 2) for name in weights}
    return {
        f"{stack}.{int(index) - 1}.{rest}" if stack in stacks else name: weights[name]
        for name, (stack, index, rest) in parts.items()
    }


def _copy(own: dict[str, Tensor], saved: dict[str, Tensor], folder: Any) -> None:
    missing, extra = sorted(set(own) - set(saved)), sorted(set(saved) - set(own))
    if missing or extra:
        raise ValueError(
            f"the weights in {folder} do not fit the model: missing {missing or 'none'}, unexpected {extra or 'none'}; "
            "load them into a model with as many blocks as the one they were saved from."
        )
    for name, tensor in own.items():
        if tensor.shape != saved[name].shape:
            raise ValueError(
                f"{name} in {folder} has shape {tuple(saved[name].shape)}; the model needs {tuple(tensor.shape)}."
            )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(_like(saved[name], tensor))
