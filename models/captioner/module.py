"""An encoder-decoder that captions images and judges statements about them, trained to exit early (MuE).

Shapes: I images, R rows (texts), N image tokens, T prompt tokens, S states of a row, L answer tokens, D width, P
labelled positions, V vocabulary, A answers.
"""

from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutput

from mmskip.config import MethodConfig
from mmskip.datasets.captioning.batch import Texts
from mmskip.datasets.common.labels import IGNORE
from mmskip.datasets.video.tower import VisionTower, check_tower_name
from mmskip.families.encoder_decoder import EncoderDecoderView
from mmskip.hf.exits.heads import exit_head
from mmskip.hf.exits.modalities import SplitEncoder
from mmskip.methods.early_exit import image_tokens
from mmskip.models.captioner.build import (
    build_meta,
    build_text,
    check_settings,
    decoder_of,
    normalised,
    parameter_groups,
    sees,
    text_config,
    token_ids,
    view_of,
)
from mmskip.models.captioner.exit_training import captured, draw_layers, exiting, layer_losses, layer_weights
from mmskip.models.captioner.validation import ValidationScores
from mmskip.models.common.base import StepLossModule
from mmskip.models.common.methods import check_methods
from mmskip.models.common.pretrained import adapt, scale_residual

TRAINED = ("caption", "entailment", "question")


