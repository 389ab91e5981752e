"""Fine-tuning of any VLM of transformers, with methods (MoD) and LoRA, as a LightningModule.

Shapes: B rows, T tokens, P labelled positions, V vocabulary, A answers.
"""

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.nn import functional as F

from mmskip.calibration import fit_routers
from mmskip.config import MethodConfig
from mmskip.datasets.chat.batches import NOT_INPUTS
from mmskip.datasets.common.labels import IGNORE
from mmskip.methods.mixture_of_depths import anneal, read_keep
from mmskip.models.common.base import StepLossModule
from mmskip.models.common.fp32_head import head_only_at
from mmskip.models.common.optim import RANGES, check_ranges, check_schedule, is_decayed
from mmskip.models.common.positions import Positions
from mmskip.models.common.pretrained import METHOD, LoRA, torch_dtype
from mmskip.models.vlm.build import (
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


_LIMITS = RANGES | {
    "router_lr": "(0, inf)",
    "anneal_steps": "[0, inf)",
    "router_fit": "[0, inf)",
    "max_new_tokens": "[1, inf)",
}


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Raise ValueError for settings out of range, or that contradict one another."""
    check_ranges(settings, _LIMITS)
    check_schedule(settings["schedule"])
    if settings["export"] is not None and settings["trainable"] != "all":
        raise ValueError(
            f"export={settings['export']!r} writes all weights, but trainable is {settings['trainable']!r}; use 'all'"
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
        trainable: "all" (all weights and routers), "router" (the methods' weights alone), "lora" or "router+lora";
            the rest is frozen.
        dtype: of the VLM's weights: float32, bfloat16 or float16. Routers and adapters are float32.
        attention: attention backend of transformers: sdpa, eager, ...
        gradient_checkpointing: recompute each layer in the backward pass.
        anneal_steps: optimizer steps in which the keep ratio of MoD falls from 1 to the config's, >= 0. Validation
            during training uses the ratio of the step; everything after training, the config's.
        router_fit: training batches on which learned routers with gate "separate" or "none" are taught the attention of
            the answers before the first step (`mmskip.calibration.fit_routers`); 0: they stay random.
        lr: peak learning rate of AdamW, > 0.
        router_lr: the same for the methods' weights; None: `lr`.
        weight_decay: on matrices only (not on norms, biases, embeddings and routers), >= 0.
        betas: of AdamW.
        schedule: of the learning rate after warm-up: cosine, linear (both to 0) or constant.
        warmup: share of all steps with a linearly rising rate, in [0, 1).
        max_new_tokens: longest answer when predicting, tokens.
        export: folder to write the trained base model and its processor to as well; with trainable="all" only.
        tokens: the processor facts a model from scratch needs (`mmskip.models.vlm.build.token_ids`); None:
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
        methods: list[MethodConfig] | None = None,
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
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        given["lora"] = lora = LoRA(**lora) if isinstance(lora, Mapping) else lora
        _check_settings(given)
        super().__init__(given)
        self._config, self._lora = vlm_config(vlm), lora
        check_fit(self._config, attention, self.methods, trainable, lora)
        self.results: dict[str, float] = {}
        if tokens is not None:
            self.configure_model()

    # --- building -----------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build the model, once. The token ids of a model from scratch come from the trainer's data module.

        Raises:
            ValueError: there is no data module to ask, or its batches are packed and the model cannot know it.
        """
        if self.llm is not None:
            return
        data = self.data
        if self.hparams["tokens"] is None and data is not None:
            self.hparams["tokens"] = token_ids(data.processor)
        if self.hparams["tokens"] is None and not isinstance(self.hparams["vlm"], str):
            raise ValueError("a VLM from scratch needs tokens: pass them, or run it by a Trainer with a data module")
        self.seed_weights()
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
        tune(model, self.methods, self.hparams["trainable"], self._lora)
        if self.hparams["gradient_checkpointing"]:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.llm = model.train()
        counts = trained_counts(model)
        total = counts.pop("all")
        parts = ", ".join(f"{kind} {count:,}" for kind, count in counts.items() if count)
        rank_zero_info(f"trained parameters: {parts}; of {total:,} ({sum(counts.values()) / total:.2%})")

    # --- forward ------------------------------------------------------------------------------------------------

    def forward(self, batch: dict[str, Any], rows: Tensor, cols: Tensor) -> Tensor:
        """Logits [P, V] after the tokens at `[rows, cols]` of a batch."""
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
        """Progress of the keep ratio from 1 to the target: a function of the optimizer steps done, so that a
        resumed run continues where it was. 1 outside of training."""
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

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The trained weights for AdamW: matrices, other weights, and those of the methods."""
        weights: dict[str, list[Tensor]] = {"decayed": [], "plain": [], "routers": []}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                matrix = is_decayed(parameter, [self.embedding_table])
                weights["routers" if METHOD in name else "decayed" if matrix else "plain"].append(parameter)
        lr, decay = self.hparams["lr"], self.hparams["weight_decay"]
        settings = {
            "decayed": {"lr": lr, "weight_decay": decay},
            "plain": {"lr": lr, "weight_decay": 0.0},
            "routers": {"lr": self.hparams["router_lr"] or lr, "weight_decay": 0.0},
        }
        return [{"params": group, "name": name, **settings[name]} for name, group in weights.items() if group]

    # --- evaluation ---------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Start the sums anew, at the current keep ratio."""
        anneal(self.llm, self.progress)
        self._scores = torch.zeros(5, device=self.device, dtype=torch.float64)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Add up the losses and the right answers of the batch."""
        self._scores += self._score(batch).to(self._scores)

    def on_validation_epoch_end(self) -> None:
        """Log loss and accuracies, over the samples of all ranks."""
        self._log_scores("val")

    def on_test_epoch_start(self) -> None:
        """Start the sums anew, at the current keep ratio."""
        self.on_validation_epoch_start()

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Add up the losses and the right answers of the batch."""
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
        loss, labels, right, answers, all_right = sums.tolist()
        self.results = {
            "loss": loss / max(labels, 1),
            "token_accuracy": right / max(labels, 1),
            "answer_accuracy": all_right / max(answers, 1),
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
        """Write the trained weights to `adapter/`, and to `export`."""
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
