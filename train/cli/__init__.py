"""The commands: one module each, see `mmskip_cli`."""

from mmskip.utils.command import quiet_imports

quiet_imports()  # before a command imports transformers, in worker processes too

from mmskip.train.cli.train import CONFIGS, find_config, main, prepare_arguments  # noqa: E402

__all__ = ["CONFIGS", "find_config", "main", "prepare_arguments"]
