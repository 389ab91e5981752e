"""`mmskip env`: versions, device, and which implementation of each operation runs here, and why."""

import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path

import torch

from mmskip.ops import backend

PACKAGES = (
    "mmskip",
    "torch",
    "torchvision",
    "transformers",
    "peft",
    "accelerate",
    "timm",
    "open-clip-torch",
    "lightning",
    "jsonargparse",
    "datasets",
    "decord",
    "av",
    "xformers",
    "triton",
)


def package_versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Installed version of each package, or `"not installed"`; nothing is imported."""
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def pick_device(name: str) -> torch.device:
    """Return the device a user asked for.

    Args:
        name: "auto" (the current CUDA device if there is one, else the CPU), "cpu", "cuda", "cuda:1", ...

    Returns:
        The device, a CUDA one with its index.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}; expected auto, cpu, cuda or cuda:<number>") from error
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = device.index if device.index is not None else torch.cuda.current_device() if count else 0
    if index >= count:
        raise ValueError(f"device is {name!r}, but {count} CUDA devices can be used here; give another, or cpu")
    return torch.device("cuda", index)


def device_name(device: torch.device) -> str:
    """Return the device in words: name and memory in GiB of a CUDA device, processor and cores of a CPU."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{device}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    threads = torch.get_num_threads()
    return f"{device}: {_processor_name()}, {os.cpu_count()} cores, {threads} threads"


def _processor_name() -> str:
    """Return the processor's model; Python alone knows only the architecture on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


def operation_paths(device: torch.device) -> dict[str, backend.Path]:
    """Which implementation of each shared operation runs on a device.

    Args:
        device: the device asked about.

    Returns:
        Operation to `Path` (`name` is `"xformers"` or `"torch"`, `reason` says why).
    """
    return {
        "select_tokens": backend.operation_path("select_tokens", device),
        "merge_tokens": backend.Path("torch", "xFormers has no merge that is exact at gate 1"),
        "ragged_attention": backend.operation_path("ragged_attention", device),
    }


def report() -> str:
    """Return the full report as text, one fact per line."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = [f"python {platform.python_version()} on {platform.system()} {platform.machine()}"]
    lines += [f"{package} {version}" for package, version in package_versions().items()]
    lines += [f"device {device_name(device)}"]
    paths = operation_paths(device)
    lines += [f"{name}: {path.name} ({path.reason})" for name, path in paths.items()]
    lines += [f'attention="mmskip_ragged" of a method or attn_implementation: {paths["ragged_attention"].name}']
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
