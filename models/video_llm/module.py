"""The streaming video LLM of VideoLLM-online and VideoLLM-MoD as a LightningModule.

Shapes: B samples, T tokens, F frames of the batch, N tokens per frame, C feature channels, D width, P labelled
positions, V vocabulary.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import mmskip
from mmskip.config import MethodConfig
from mmskip.models.common.base import StepLossModule
from mmskip.models.common.fp32_head import head_only_at
from mmskip.models.common.methods import check_methods
from mmskip.models.common.optim import RANGES, check_ranges, check_schedule
from mmskip.models.common.positions import Positions
from mmskip.models.common.pretrained import LoRA, adapt, build_llm, check_residual_init, llm_config
from mmskip.models.video_llm.connector import Connector, place_features
from mmskip.models.video_llm.loss import loss_sums
from mmskip.models.video_llm.metrics import NarrationMetrics
from mmskip.models.video_llm.scoring import score_turns
from mmskip.models.video_llm.speaking import TokenIds, Utterance, split_rows
from mmskip.models.video_llm.streaming.engine import StreamEngine
from mmskip.models.video_llm.streaming.settings import StreamSettings


class VideoLLM(StepLossModule):
    """A causal language model that watches a stream of frame features and narrates it.

    Vision positions carry `connector(features)` instead of token embeddings. Batches are those of
    `mmskip.datasets.narration.turns.collate_narration`. The loss of an optimizer step is the summed cross-entropy of
    all its labels (stream labels times `stream_weight`) over the number of these labels, over micro-batches and ranks.

    Args:
        llm: name or folder of a Hugging Face causal LM, or a dict with `model_type` and settings for one from scratch
            (its vocabulary is the tokenizer's).
        methods: configs applied in order after LoRA, e.g. `[MoDConfig(keep=0.2)]`; none: dense.
        lora: adapters by peft, with the base model frozen; None: all weights are trained.
        llm_dtype: dtype of the language model's weights: float32, bfloat16 or float16.
        attention: attention backend of transformers: sdpa, eager, ...
        residual_init: factor, >= 0, on the initial weights of a model from scratch that write into its residual
            stream; 0: every block starts as the identity, and a small model learns to look sooner.
        gradient_checkpointing: recompute each decoder layer in the backward pass.
        stream_weight: factor on the loss of "stay silent or speak", >= 0.
        lr: peak learning rate of AdamW, > 0.
        weight_decay: on matrices only (not on norms, biases and embeddings), >= 0.
        betas: of AdamW.
        schedule: of the learning rate after warm-up: cosine, linear (both to 0) or constant.
        warmup: share of all steps with a linearly rising rate, in [0, 1).
        silent_threshold: when narrating, a silent token below this probability is set to zero.
        max_new_tokens: longest narration when narrating, tokens.
        feature_dim: channels C of the frame features; None: taken from the data module.
        fps: frames per second of the samples; None: taken from the data module.
        tokens: ids of the stream template (`TokenIds.to_dict`); None: taken from the data module's tokenizer.

    Raises:
        ValueError: a setting out of range, an `llm` that does not exist here, or a bad method config. Nothing has
            been read, written or downloaded but the configuration of the language model then.
    """

    same_model = ("llm", "lora", "methods", "tokens", "feature_dim", "fps")
    open_until_built = ("tokens", "feature_dim", "fps")

    def __init__(
        self,
        llm: str | dict[str, Any],
        methods: list[MethodConfig] | None = None,
        lora: LoRA | None = None,
        llm_dtype: str = "float32",
        attention: str = "sdpa",
        residual_init: float = 1.0,
        gradient_checkpointing: bool = False,
        stream_weight: float = 1.0,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        schedule: str = "cosine",
        warmup: float = 0.05,
        silent_threshold: float = 0.725,
        max_new_tokens: int = 100,
        feature_dim: int | None = None,
        fps: float | None = None,
        tokens: dict[str, Any] | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        given["lora"] = lora = LoRA(**lora) if isinstance(lora, Mapping) else lora
        check_ranges(given, RANGES | {"stream_weight": "[0, inf)"})
        check_schedule(schedule)
        super().__init__(given)
        self._config, self._lora = llm_config(llm), lora

        def build() -> Any:
            return AutoModelForCausalLM.from_config(copy.deepcopy(self._config), attn_implementation=attention)

        check_residual_init(residual_init, llm, build)
        check_methods(build, self.methods)
        self.metrics = NarrationMetrics()
        self.results: dict[str, float] = {}
        if feature_dim is not None and tokens is not None:
            self.configure_model()

    # --- building -----------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Build the model, once. Open arguments are taken from the trainer's data module.

        Raises:
            ValueError: something is still open, or a method does not fit the language model.
        """
        if self.llm is not None:
            return
        data = self.data
        if data is not None:
            self.hparams["feature_dim"] = self.hparams["feature_dim"] or data.feature_dim
            self.hparams["fps"] = self.hparams["fps"] or data.fps
            self.hparams["tokens"] = self.hparams["tokens"] or TokenIds.of(data.tokenizer).to_dict()
        if self.hparams["feature_dim"] is None or self.hparams["tokens"] is None:
            raise ValueError(
                "VideoLLM needs feature_dim and tokens: pass them, or run it by a Trainer with a data module that has "
                "feature_dim, fps and tokenizer"
            )
        self._ids = TokenIds.from_dict(self.hparams["tokens"])
        self.seed_weights()
        llm = build_llm(
            self.hparams["llm"],
            self._config,
            self._ids.vocab_size,
            self.hparams["llm_dtype"],
            self.hparams["attention"],
            self.hparams["residual_init"],
        )
        self.connector = Connector(self.hparams["feature_dim"], llm.config.get_text_config().hidden_size)
        if hasattr(data, "feature_statistics"):
            self.connector.standardise_by(*data.feature_statistics())
        adapt(llm, self._lora, self.methods)
        if self.hparams["gradient_checkpointing"]:
            llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.llm = llm.train()

    @property
    def ids(self) -> TokenIds:
        """The token ids of the stream template."""
        return self._ids

    # --- forward ------------------------------------------------------------------------------------------------

    def embed(self, input_ids: Tensor, layout: Tensor, features: Tensor) -> Tensor:
        """Token embeddings [B, T, D] with connected features at the vision positions (`layout >= 0`).

        Args:
            input_ids: LongTensor [B, T]; ids at vision positions are not looked at.
            layout: LongTensor [B, T].
            features: [F, N, C] with F * N vision positions.
        """
        vision = layout >= 0
        embeds = self.llm.get_input_embeddings()(input_ids.masked_fill(vision, 0))
        # the features of a cache may be stored in half precision
        dtype = next(self.connector.parameters()).dtype
        return place_features(embeds, vision, self.connector(features.to(dtype)))

    def forward(self, batch: dict[str, Any], rows: Tensor, cols: Tensor) -> Tensor:
        """Logits [P, V] after the tokens at `[rows, cols]` of a batch."""
        mask, layout = batch["attention_mask"], batch["layout"]
        # a padding token may lie outside the vocabulary of a pretrained model
        input_ids = batch["input_ids"].masked_fill(mask == 0, 0)
        with head_only_at(self.llm, rows, cols):
            out = self.llm(
                inputs_embeds=self.embed(input_ids, layout, batch["features"]),
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                use_cache=False,
                **self._routing(layout),
            )
        return out.logits

    def _routing(self, layout: Tensor) -> dict[str, Tensor]:
        return {"layout": layout} if mmskip.applied(self.llm) else {}

    def loss_sums(self, batch: dict[str, Any]) -> Tensor:
        """Sums [5] of one batch, see `mmskip.models.video_llm.loss.loss_sums`; the first is differentiable."""
        positions = Positions.of(batch["labels"], batch["layout"])
        logits = self(batch, positions.rows, positions.cols)
        return loss_sums(logits, positions, self.hparams["stream_weight"])

    # --- training -----------------------------------------------------------------------------------------------

    def step_losses(self, sums: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The number of labels, and the losses: of all, of the LM labels, of the stream labels."""
        loss, lm, stream, lm_count, stream_count = sums.unbind()
        labels = (lm_count + stream_count).clamp(min=1)
        losses = {
            "loss": loss / labels,
            "lm_loss": lm / lm_count.clamp(min=1),
            "stream_loss": stream / stream_count.clamp(min=1),
        }
        return labels, losses

    # --- evaluation ---------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Start the metrics anew."""
        self.metrics.reset()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Score the turns of the batch."""
        for uid, turns, scores in zip(batch["uid"], batch["turns"], score_turns(self, batch), strict=True):
            self.metrics.update((uid, tuple(turns)), scores)

    def on_validation_epoch_end(self) -> None:
        """Average and log the narration metrics."""
        self._log_metrics("val")

    def on_test_epoch_start(self) -> None:
        """Start the metrics anew."""
        self.metrics.reset()

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Score the turns of the batch."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Average and log the narration metrics."""
        self._log_metrics("test")

    def _log_metrics(self, stage: str) -> None:
        self.results = self.metrics.compute(self.hparams["fps"] or 1.0)
        shown = ("lm_ppl", "lm_correctness", "time_diff", "fluency")
        for name in shown:
            self.log(f"{stage}/{name}", self.results[name], prog_bar=name in ("lm_ppl", "fluency"))

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[tuple[str, list[Utterance]]]:
        """The uid and the model's own narrations of each sample."""
        return [(sample["uid"], self.narrate(sample)) for sample in split_rows(batch)]

    @torch.no_grad()
    def narrate(self, sample: dict[str, Any], threshold: float | None = None) -> list[Utterance]:
        """Stream one sample through the model, frame by frame with a KV cache, and let it speak when it wants to.

        Args:
            sample: `input_ids` and `layout` [T] (only what stands before the first frame is read) and `features`
                [F, N, C].
            threshold: replaces `silent_threshold`.
        """
        first = int((sample["layout"] >= 0).int().argmax())
        head = sample["input_ids"][: first - len(self.ids.open)].tolist()
        settings = StreamSettings(
            threshold=self.hparams["silent_threshold"] if threshold is None else threshold,
            max_new_tokens=self.hparams["max_new_tokens"],
            # a sample of the training length is narrated, whatever range the language model once had
            position_range=2**31,
        )
        was_training = self.training
        self.eval()
        engine = StreamEngine(self, sample["features"].shape[1], settings, [head])
        engine.push(sample["features"])
        said = engine.run()
        self.train(was_training)
        return [Utterance(item.frame, item.tokens) for item in said]
