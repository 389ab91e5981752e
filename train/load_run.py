"""Finding a training run again: its checkpoint, its config, its model, its data, its tokenizer."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule

from mmskip.models.captioner.module import Captioner
from mmskip.models.video_llm.module import VideoLLM
from mmskip.models.video_llm.speaking import TokenIds
from mmskip.train.checkpoints import find_checkpoint, load_weights, read_checkpoint

TOKENIZER = "tokenizer"
Model = TypeVar("Model", VideoLLM, Captioner)
_KINDS: dict[type, str] = {VideoLLM: "video LLM", Captioner: "captioner"}


@dataclass(frozen=True)
class TrainedRun:
    """A training run on disk.

    Attributes:
        checkpoint: the checkpoint file.
        folder: of the run: that of its config, or of the checkpoint.
        config: the run's complete config, as saved or as given; empty if there is none.
    """

    checkpoint: Path
    folder: Path
    config: dict[str, Any]

    @property
    def precision(self) -> str:
        """Precision of the trainer, as Lightning names it."""
        return str((self.config.get("trainer") or {}).get("precision") or "32-true")


def find_run(given: str | Path, config: str | Path | None = None) -> TrainedRun:
    """Find the run of a path: a checkpoint file, the folder of a run (`runs/NAME/TIME`), or the folder of all runs of a
    name (the newest is taken).

    Args:
        given: the path.
        config: a YAML of the run, if it does not lie beside the checkpoint.

    Raises:
        ValueError: no such path, no checkpoint there, or an unreadable config.
    """
    path = find_checkpoint(given)
    folder = path.resolve().parents[1] if path.resolve().parent.name == "checkpoints" else path.resolve().parent
    settings = Path(config) if config is not None else folder / "config.yaml"
    if config is not None and not settings.is_file():
        raise ValueError(f"{config}: no such config")
    content = yaml.safe_load(settings.read_text()) if settings.is_file() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{settings}: not the config of a run; expected a mapping with 'model' and 'data'")
    return TrainedRun(path, folder, content)


def load_model(run: TrainedRun, device: str | torch.device = "cpu", dtype: str | None = None) -> VideoLLM:
    """The trained model in evaluation mode: settings and weights of the checkpoint.

    Args:
        run: the run.
        device: where to.
        dtype: of the language model's weights; None: as it was trained.

    Raises:
        ValueError: an unreadable checkpoint, or one of another model.
    """
    return _load(run, VideoLLM, {} if dtype is None else {"llm_dtype": dtype}).to(device).eval()


def load_captioner(run: TrainedRun, device: str | torch.device = "cpu") -> Captioner:
    """Load the captioner of a run, in evaluation mode."""
    return _load(run, Captioner, {}).to(device).eval()


def _load(run: TrainedRun, kind: type[Model], changed: dict[str, Any]) -> Model:
    checkpoint = read_checkpoint(run.checkpoint)
    settings = checkpoint["hyper_parameters"]
    known = inspect.signature(kind.__init__).parameters
    named = (run.config.get("model") or {}).get("class_path", "")
    needed = {name for name, given in known.items() if name != "self" and given.default is given.empty}
    if not needed <= set(settings) or (named and named.rpartition(".")[2] != kind.__name__):
        raise ValueError(
            f"{run.checkpoint} holds no {_KINDS[kind]} but {named or 'a model with ' + ', '.join(sorted(settings))}; "
            f"give the checkpoint of a run with model {kind.__module__}.{kind.__name__}"
        )
    model = kind(**{name: settings[name] for name in known if name in settings} | changed)
    load_weights(model, checkpoint, run.checkpoint)
    return model


def load_data(run: TrainedRun, class_path: str | None = None, **overrides: Any) -> Any:
    """The data module of a run, by its config.

    Args:
        run: with a config.
        class_path: another class; settings it does not have are left out.
        **overrides: settings that replace those of the config.

    Raises:
        ValueError: the run has no config, or settings that do not fit.
    """
    data = run.config.get("data")
    if not isinstance(data, dict) or "class_path" not in data:
        raise ValueError(
            f"{run.folder} holds no config.yaml that says what data the run was trained on; give --config with the "
            "YAML it was trained by"
        )
    settings = {**(data.get("init_args") or {}), **overrides}
    if class_path is not None:
        module, _, name = class_path.rpartition(".")
        known = _arguments(getattr(__import__(module, fromlist=[name]), name))
        settings = {key: value for key, value in settings.items() if key in known}
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    parsed = parser.parse_object({"data": {"class_path": class_path or data["class_path"], "init_args": settings}})
    return parser.instantiate_classes(parsed).data


def check_tokens(model: VideoLLM, data: Any) -> None:
    """Refuse a tokenizer other than the one the model was trained with.

    Raises:
        ValueError: the tokenizers differ; the message gives the remedy.
    """
    if TokenIds.of(data.tokenizer) != model.ids:
        raise ValueError(
            "the tokenizer of the data is not the one the model was trained with; point data.tokenizer at the run's "
            "folder 'tokenizer', or give the data settings of its training (--config)"
        )


def _arguments(cls: type) -> set[str]:
    """Names of the constructor's arguments, those of base classes included."""
    return {name for base in cls.__mro__ if base is not object for name in inspect.signature(base).parameters}


def tokenizer_folder(run: TrainedRun) -> str | None:
    """The folder in which the run kept its tokenizer; None for a run that kept none."""
    folder = run.folder / TOKENIZER
    return str(folder) if folder.is_dir() else None
