"""Fine-tuning of any VLM of transformers, with methods (MoD) and LoRA, as a LightningModule.

Shapes: B rows, T tokens, P labelled positions, V vocabulary, A answers.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn import functional as F

from mmskip import MoDConfig
from mmskip.calibration.fit_routers import fit_routers
from mmskip.datasets.chat.batches import NOT_INPUTS
from mmskip.datasets.common.labels import IGNORE
from mmskip.methods.mixture_of_depths import anneal, read_keep
from mmskip.models.common.base import StepLossModule
from mmskip.models.common.fp32_head import head_only_at
from mmskip.models.common.language_model import LoRA, methods_from_dicts, methods_to_dicts, torch_dtype
from mmskip.models.common.optim import SCHEDULES, warmup_schedule
from mmskip.models.common.positions import Positions
from mmskip.models.vlm.build import (
    ROUTER,
    build_vlm,
    check_fit,
    has_grid_positions,
    save_base,
    save_tuned,
    token_ids,
    trained_counts,
    tune,
    vlm_config,
)

ADAPTER_FOLDER = "adapter"


_LIMITS = {
    "anneal_steps": (0, math.inf),
    "router_fit": (0, math.inf),
    "lr": (1e-12, math.inf),
    "router_lr": (1e-12, math.inf),
    "weight_decay": (0, math.inf),
    "warmup": (0, 0.999),
    "max_new_tokens": (1, math.inf),
}


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Raise ValueError for settings out of range, or that contradict one another."""
    for name, (low, high) in _LIMITS.items():
        value = settings[name]
        if not (name == "router_lr" and value is None) and not low <= value <= high:
            raise ValueError(f"{name} is {value}; expected a number from {low} to {high}")
    if settings["schedule"] not in SCHEDULES:
        raise ValueError(f"schedule is {settings['schedule']!r}; expected one of {', '.join(SCHEDULES)}")
    if settings["export"] is not None and settings["trainable"] != "all":
        raise ValueError(
            f"export={settings['export']!r} writes a whole model, but trainable is {settings['trainable']!r}; use 'all'"
        )
    torch_dtype(settings["dtype"])


