"""Family `encoder_decoder`: encoder-decoders of transformers, found by structure, whose layers can be left early.

Shape suffixes: B batch, T tokens, D width, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from mmskip.exits.heads import TiedHead
from mmskip.families.base import View
from mmskip.hf.calls import CACHE_NAME, argument_names
from mmskip.hf.exits.block import BlockState, DecoderExit, EncoderExit, ExitRule, Run
from mmskip.hf.exits.decoder import check_output, final_norm
from mmskip.hf.exits.modalities import split_changes
from mmskip.hf.meter import EncoderDecoderMeter
from mmskip.swap import Change

_DECODER_ARGUMENTS = {"hidden_states", "attention_mask", "encoder_hidden_states", CACHE_NAME}


class ModelHead(TiedHead):
    """The model's own output, with the scale and the bias that some put behind the final norm and the projection."""

    def __init__(self, norm: nn.Module | None, generator: Any) -> None:
        scaled = getattr(generator.config, "scale_decoder_outputs", False)
        super().__init__(norm, nn.Identity(), generator.config.d_model**-0.5 if scaled else 1.0)
        self.generator = generator

    def __call__(self, x_BTD: Tensor) -> Tensor:
        """Logits [B, T, V]."""
        logits_BTV = self.generator.get_output_embeddings()(super().__call__(x_BTD))
        bias = getattr(self.generator, "final_logits_bias", None)
        return logits_BTV if bias is None else logits_BTV + bias


@dataclass(frozen=True)
class EncoderDecoderView(View):
    """An encoder-decoder.

    Attributes:
        root: the model.
        encoder, decoder: their layers in order.
        norm: behind the decoder's last layer, or None.
        generator: the module with the output projection, or None.
    """

    root: nn.Module
    encoder: tuple[nn.Module, ...]
    decoder: tuple[nn.Module, ...]
    norm: nn.Module | None
    generator: Any
    family: str = field(default="encoder_decoder")

    @property
    def stacks(self) -> dict[str, tuple[nn.Module, ...]]:  # type: ignore[override]
        """The layers of both."""
        return {"encoder": self.encoder, "decoder": self.decoder}

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """All layers: the encoder's, then the decoder's."""
        return self.encoder + self.decoder

    def meter(self) -> EncoderDecoderMeter:
        """Return what counts the layers and the caches."""
        return EncoderDecoderMeter(self)

    def site(self, index: int) -> str:
        """The site name of a layer."""
        depth = len(self.encoder)
        return f"encoder.{index}" if index < depth else f"decoder.{index - depth}"

    def head(self) -> ModelHead:
        """The tied exit head of the decoder.

        Raises:
            ValueError: the model's output is more than a norm and a projection, or missing.
        """
        self.check_generates()
        block = self.decoder[0]
        holders = [
            m for m in self.root.modules() if hasattr(m, "config") and any(part is block for part in m.modules())
        ]
        check_output(type(self.root).__name__, self.generator, block, [m.config for m in holders])
        return ModelHead(self.norm, self.generator)

    def check_generates(self) -> None:
        """Raise ValueError if the model has no output projection."""
        if self.generator is None:
            raise ValueError(
                f"{type(self.root).__name__} has no output projection for exit heads; apply to the model that has it "
                "(...ForConditionalGeneration), or use criterion 'saturation' or 'state_norm'."
            )

    def exit_changes(self, module: str, rule: ExitRule) -> list[Change]:
        """The changes by which "encoder" or "decoder" is left early."""
        blocks: Sequence[nn.Module] = getattr(self, module)
        run, mixin = Run(len(blocks)), EncoderExit if module == "encoder" else DecoderExit
        return [
            Change(f"{module}.{index}", block, mixin, BlockState(index, rule, run), aspect="exit")
            for index, block in enumerate(blocks)
        ]

    def split_changes(self, rules: dict[str, ExitRule]) -> list[Change]:
        """The changes by which image and text tokens run the encoder apart, each leaving it by a rule.

        Raises:
            ValueError: a block of the encoder reads more than its tokens and their mask.
        """
        more = set(argument_names(self.encoder[0])) - {"self", "hidden_states", "attention_mask", "kwargs"}
        if more:
            raise ValueError(
                f"{type(self.encoder[0]).__name__} takes {', '.join(sorted(more))}, so that image and text tokens "
                "cannot run it apart; use encoder instead of image and text."
            )
        return split_changes(self.root, self.encoder, rules)


def match(model: nn.Module) -> tuple[EncoderDecoderView | None, str]:
    """The view of `model`, or None and the reason why it does not fit."""
    from transformers import PreTrainedModel

    root: Any = next(
        (
            m
            for m in model.modules()
            if isinstance(m, PreTrainedModel) and getattr(m.config, "is_encoder_decoder", False)
        ),
        None,
    )
    if root is None:
        return None, f"{type(model).__name__} holds no encoder-decoder of transformers"
    stacks = []
    for part in (root.get_encoder(), _decoder(root)):
        found = [] if part is None or part is root else _stacks(part)
        if len(found) != 1:
            name = type(part).__name__
            return None, f"{name} of {type(root).__name__} has {len(found)} stacks of layers; expected one"
        stacks.append(found[0])
    (_, encoder), (parent, decoder) = stacks
    missing = _DECODER_ARGUMENTS - set(argument_names(decoder[0]))
    if missing:
        return None, f"{type(decoder[0]).__name__}.forward takes no {', '.join(sorted(missing))}"
    if getattr(decoder[0], "is_decoder", True) is False:
        return None, f"{type(decoder[0]).__name__} is used as an encoder layer"
    generator = next(
        (m for m in root.modules() if isinstance(m, PreTrainedModel) and m.get_output_embeddings() is not None), None
    )
    return EncoderDecoderView(root, encoder, decoder, final_norm(parent), generator), ""


def _decoder(root: Any) -> Any:
    """The decoder; some models name the encoder-decoder inside of them first."""
    part = root.get_decoder()
    while part is not None and len(_stacks(part)) > 1 and part.get_decoder() is not part:
        part = part.get_decoder()
    return part


def _stacks(part: nn.Module) -> list[tuple[nn.Module, tuple[nn.Module, ...]]]:
    """Lists of layers that take `hidden_states`, with the module that holds them."""
    return [
        (module, tuple(child.children()))
        for module in part.modules()
        for child in module.children()
        if isinstance(child, nn.ModuleList)
        and len(child)
        and len({type(layer) for layer in child}) == 1
        and {"hidden_states", "attention_mask"} <= set(argument_names(child[0]))
        and not any(isinstance(inner, nn.ModuleList) and child in list(inner.children()) for inner in part.modules())
    ]
