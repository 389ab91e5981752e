"""Bases of this project's LightningModules.

`BaseModule` gives methods from the YAML, settings as plain data, seeds and the optimizer. `StepLossModule` adds, for
token models, a loss normalised over optimizer steps and checkpoints without the frozen weights of a named model.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from mmskip.models.common.methods import freeze, thaw
from mmskip.models.common.optim import adamw, decay_groups
from mmskip.models.common.pretrained import METHOD

SHARDING = ("FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy")


def check_strategy(strategy: Any) -> None:
    """Raise unless every rank holds all of the model, as steps, evaluation and the report at the end of a run expect.

    Raises:
        ValueError: a strategy that shards weights, or that makes the model reduce its gradients itself.
    """
    names = [cls.__name__ for cls in type(strategy).__mro__]
    if any(name in names for name in SHARDING):
        raise ValueError(
            f"trainer.strategy is {names[0]}; this module needs the complete model on every rank: use 'ddp' (with LoRA "
            "and gradient_checkpointing if memory is short), or shard mmskip's model in a custom loop with "
            "torch.distributed.fsdp.fully_shard (docs/models.md)"
        )


class BaseModule(LightningModule):
    """A LightningModule with methods, whose settings a checkpoint can hold.

    Args:
        given: all settings by name; `methods` are configs or the dicts of `mmskip.models.common.methods.freeze`. They
            become `hparams`, as numbers, texts, lists and dicts only: a dataclass among them would break weights-only
            loading of the checkpoint.

    Attributes:
        methods: configs of the methods, in the order in which they are applied.
        fused: which AdamW of torch runs, see `torch.optim.AdamW`.

    Raises:
        ValueError: an unknown method, or an unknown or bad setting of one.
    """

    fused: bool | None = True

    def __init__(self, given: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        given = {"methods": None} if given is None else given
        self._seed = torch.initial_seed() % 2**32
        self.methods = thaw(given["methods"])
        self._set_hparams({name: _plain(value) for name, value in given.items()} | {"methods": freeze(self.methods)})

    @property
    def data(self) -> Any:
        """The trainer's data module; None without a trainer."""
        return getattr(self._trainer, "datamodule", None)

    def seed_weights(self) -> None:
        """Set the seed of the initial weights anew, so that what a data module did before does not change them."""
        torch.manual_seed(self._seed)

    def seed_step(self, batch_idx: int) -> None:
        """Set the seed of a training step: a resumed run draws what the uninterrupted run would have drawn, and each
        rank draws for itself."""
        torch.manual_seed(hash((self._seed, self.current_epoch, batch_idx, self.global_rank)) % 2**63)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The trained weights for AdamW: weight decay on matrices only."""
        return decay_groups(self.parameters(), self.hparams["weight_decay"])

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up and decay of the learning rate per optimizer step."""
        settings = {name: self.hparams[name] for name in ("lr", "schedule", "warmup", "betas") if name in self.hparams}
        total = self.trainer.estimated_stepping_batches
        return adamw(self.parameter_groups(), total_steps=total, fused=self.fused, **settings)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, (list, tuple)) else value


class StepLossModule(BaseModule):
    """A LightningModule whose loss of an optimizer step is the summed loss of all its labels over their number, over
    micro-batches and ranks.

    A subclass gives `loss_sums` and `step_losses`, and names its pretrained model.

    Attributes:
        llm: the model of transformers, with LoRA and methods; None until it is built.
        source: the hyper-parameter that names the pretrained model (a string), or describes one from scratch (a dict).
        same_model: the hyper-parameters in which a checkpoint and the model it is loaded into must agree.
        open_until_built: those of them that may be None until a data module is asked.
    """

    source = "llm"
    same_model: Sequence[str] = ("llm", "lora", "methods")
    open_until_built: Sequence[str] = ()

    def __init__(self, given: Mapping[str, Any] | None = None) -> None:
        super().__init__(given)
        self.llm: Any = None
        self._sums: Tensor | None = None

    def setup(self, stage: str) -> None:
        """Refuse strategies under which weights would stay out of step.

        Raises:
            ValueError: the trainer shards the model.
        """
        check_strategy(self.trainer.strategy)

    def loss_sums(self, batch: Any) -> Tensor:
        """Sums over the labels of one micro-batch, a vector; the first is the differentiable loss."""
        raise NotImplementedError

    def step_losses(self, sums: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute from the sums of a step the number of its labels, and the values logged as `train/<name>`."""
        raise NotImplementedError

    def on_train_start(self) -> None:
        """Start the sums of the first optimizer step."""
        self._sums = None

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The summed loss of a micro-batch. Lightning divides by the number of micro-batches and DDP by that of ranks,
        which is undone here; the division by the labels of the step follows in `on_before_optimizer_step`."""
        self.seed_step(batch_idx)
        sums = self.loss_sums(batch)
        self._sums = sums.detach() if self._sums is None else self._sums + sums.detach()
        return sums[0] * (self.trainer.accumulate_grad_batches * self.trainer.world_size)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The trained weights for AdamW: weight decay on matrices other than the embeddings."""
        return decay_groups(self.parameters(), self.hparams["weight_decay"], [self.embedding_table])

    @property
    def embedding_table(self) -> Tensor:
        """The token embeddings [V, D]."""
        return self.llm.get_input_embeddings().weight

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the number of labels of the step, and log its losses."""
        assert self._sums is not None
        sums = self.trainer.strategy.reduce(self._sums, reduce_op="sum")
        self._sums = None
        labels, losses = self.step_losses(sums)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.div_(labels.to(parameter.grad.dtype))
        for name, value in losses.items():
            self.log(f"train/{name}", value, prog_bar=name == "loss")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Drop frozen weights of a named model: the name is enough to load them again."""
        for name in self._frozen():
            del checkpoint["state_dict"][name]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another model, and put back the frozen weights left out on saving.

        Raises:
            ValueError: as `check_same`.
        """
        self.check_same(checkpoint["hyper_parameters"])
        current = self.state_dict()
        checkpoint["state_dict"].update({name: current[name] for name in self._frozen()})

    def check_same(self, saved: Mapping[str, Any]) -> None:
        """Compare the hyper-parameters of a checkpoint with the model's. A setting that it is too old to have had its
        default there.

        Raises:
            ValueError: another value of a hyper-parameter in `same_model`, or another class of model.
        """
        if self.source not in saved:
            raise ValueError(
                f"the checkpoint is of no {type(self).__name__}: it has no setting {self.source!r} but "
                f"{', '.join(sorted(saved))}"
            )
        defaults = inspect.signature(type(self).__init__).parameters
        for key in self.same_model:
            own = self.hparams[key]
            theirs = saved[key] if key in saved else defaults[key].default or own
            if key == "methods":
                theirs = freeze(thaw(theirs))  # spellings of an older version become today's
            # a named model may lie in another folder now, and what is open is taken from a data module later
            named = key == self.source and isinstance(theirs, str) and isinstance(own, str)
            open_ = key in self.open_until_built and (theirs is None or own is None)
            if theirs != own and not named and not open_:
                raise ValueError(
                    f"the checkpoint was trained with {key}={theirs!r}, this model has {key}={own!r}; use the "
                    "config.yaml of the checkpoint's run, and the data it was trained on"
                )

    def _frozen(self) -> Sequence[str]:
        if not isinstance(self.hparams[self.source], str):
            return []
        # weights of methods are in no named model, even those that get no gradient (fitted routers)
        frozen = [name for name, value in self.named_parameters() if not value.requires_grad]
        return [name for name in frozen if METHOD not in name]
