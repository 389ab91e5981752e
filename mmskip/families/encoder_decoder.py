"""Family `encoder_decoder`: encoder-decoders of transformers, found by structure."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mmskip.families.base import View
from mmskip.hf.calls import CACHE_NAME, argument_names
from mmskip.hf.meter import EncoderDecoderMeter
from mmskip.hf.structure import final_norm, mlp_among

_DECODER_ARGUMENTS = {"hidden_states", "attention_mask", "encoder_hidden_states", CACHE_NAME}


@dataclass(frozen=True)
class EncoderDecoderView(View):
    """An encoder-decoder.

    Attributes:
        root: the model.
        encoder, decoder: their layers in order.
        norm: after the decoder's last layer, or None.
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
        """The layers of both, by name."""
        return {"encoder": self.encoder, "decoder": self.decoder}

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """All layers: the encoder's, then the decoder's."""
        return self.encoder + self.decoder

    def site(self, index: int) -> str:
        """Return the site name of a layer."""
        depth = len(self.encoder)
        return f"encoder.{index}" if index < depth else f"decoder.{index - depth}"

    def meter(self) -> EncoderDecoderMeter:
        """Return what counts the layers and the caches."""
        return EncoderDecoderMeter(self)

    def hidden_argument(self, block: nn.Module) -> str:
        """Return the argument of a block's `forward` that carries the hidden states."""
        return "hidden_states"

    def parts(self, block: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
        """Return the self-attention and the MLP of a block, None for a part that is not a separate module."""
        named = [(name.rpartition(".")[2].lower(), module) for name, module in block.named_modules()]
        attention = next((module for name, module in named if _is_self_attention(name)), None)
        # layers of T5 hold their parts in a list, each with its norm and its residual
        lists = [child for child in block.children() if isinstance(child, nn.ModuleList)]
        holder = list(lists[0].children())[-1] if lists else block
        return attention, mlp_among(child for name, child in holder.named_children() if "att" not in name.lower())


def _is_self_attention(name: str) -> bool:
    return "att" in name and not any(word in name for word in ("norm", "enc", "cross"))


def match(model: nn.Module) -> tuple[EncoderDecoderView | None, str]:
    """Return the view of `model`, or None and the reason why it does not fit."""
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
    """Return the decoder; some models return the encoder-decoder inside of them first."""
    part = root.get_decoder()
    while part is not None and len(_stacks(part)) > 1 and part.get_decoder() is not part:
        part = part.get_decoder()
    return part


def _stacks(part: nn.Module) -> list[tuple[nn.Module, tuple[nn.Module, ...]]]:
    """Return the lists of layers that take `hidden_states`, with the modules that hold them."""
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
