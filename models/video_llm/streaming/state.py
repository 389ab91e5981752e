"""Save running streams and resume them later."""

import json
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from mmskip.models.video_llm.streaming.engine import StreamEngine
from mmskip.models.video_llm.streaming.settings import StreamSettings
from mmskip.utils.files import atomic_path

if TYPE_CHECKING:
    from mmskip.models.video_llm.module import VideoLLM

_FORMAT = 1
_KEY = "mmskip_streams"


def save_streams(engine: StreamEngine, path: str | Path) -> None:
    """Write all streams of an engine into one safetensors file, atomically: keys, values, positions and waiting frames
    as tensors, the rest as JSON in its header.

    Args:
        engine: between two runs or steps, of a `VideoLLM`.
        path: the file; its folder is made.
    """
    state, tensors = engine.state()
    model: Any = engine.model
    header = {"format": _FORMAT, "model": describe(model), "frame_tokens": engine.frame_tokens, **state}
    with atomic_path(path) as partial:
        save_file({name: x.cpu().contiguous() for name, x in tensors.items()}, partial, {_KEY: json.dumps(header)})


def load_streams(model: "VideoLLM", path: str | Path) -> StreamEngine:
    """Load the engine that `save_streams` wrote, on `model`.

    Raises:
        ValueError: not such a file, or the streams of another model: other settings or other weights.
    """
    try:
        with safe_open(str(path), "pt") as file:
            header = json.loads((file.metadata() or {})[_KEY])
        tensors = load_file(str(path))
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a file of saved streams ({error!r})") from error
    if header["format"] != _FORMAT:
        raise ValueError(f"{path} has format {header['format']!r}; this mmskip reads format {_FORMAT}")
    own = describe(model)
    for key, saved in header["model"].items():
        if saved != own.get(key):
            raise ValueError(
                f"{path} was saved by a model with {key}={saved!r}, this one has {own.get(key)!r}; load the checkpoint "
                "that watched these streams"
            )
    settings = StreamSettings.from_dict(header["settings"])
    engine = StreamEngine(model, header["frame_tokens"], settings, [[]] * len(header["streams"]))
    engine.restore(header, tensors)
    return engine


def describe(model: "VideoLLM") -> dict[str, Any]:
    """Describe what two models must share for one to resume the streams of the other, JSON-ready."""
    settings = {key: model.hparams[key] for key in ("llm", "lora", "methods", "llm_dtype", "feature_dim", "tokens")}
    digest = sha256()
    for name, parameter in sorted(model.named_parameters()):
        # what every run trains; hashing all weights of a large model would take long
        if name.startswith("connector.") or "mmskip_" in name or "lora_" in name:
            digest.update(name.encode() + parameter.detach().float().cpu().numpy().tobytes())
    return json.loads(json.dumps({**settings, "weights": digest.hexdigest()}))