class VLM(StepLossModule):
    """A VLM of transformers that learns the assistant's turns of conversations with images and videos.

    Batches are those of `mmskip.datasets.chat.batches.ChatCollate`. The loss of an optimizer step is the summed
    cross-entropy of all its labels over their number, over micro-batches and ranks. At the end of training, what was
    trained is written to `adapter/` in the folder of the run: routers and method configs by `mmskip.save`, LoRA in
    peft's format, base weights (trainable="all") as transformers writes them.

    Args:
        vlm: name or folder of a VLM, or a dict with `model_type` and settings for one from scratch (vocabulary and
            token ids are the processor's).
        methods: configs applied in order after LoRA, e.g. `[MoDConfig(keep=0.5)]`; none: dense.
        lora: adapters by peft.
        trainable: "all" (the whole model and routers), "router" (the methods' weights alone), "lora" or "router+lora";
            the rest is frozen.
        dtype: of the VLM's weights: float32, bfloat16 or float16. Routers and adapters are float32.
        attention: attention backend of transformers: sdpa, eager, ...
        gradient_checkpointing: recompute each layer in the backward pass.
        anneal_steps: optimizer steps in which the keep ratio of MoD falls from 1 to the config's, >= 0. Validation
            during training uses the ratio of the step; everything after training, the config's.
        router_fit: training batches on which learned routers with gate "separate" or "none" are taught the attention of
            the answers before the first step (`mmskip.calibration.fit_routers.fit_routers`); 0: they stay random.
        lr: peak learning rate of AdamW, > 0.
        router_lr: the same for the methods' weights; None: `lr`.
        weight_decay: on matrices only (not on norms, biases, embeddings and routers), >= 0.
        betas: of AdamW.
        schedule: of the learning rate after warm-up: cosine, linear (both to 0) or constant.
        warmup: share of all steps with a linearly rising rate, in [0, 1).
        max_new_tokens: longest answer when predicting, tokens.
        export: folder to write the trained base model and its processor to as well; with trainable="all" only.
        tokens: what a model from scratch has to know of its processor (`mmskip.models.vlm.build.token_ids`); None:
            taken from the data module.

    Raises:
        ValueError: a setting out of range, settings that contradict one another, a `vlm` that does not exist here, or a
            method that does not fit it. Nothing has been written then, and nothing downloaded but the configuration.
    """

    source = "vlm"
    same_model = ("vlm", "lora", "methods", "trainable", "tokens")
    open_until_built = ("tokens",)

    def __init__(
        self,
        vlm: str | dict[str, Any],
        methods: list[MoDConfig] | None = None,
        lora: LoRA | None = None,
        trainable: str = "all",
        dtype: str = "float32",
        attention: str = "sdpa",
        gradient_checkpointing: bool = False,
        anneal_steps: int = 0,
        router_fit: int = 0,
        lr: float = 1e-3,
        router_lr: float | None = None,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        schedule: str = "cosine",
        warmup: float = 0.05,
        max_new_tokens: int = 100,
        export: str | None = None,
        tokens: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(lora, Mapping):
            lora = LoRA(**lora)
        # dicts and lists only: a dataclass in the hyper-parameters breaks weights-only loading of the checkpoint
        settings: dict[str, Any] = {
            "vlm": vlm if isinstance(vlm, str) else dict(vlm),
            "methods": methods_to_dicts(methods),
            "lora": None if lora is None else asdict(lora),
            "trainable": trainable,
            "dtype": dtype,
            "attention": attention,
            "gradient_checkpointing": gradient_checkpointing,
            "anneal_steps": anneal_steps,
            "router_fit": router_fit,
            "lr": lr,
            "router_lr": router_lr,
            "weight_decay": weight_decay,
            "betas": list(betas),
            "schedule": schedule,
            "warmup": warmup,
            "max_new_tokens": max_new_tokens,
            "export": export,
            "tokens": tokens,
        }
        _check_settings(settings)
        self._set_hparams(settings)
        self._config = vlm_config(vlm)
        self._methods = methods_from_dicts(self.hparams["methods"])
        self._lora = lora
        check_fit(self._config, attention, self._methods, trainable, lora)
        self.llm: Any = None
        self.results: dict[str, float] = {}
        if tokens is not None:
            self.configure_model()

    # --- building -----------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build the model, once. The token ids of a model from scratch come from the trainer's data module.

        Raises:
            ValueError: there is no data module to ask, or its batches are packed and the model cannot tell.
        """
        if self.llm is not None:
            return
        data: Any = getattr(self._trainer, "datamodule", None)
        if self.hparams["tokens"] is None and data is not None:
            self.hparams["tokens"] = token_ids(data.processor)
        if self.hparams["tokens"] is None and not isinstance(self.hparams["vlm"], str):
            raise ValueError("a VLM from scratch needs tokens: pass them, or run it by a Trainer with a data module")
        # what a data module did before must not change the initial weights, so the seed is set anew
        torch.manual_seed(self._seed)
        model = build_vlm(
            self.hparams["vlm"],
            self._config,
            self.hparams["tokens"] or {},
            self.hparams["dtype"],
            self.hparams["attention"],
        )
        if getattr(data, "pack", False) and has_grid_positions(model):
            raise ValueError(
                f"pack=true does not serve {self._config.model_type}: its positions are those of a grid (M-RoPE), "
                "while packed rows carry plain ones; use pack=false"
            )
        tune(model, self._methods, self.hparams["trainable"], self._lora)
        if self.hparams["gradient_checkpointing"]:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.llm = model.train()
        counts = trained_counts(model)
        total = counts.pop("all")
        parts = ", ".join(f"{kind} {count:,}" for kind, count in counts.items() if count)
        rank_zero_info(f"trained parameters: {parts}; of {total:,} ({sum(counts.values()) / total:.2%})")

    # --- forward ------------------------------------------------------------------------------------------------

    def forward(self, batch: dict[str, Any], rows: Tensor, cols: Tensor) -> Tensor:
        """Logits [P, V] behind the tokens at `[rows, cols]` of a batch."""
        with head_only_at(self.llm, rows, cols):
            out = self.llm(**inputs_of(batch), use_cache=False)
        return out.logits

    def _losses(self, batch: dict[str, Any]) -> tuple[Positions, Tensor, Tensor]:
        """The labelled positions, and cross-entropy [P] and correctness [P] there."""
        labels = batch["labels"]
        positions = Positions.of(labels, torch.full_like(labels, -1))
        logits = self(batch, positions.rows, positions.cols).float()
        losses = F.cross_entropy(logits, positions.labels, reduction="none")
        return positions, losses, logits.argmax(-1) == positions.labels

    def loss_sums(self, batch: dict[str, Any]) -> Tensor:
        """Sums [3]: cross-entropy (differentiable), labels, labels that are the likeliest token."""
        _, losses, right = self._losses(batch)
        return torch.stack([losses.sum(), losses.new_tensor(len(losses)), right.sum().to(losses.dtype)])

    def step_losses(self, sums: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The number of labels, and their loss and accuracy."""
        loss, labels, right = sums.unbind()
        labels = labels.clamp(min=1)
        return labels, {
            "loss": loss / labels,
            "token_accuracy": right / labels,
            "keep": sums.new_tensor(read_keep(self.llm)),
        }

    # --- annealing ----------------------------------------------------------------------------------------------

    @property
    def progress(self) -> float:
        """How far the keep ratio has gone from 1 to the target: a function of the optimizer steps done, so that a
        resumed run goes on where it was. 1 outside of training."""
        steps = self.hparams["anneal_steps"]
        if steps == 0 or self._trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return 1.0
        return min(self.trainer.global_step / steps, 1.0)

    def on_fit_start(self) -> None:
        """Refuse an annealing that the run would not finish; fit the routers, unless the run is a resumed one.

        Raises:
            ValueError: fewer steps than anneal_steps.
        """
        steps, total = self.hparams["anneal_steps"], self.trainer.estimated_stepping_batches
        if steps > total and not getattr(self.trainer, "fast_dev_run", False):
            raise ValueError(
                f"anneal_steps is {steps}, but the run has {total} optimizer steps and would end above the target "
                "keep; train longer (trainer.max_epochs, trainer.max_steps) or anneal faster (model.anneal_steps)"
            )
        if self.hparams["router_fit"] and self.trainer.ckpt_path is None:
            self._fit_routers(self.hparams["router_fit"])

    def _fit_routers(self, batches: int) -> None:
        """Fit the routers on the first training batches of every rank."""
        loader = self.trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]

        def calls() -> Iterator[tuple[dict[str, Any], Tensor]]:
            for batch in islice(iter(loader), batches):
                batch = self.trainer.strategy.batch_to_device(batch)
                yield inputs_of(batch), answering_tokens(batch["labels"])

        def reduce(sums: Tensor) -> Tensor:
            return self.trainer.strategy.reduce(sums, reduce_op="sum")

        explained = fit_routers(self.llm, calls(), reduce=reduce)
        shares = ", ".join(f"block {index} {share:.0%}" for index, share in explained.items())
        rank_zero_info(f"routers fitted on {batches} batches; explained attention within frames: {shares}")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Use the keep ratio of this step."""
        anneal(self.llm, self.progress)

    # --- optimizer ----------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """AdamW in three groups (matrices, other weights, routers) with warm-up and decay per step."""
        tables = {id(self.llm.get_input_embeddings().weight)}
        groups: dict[str, list[Tensor]] = {"decayed": [], "plain": [], "routers": []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                matrix = parameter.ndim >= 2 and id(parameter) not in tables
                groups["routers" if ROUTER in name else "decayed" if matrix else "plain"].append(parameter)
        settings = {
            "decayed": {"lr": self.hparams["lr"], "weight_decay": self.hparams["weight_decay"]},
            "plain": {"lr": self.hparams["lr"], "weight_decay": 0.0},
            "routers": {"lr": self.hparams["router_lr"] or self.hparams["lr"], "weight_decay": 0.0},
        }
        optimizer = torch.optim.AdamW(
            [{"params": weights, "name": name, **settings[name]} for name, weights in groups.items() if weights],
            betas=tuple(self.hparams["betas"]),
            fused=True,
        )
        total = self.trainer.estimated_stepping_batches
        schedule = warmup_schedule(self.hparams["schedule"], self.hparams["warmup"], total)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # --- evaluation ---------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Start the sums anew, at the keep ratio of the moment."""
        anneal(self.llm, self.progress)
        self._scores = torch.zeros(5, device=self.device, dtype=torch.float64)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Add up the losses and the right answers of the batch."""
        self._scores += self._score(batch).to(self._scores)

    def on_validation_epoch_end(self) -> None:
        """Log loss and accuracies, over the samples of all ranks."""
        self._log_scores("val")

    def on_test_epoch_start(self) -> None:
        """As `on_validation_epoch_start`."""
        self.on_validation_epoch_start()

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """As `validation_step`."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log loss and accuracies, over the samples of all ranks."""
        self._log_scores("test")

    def _score(self, batch: dict[str, Any]) -> Tensor:
        """Sums [5]: cross-entropy, labels, right labels, answers, answers whose labels are all right. An answer is a
        run of neighbouring labels."""
        positions, losses, right = self._losses(batch)
        rows, cols = positions.rows, positions.cols
        begins = torch.ones_like(rows, dtype=torch.bool)
        begins[1:] = (rows[1:] != rows[:-1]) | (cols[1:] != cols[:-1] + 1)
        answer = begins.cumsum(0) - 1
        wrong = torch.zeros(int(begins.sum()), device=losses.device).index_add_(0, answer, (~right).float())
        values = [losses.sum(), len(losses), right.sum(), len(wrong), (wrong == 0).sum()]
        return torch.stack([torch.as_tensor(value, device=losses.device).double() for value in values])

    def _log_scores(self, stage: str) -> None:
        sums: Any = self.trainer.strategy.reduce(self._scores, reduce_op="sum")
        loss, labels, right, answers, whole = sums.tolist()
        self.results = {
            "loss": loss / max(labels, 1),
            "token_accuracy": right / max(labels, 1),
            "answer_accuracy": whole / max(answers, 1),
            "answers": answers,
            "keep": read_keep(self.llm),
        }
        for name in ("loss", "token_accuracy", "answer_accuracy", "keep"):
            self.log(f"{stage}/{name}", self.results[name], prog_bar=name in ("loss", "answer_accuracy"))

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[tuple[str, list[int]]]:
        """The uid and the generated ids (greedy) of each conversation's answer."""
        anneal(self.llm, self.progress)
        prompt = batch["input_ids"].shape[1]
        out = self.llm.generate(**inputs_of(batch), max_new_tokens=self.hparams["max_new_tokens"], do_sample=False)
        return list(zip(batch["uid"], out[:, prompt:].tolist(), strict=True))

    # --- saving -------------------------------------------------------------------------------------------------

    def on_fit_end(self) -> None:
        """Write what was trained to `adapter/`, and to `export`."""
        if not self.trainer.is_global_zero or getattr(self.trainer, "fast_dev_run", False):
            return
        processor = self.trainer.datamodule.processor  # type: ignore[attr-defined]
        written = save_tuned(self.llm, Path(self.trainer.default_root_dir) / ADAPTER_FOLDER, processor)
        if self.hparams["export"] is not None:
            save_base(self.llm, self.hparams["export"], processor)
            written.append(Path(self.hparams["export"]))
        rank_zero_info("written: " + ", ".join(str(path) for path in written))


def inputs_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the VLM's forward in a batch."""
    return {key: value for key, value in batch.items() if key not in NOT_INPUTS}


def answering_tokens(labels_BT: Tensor) -> Tensor:
    """BoolTensor [B, T]: the tokens from which a labelled one is predicted, one place before it."""
    labelled_BT = labels_BT != IGNORE
    before_BT = torch.zeros_like(labelled_BT)
    before_BT[:, :-1] = labelled_BT[:, 1:]
    return before_BT