class Captioner(StepLossModule):
    """An image tower and a text encoder-decoder of transformers, or a stock Florence-2, for captions and entailment.

    As in MuE (arXiv 2211.11152), image and prompt run the encoder apart, with the same weights, and meet in the
    decoder's cross-attention; every decoder layer learns to answer through the model's head, so that tokens may exit
    early. Exits are no setting of the model: apply an `EarlyExitConfig` to `llm` when evaluating. Batches are those of
    `mmskip.datasets.captioning.CaptionData`. The loss of an optimizer step is the summed loss of all its labels over
    their number (captions weighted), over micro-batches and ranks.

    Args:
        text: name or folder of an encoder-decoder, or a dict with `model_type` and settings for one from scratch (its
            vocabulary is the tokenizer's).
        methods: configs applied to the text model in order; none: dense. Exits are applied for evaluating instead, see
            above.
        tower: see `mmskip.datasets.video.tower.VisionTower`; None: that of `text`, which must be a Florence-2.
        tower_kwargs: further arguments of the tower's library.
        tower_pretrained: load the published weights of the tower.
        tower_size: side of its input, pixels; None: the tower's own.
        grid: G, the tower gives 1 + G * G tokens.
        train_tower: train the tower too.
        separate: image and prompt run the encoder apart; False: together, as one sequence.
        layer_loss: weights of the losses of the decoder's layers, see
            `mmskip.models.captioner.exit_training.layer_weights`.
        random_exits: share of the training rows whose image, and of those whose prompt, exits the encoder after a
            random layer, in [0, 1]; 0: as in the paper.
        random_token_exits: the same for answer tokens and the decoder, so that it learns to read the states of tokens
            that exited early; they do not count in the losses of later layers.
        caption_weight: factor on the loss of captions (all else has 1), > 0.
        settle_weight: weight of the saturation loss (1 - cosine of an answer token's states before and after a layer)
            where the layer before is already confident of the label; >= 0. The paper has none.
        label_smoothing: in [0, 1).
        residual_init: factor, >= 0, on the initial weights of a model from scratch that write into its residual
            stream; 0: every block starts as the identity.
        dtype: of the text model's weights: float32, bfloat16 or float16.
        attention: attention backend of transformers: sdpa or eager.
        lr: peak learning rate of AdamW, > 0.
        tower_lr: the same for the tower; None: `lr`.
        weight_decay: on matrices only, >= 0.
        betas: of AdamW.
        schedule: of the learning rate after warm-up: cosine, linear (both to 0) or constant.
        warmup: share of all steps with a linearly rising rate, in [0, 1).
        num_beams: when captioning, >= 1.
        max_new_tokens: longest caption, tokens.
        no_repeat_ngram: no caption says an n-gram of this length twice; 0: it may.
        val_captions: images captioned in each validation, at most, per rank; 0: none.
        tokens: the tokenizer facts a model needs (`mmskip.models.captioner.build.token_ids`); None: taken from
            the data module.

    Raises:
        ValueError: a setting out of range, settings that contradict one another, or a model that does not exist here.
            Nothing has been written then, and nothing downloaded but the configuration.
    """

    source = "text"
    same_model = ("text", "methods", "tower", "tower_kwargs", "tower_size", "grid", "separate", "tokens")
    open_until_built = ("tokens",)

    def __init__(
        self,
        text: str | dict[str, Any],
        tower: str | None = None,
        tower_kwargs: dict[str, Any] | None = None,
        tower_pretrained: bool = False,
        tower_size: int | None = None,
        grid: int = 3,
        train_tower: bool = True,
        separate: bool = True,
        layer_loss: str = "sum",
        random_exits: float = 0.0,
        random_token_exits: float = 0.0,
        caption_weight: float = 1.0,
        settle_weight: float = 0.0,
        label_smoothing: float = 0.0,
        residual_init: float = 1.0,
        dtype: str = "float32",
        attention: str = "sdpa",
        lr: float = 1e-3,
        tower_lr: float | None = None,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        schedule: str = "cosine",
        warmup: float = 0.05,
        num_beams: int = 1,
        max_new_tokens: int = 40,
        no_repeat_ngram: int = 0,
        val_captions: int = 200,
        tokens: dict[str, Any] | None = None,
        methods: list[MethodConfig] | None = None,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        given["tower_kwargs"] = tower_kwargs or {}
        check_settings(given)
        super().__init__(given)
        self._config = text_config(text)
        if (tower is None) != sees(self._config):
            raise ValueError(
                f"tower is {tower!r} and text a {self._config.model_type}; a Florence-2 brings its tower "
                "(tower: null), every other text model needs one"
            )
        if tower is not None:
            check_tower_name(tower)
        self.tower: VisionTower | None = None
        self.connector: nn.Module | None = None
        self._view: EncoderDecoderView | None = None
        self.results: dict[str, float] = {}
        self.said: dict[str, tuple[str, tuple[str, ...]]] = {}
        check_methods(lambda: build_meta(self._config, attention), self.methods)
        if tokens is not None:
            self.configure_model()

    def configure_model(self) -> None:
        """Build the model, once. The token ids come from the trainer's data module.

        Raises:
            ValueError: there is no data module to ask, the tower cannot be had, or the text model's layers are not
                found.
        """
        if self.llm is not None:
            return
        data = self.data
        if self.hparams["tokens"] is None and data is not None:
            self.hparams["tokens"] = token_ids(data.tokenizer, data.collate().answers)
        if self.hparams["tokens"] is None:
            raise ValueError("Captioner needs tokens: pass them, or run it by a Trainer with a data module")
        settings = self.hparams
        self.seed_weights()
        llm: Any = build_text(
            settings["text"], self._config, settings["tokens"], settings["dtype"], settings["attention"]
        )
        view_of(llm)  # a model whose layers are not found is refused before anything is trained
        scale_residual(llm, settings["residual_init"], ("out_proj.weight", "fc2.weight", "wo.weight"))
        if settings["tower"] is not None:
            self.tower = VisionTower(
                settings["tower"],
                settings["tower_pretrained"],
                settings["grid"],
                settings["tower_size"],
                settings["tower_kwargs"],
                self._seed,
                trained=settings["train_tower"],
            )
            self.connector = nn.Linear(self.tower.dim, llm.get_input_embeddings().embedding_dim)
            # the tower's tokens have unit variance; louder than words, they would drown their positions
            words = llm.get_input_embeddings()
            loudness = words.weight.std().item() * float(getattr(words, "embed_scale", 1.0))
            nn.init.normal_(self.connector.weight, std=loudness / self.tower.dim**0.5)
            nn.init.zeros_(self.connector.bias)
        adapt(llm, None, self.methods)
        self.llm = llm
        self.train()
        total = sum(p.numel() for p in self.parameters())
        trained = sum(p.numel() for p in self.parameters() if p.requires_grad)
        rank_zero_info(f"trained parameters: {trained:,} of {total:,}")

    @property
    def view(self) -> EncoderDecoderView:
        """The layers of the text model."""
        if self._view is None or self._view.root is not self.llm:
            self._view = view_of(self.llm)
        return self._view

    # --- encoder ------------------------------------------------------------------------------------------------

    def image_embeddings(self, images: Tensor) -> Tensor:
        """Embed images [I, 3, H, W] in 0..1 for the encoder: [I, N, D]."""
        if self.tower is None:
            pixels = normalised(images).to(self.llm.dtype)
            return self.llm.get_image_features(pixels, return_dict=True).pooler_output
        assert self.connector is not None
        return self.connector(self.tower(images)).to(self.llm.dtype)

    def see(self, images: Tensor) -> Tensor:
        """Prepare images [I, 3, H, W] in 0..1 for `encode`: their states after the encoder, where images and prompts
        run it apart (so that they run once for all their texts), else their embeddings; [I, N, D]."""
        embedded = self.image_embeddings(images)
        if not self.hparams["separate"]:
            return embedded
        every = torch.ones(embedded.shape[:2], dtype=torch.long, device=embedded.device)
        with self._exits_drawn(len(embedded)), self._image_exits(every):
            return self.llm.get_encoder()(inputs_embeds=embedded)[0]

    def encode(self, seen: Tensor, texts: Texts) -> tuple[Tensor, Tensor]:
        """The states [R, S, D] that the decoder attends to for each text, and their mask [R, S].

        Args:
            seen: of the batch's images, from `see`.
            texts: of the batch.
        """
        encoder, image = self.llm.get_encoder(), texts.image
        there = texts.prompt_mask.new_ones(len(image), seen.shape[1])
        mask = torch.cat([there, texts.prompt_mask], 1)
        if not self.hparams["separate"]:
            words = self.llm.get_input_embeddings()(texts.prompt)
            joined = torch.cat([seen[image].to(words.dtype), words], 1)
            images = torch.cat([there, torch.zeros_like(texts.prompt_mask)], 1)
            with self._exits_drawn(len(image)), self._image_exits(images):
                return encoder(inputs_embeds=joined, attention_mask=mask)[0], mask
        with self._exits_drawn(len(image)):
            read_RTD = encoder(input_ids=texts.prompt, attention_mask=texts.prompt_mask)[0]
        return torch.cat([seen[image], read_RTD], 1), mask

    def _image_exits(self, images: Tensor) -> Any:
        """Mark which tokens [B, T] of an encoding are the image's, for exits with thresholds for image and text."""
        apart = isinstance(self.view.encoder[0], SplitEncoder)
        return image_tokens(self.llm, images.bool()) if apart else nullcontext()

    def _exits_drawn(self, rows: int) -> Any:
        """In training, let a share of the rows exit the encoder after random layers."""
        blocks = self.view.encoder
        depth = draw_layers(self.hparams["random_exits"] if self.training else 0.0, (rows,), len(blocks), self.device)
        return nullcontext() if depth is None else exiting(blocks, depth)

    # --- decoder ------------------------------------------------------------------------------------------------

    def layer_logits(self, states: Tensor, mask: Tensor, labels: Tensor, wanted: list[int]) -> tuple[list[Tensor], Any]:
        """Logits [P, V] at the labelled positions, of the decoder layers whose number (from 1) is wanted, and the
        labels [P]."""
        found, head = self._layer_states(states, mask, labels), exit_head(self.view)
        return [head(found[number - 1]) for number in wanted], labels[labels != IGNORE]

    def _layer_states(self, states: Tensor, mask: Tensor, labels: Tensor, depth: Tensor | None = None) -> list[Tensor]:
        """States [P, D] at the labelled positions, after each decoder layer; tokens exit after layer `depth` [R, L],
        None: after the last one."""
        at, blocks = labels != IGNORE, self.view.decoder
        exits = nullcontext() if depth is None else exiting(blocks, depth)
        with exits, captured(blocks) as found:
            decoder_of(self.llm)(
                input_ids=self._shifted(labels),
                encoder_hidden_states=states,
                encoder_attention_mask=mask,
                use_cache=False,
            )
        return [of[at] for of in found]

    def _shifted(self, labels: Tensor) -> Tensor:
        """The token that the decoder reads before each label."""
        before = labels.new_full(labels.shape, self.start_id)
        before[:, 1:] = labels[:, :-1]
        return before.masked_fill(before == IGNORE, self._pad)

    @property
    def start_id(self) -> int:
        """The token the decoder starts with."""
        given = self.llm.generation_config.decoder_start_token_id
        config = self.llm.config.get_text_config() if sees(self.llm.config) else self.llm.config
        start = given if given is not None else config.decoder_start_token_id
        return self.hparams["tokens"]["start_token_id"] if start is None else start

    # --- training -----------------------------------------------------------------------------------------------

    def loss_sums(self, batch: dict[str, Any]) -> Tensor:
        """Sums [8]: loss (differentiable) and its labels, both weighted; cross-entropy of the last layer and labels of
        captions, of entailment, and of questions."""
        seen = self.see(batch["images"])
        zero = seen.new_zeros((), dtype=torch.float32)
        total, count, by_task = zero, zero, dict.fromkeys(TRAINED, (zero, zero))
        # pairs and questions, whose answers are short, run together
        for tasks, weight in ((TRAINED[:1], self.hparams["caption_weight"]), (TRAINED[1:], 1.0)):
            given = [task for task in tasks if batch[task] is not None]
            if not given:
                continue
            loss, last_P, row_P = self._losses(seen, Texts.joined([batch[task] for task in given], self._pad))
            total, count = total + weight * loss, count + weight * len(row_P)
            begin = 0
            for task in given:
                own = (row_P >= begin) & (row_P < begin + len(batch[task].uids))
                by_task[task], begin = (last_P[own].sum(), own.sum().to(zero)), begin + len(batch[task].uids)
        if not count:
            total = total + 0.0 * seen.sum()  # every rank of DDP needs gradients
        return torch.stack([total, count, *(value for task in TRAINED for value in by_task[task])])

    def _losses(self, seen: Tensor, texts: Texts) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted loss of all layers, and of each label the cross-entropy of the last layer and its row, [P]."""
        weights = layer_weights(self.hparams["layer_loss"], len(self.view.decoder))
        share, at = self.hparams["random_token_exits"] if self.training else 0.0, texts.labels != IGNORE
        exits = draw_layers(share, texts.labels.shape, len(weights), self.device)
        states = self._layer_states(*self.encode(seen, texts), texts.labels, exits)
        loss, last_P = layer_losses(
            states,
            exit_head(self.view),
            texts.labels[at],
            weights,
            None if exits is None else exits[at],
            self.hparams["settle_weight"],
            self.hparams["label_smoothing"],
        )
        return loss, last_P, at.nonzero()[:, 0]

    @property
    def _pad(self) -> int:
        return self.hparams["tokens"]["pad_token_id"]

    def step_losses(self, sums: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted number of labels, the loss per label, and the last layer's by task."""
        loss, count = sums[:2]
        count = count.clamp(min=1e-6)
        found = {"loss": loss / count}
        for task, (value, labels) in zip(TRAINED, sums[2:].view(-1, 2).unbind(), strict=True):
            if labels > 0:
                found[f"{task}_loss"] = value / labels
        return count, found

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The trained weights for AdamW: weight decay on matrices only, and the tower at its own rate."""
        return parameter_groups(self.named_parameters(), self.embedding_table, self.hparams)

    # --- answers ------------------------------------------------------------------------------------------------

    @property
    def answers(self) -> tuple[list[int], list[int]]:
        """The ids all three answers begin with, and the first id in which they differ, of each.

        Raises:
            ValueError: two of them continue alike, so that one step of the decoder cannot distinguish them.
        """
        rows = self.hparams["tokens"]["answers"]
        length = next(n for n, ids in enumerate(zip(*rows, strict=False)) if len(set(ids)) > 1)
        ids = [row[length] for row in rows]
        if len(set(ids)) < len(rows):
            raise ValueError(f"the answers' ids {rows} differ in more than one token")
        return rows[0][:length], ids

    def judge(self, states: Tensor, mask: Tensor) -> Tensor:
        """Logits [R, A] of the three answers, in the order of `LABELS`, by one call of the decoder."""
        before, ids = self.answers
        read = states.new_tensor([self.start_id, *before], dtype=torch.long).expand(len(states), -1)
        out = self.llm(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=mask,
            decoder_input_ids=read,
            use_cache=False,
        )
        return out.logits[:, -1, ids].float()

    def caption(self, states: Tensor, mask: Tensor, **settings: Any) -> Tensor:
        """Generated ids [R, L], the start token first. `settings` of generate() replace the model's own."""
        own = {
            "num_beams": self.hparams["num_beams"],
            "max_new_tokens": self.hparams["max_new_tokens"],
            "no_repeat_ngram_size": self.hparams["no_repeat_ngram"],
            "do_sample": False,
            "decoder_start_token_id": self.start_id,
        }
        outputs = BaseModelOutput(last_hidden_state=states)
        return self.llm.generate(encoder_outputs=outputs, attention_mask=mask, **{**own, **settings})

    # --- evaluation ---------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Start the sums anew."""
        self._scores = ValidationScores(self.device)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Add up losses and right answers; caption the first images."""
        seen = self.see(batch["images"])
        for task in ("caption", "entailment"):
            texts: Texts | None = batch[task]
            if texts is None:
                continue
            states, mask = self.encode(seen, texts)
            (logits,), labels = self.layer_logits(states, mask, texts.labels, [len(self.view.decoder)])
            self._scores.add_loss(task, F.cross_entropy(logits.float(), labels, reduction="sum"), len(labels))
            if task == "entailment":
                truth = torch.tensor(texts.label, device=self.device)
                self._scores.add_answers(self.judge(states, mask).argmax(-1) == truth)
        self._caption_some(batch, seen)

    def _caption_some(self, batch: dict[str, Any], seen: Tensor) -> None:
        texts: Texts | None = batch["caption"]
        room = self.hparams["val_captions"] - len(self._scores.captions)
        if texts is None or room <= 0:
            return
        tokenizer = self._tokenizer()
        references: dict[str, list[str]] = {}
        first: dict[str, int] = {}
        for row, uid in enumerate(texts.uids):
            ids = [token for token in texts.labels[row].tolist() if token != IGNORE]
            references.setdefault(uid, []).append(tokenizer.decode(ids, skip_special_tokens=True))
            first.setdefault(uid, row)
        chosen = list(first)[:room]
        if not chosen:
            return
        rows = texts.rows([first[uid] for uid in chosen])
        said = tokenizer.batch_decode(self.caption(*self.encode(seen, rows)), skip_special_tokens=True)
        self._scores.captions |= {uid: (text, tuple(references[uid])) for uid, text in zip(chosen, said, strict=True)}

    def _tokenizer(self) -> Any:
        return self.trainer.datamodule.tokenizer  # type: ignore[attr-defined]

    def on_validation_epoch_end(self) -> None:
        """Log losses, accuracy and CIDEr, over the samples of all ranks."""
        self._log_scores("val")

    def on_test_epoch_start(self) -> None:
        """Start the sums anew."""
        self.on_validation_epoch_start()

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Add up losses and right answers; caption the first images."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log losses, accuracy and CIDEr, over the samples of all ranks."""
        self._log_scores("test")

    def _log_scores(self, stage: str) -> None:
        found = self._scores.compute(lambda sums: self.trainer.strategy.reduce(sums, reduce_op="sum"))
        self.said, self.results = self._scores.captions, found
        for name, value in found.items():
            if name not in ("pairs", "captions"):
                self.log(f"{stage}/{name}", value, prog_bar=name in ("accuracy", "cider"), rank_zero_only=False)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Captions by image, and the answer of each pair as its place in `LABELS`."""
        seen, found = self.see(batch["images"]), dict[str, Any](captions={}, answers={})
        if batch["caption"] is not None:
            texts: Texts = batch["caption"].first_of_each()
            said = self._tokenizer().batch_decode(self.caption(*self.encode(seen, texts)), skip_special_tokens=True)
            found["captions"] = dict(zip(texts.uids, said, strict=True))
        if batch["entailment"] is not None:
            texts = batch["entailment"]
            chosen = self.judge(*self.encode(seen, texts)).argmax(-1).tolist()
            found["answers"] = dict(zip(texts.uids, chosen, strict=True))
        return found
