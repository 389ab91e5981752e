"""One folder per run, on Lightning's command line interface."""

import logging
import os
import re
import time
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

from jsonargparse import set_parsing_settings
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import SIGTERMException

from mmskip.config import read_old_spellings
from mmskip.registry import config_types
from mmskip.train.checkpoints import (
    Resume,
    StartFrom,
    WholeFileIO,
    find_checkpoint,
    last_checkpoint,
)
from mmskip.utils.files import atomic_path, write_text

# Ranks started by Lightning inherit the environment of rank 0, and with it the folder.
RUN_FOLDER = "MMSKIP_RUN_FOLDER"


class SaveConfig(SaveConfigCallback):
    """Saves the complete config of a training run into its folder, fit for running it again, and the tokenizer of its
    data, so that the trained model can be used without the training data."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write `config.yaml` and the folder `tokenizer`, on fit only."""
        if stage != "fit" or not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config.clone()
        # a run made again from this file starts from the beginning, as this one or its predecessor did
        config["ckpt_path"] = None
        write_text(self.parser.dump(config, skip_none=False), folder / "config.yaml")
        tokenizer = getattr(getattr(trainer, "datamodule", None), "tokenizer", None)
        if tokenizer is not None:
            with atomic_path(folder / "tokenizer") as partial:
                tokenizer.save_pretrained(partial)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say how to resume an interrupted training run."""
        last = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        if isinstance(exception, (KeyboardInterrupt, SIGTERMException)) and trainer.is_global_zero:
            if last.is_file():
                print(f"\ninterrupted; to resume from {last}, give the same arguments and --ckpt_path last")
            else:
                print("\ninterrupted before the first checkpoint; nothing to resume from")


class RunCLI(LightningCLI):
    """Any model and data module of the project, by class_path in YAML; see `mmskip.train.cli.train`."""

    def __init__(self, arguments: Sequence[str], default_name: str) -> None:
        self.default_name = default_name
        self.start: StartFrom | None = None
        super().__init__(
            LightningModule,
            LightningDataModule,
            save_config_callback=SaveConfig,
            seed_everything_default=0,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            # an abbreviated key is a misspelt one
            parser_kwargs={"allow_abbrev": False} | {name: {"allow_abbrev": False} for name in self.subcommands()},
            args=list(arguments),
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The settings of runs and checkpoints."""
        parser.add_argument(
            "--name", type=str, default=self.default_name, help="Name of the run. Default: that of the config."
        )
        parser.add_argument("--runs_dir", type=str, default="runs", help="A run writes to <runs_dir>/<name>/<time>/.")
        parser.add_argument(
            "--start_from",
            type=str | None,
            default=None,
            help="Run or checkpoint with whose weights training begins; optimizer, schedule and steps are new.",
        )
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.filename": "last",
                "checkpoint.enable_version_counter": False,
                "checkpoint.auto_insert_metric_name": False,
            }
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the given arguments, whatever those of the process are.

        Raises:
            ValueError: a setting that does not exist, or a value of the wrong type.
        """
        for part in (parser, *self._subcommand_parsers.values()):
            part.exit_on_error = False
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            raise ValueError(explained(error.message)) from None

    def _parse_ckpt_path(self) -> None:
        """Nothing: hyper-parameters stored in a checkpoint must not beat YAML and command line. A model refuses a
        checkpoint that does not fit it."""

    def before_instantiate_classes(self) -> None:
        """Find the checkpoint and choose the folder of the run.

        Raises:
            ValueError: a name that is no folder name, or no checkpoint where one is needed or named.
        """
        config = self.config[self.subcommand]
        if not re.fullmatch(r"[\w.-]+", config.name):
            raise ValueError(f"name is {config.name!r}; expected letters, digits, '_', '-' and '.'")
        runs = Path(config.runs_dir) / config.name
        if config.ckpt_path == "last" or (config.ckpt_path is None and self.subcommand != "fit"):
            config.ckpt_path = str(last_checkpoint(runs))
        elif config.ckpt_path is not None and not Path(config.ckpt_path).is_file():
            raise ValueError(f"ckpt_path={config.ckpt_path!r} is no file; give a checkpoint, or 'last'")
        if config.ckpt_path is not None:
            print(f"checkpoint: {config.ckpt_path}")
        # the config of a run serves its other subcommands too, and a resumed run has begun already
        if config.start_from is not None and self.subcommand == "fit" and config.ckpt_path is None:
            config.start_from = str(find_checkpoint(config.start_from).resolve())
            self.start = StartFrom(Path(config.start_from))
        stamp = time.strftime("%Y%m%d-%H%M%S") + ("" if self.subcommand == "fit" else f"-{self.subcommand}")
        self.folder = Path(os.environ.setdefault(RUN_FOLDER, str(_unused(runs / stamp))))

    def before_fit(self) -> None:
        """Compare the model with the checkpoint that it is to start from."""
        if self.start is not None:
            self.start.check(self.model)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer that logs and saves into the folder of the run, unless the config says where."""
        given = self._get(self.config_init, "trainer")
        kwargs["default_root_dir"] = given.default_root_dir or str(self.folder)
        if given.logger in (None, True):
            kwargs["logger"] = [
                TensorBoardLogger(self.folder, name="", version=""),
                CSVLogger(self.folder, name="", version=""),
            ]
        plugins = given.plugins or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins = [*plugins, WholeFileIO()]
        callbacks = [*(given.callbacks or []), Resume()]
        if self.start is not None:
            callbacks = [*callbacks, self.start]
        if given.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in callbacks):
            callbacks = [*callbacks, TQDMProgressBar()]
        return super().instantiate_trainer(plugins=plugins, callbacks=callbacks, **kwargs)


def explained(message: str) -> str:
    """Shorten a jsonargparse error to the relevant line: it prints every setting given and every type tried.

    An unknown setting of a class is answered with the settings that the class has; other messages lose long values.
    """
    unknown = re.search(r"Option '([\w.]+)' is not accepted", message)
    owners = re.findall(r"given class_path '([\w.]+)'", message[: unknown.start()] if unknown else "")
    if unknown is None or not owners:
        return "\n".join(line if len(line) <= 160 else f"{line[:157]}..." for line in message.splitlines())
    module, _, name = owners[-1].rpartition(".")
    settings = list(signature(getattr(import_module(module), name)).parameters)
    near = get_close_matches(unknown[1], settings, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{owners[-1]} has no setting {unknown[1]!r}.{hint} It has: {', '.join(settings)}."


def _unused(folder: Path) -> Path:
    """The folder, with a number after its name if it exists."""
    names = [folder, *(folder.with_name(f"{folder.name}-{number}") for number in range(2, 1000))]
    return next(path for path in names if not path.exists())


def run(arguments: Sequence[str], name: str) -> None:
    """Carry out one command.

    Args:
        arguments: subcommand and settings, see `mmskip.train.cli.train.prepare_arguments`.
        name: of the run, unless the settings give one.
    """
    # method configs are dataclasses; this lets YAML give them as class_path and init_args
    set_parsing_settings(subclasses_enabled=list(config_types().values()))
    read_old_spellings(config_types())
    # what Lightning calls in other libraries, and hints that do not apply here
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    warnings.filterwarnings("ignore", message=r".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=r"The dirpath has changed from.*")
    warnings.filterwarnings("ignore", message=r"Experiment logs directory .* exists and is not empty.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not record.getMessage().startswith("💡")
    )
    inherited = RUN_FOLDER in os.environ
    try:
        RunCLI(arguments, name)
    finally:
        if not inherited:
            os.environ.pop(RUN_FOLDER, None)
