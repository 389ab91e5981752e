"""Exit heads of language models: the model's own output, applied to the states of an earlier layer.

Shape suffixes: B batch, T tokens, D width, V vocabulary.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from mmskip.exits.heads import TiedHead
from mmskip.hf.structure import final_norm

_SCALED = ("logit_scale", "logits_scaling", "final_logit_softcapping", "lm_head_multiplier")
_ADVICE = "use criterion 'saturation' or 'state_norm'."


class ModelHead(TiedHead):
    """The output of an encoder-decoder, with the scale and the bias that some models apply around the projection."""

    def __init__(self, norm: nn.Module | None, generator: Any) -> None:
        scaled = getattr(generator.config, "scale_decoder_outputs", False)
        super().__init__(norm, nn.Identity(), generator.config.d_model**-0.5 if scaled else 1.0)
        self.generator = generator

    def __call__(self, x_BTD: Tensor) -> Tensor:
        """Return the logits [B, T, V]."""
        logits_BTV = self.generator.get_output_embeddings()(super().__call__(x_BTD))
        bias = getattr(self.generator, "final_logits_bias", None)
        return logits_BTV if bias is None else logits_BTV + bias


def exit_head(view: Any) -> TiedHead:
    """Return the model's own output as the head of every exit.

    Args:
        view: of a decoder, a vision-language model or an encoder-decoder.

    Raises:
        ValueError: the output is more than a norm and a projection, or missing.
    """
    return _of_encoder_decoder(view) if "encoder" in view.stacks else _of_decoder(view)


def check_generates(view: Any) -> None:
    """Raise ValueError unless an encoder-decoder has an output projection."""
    if view.generator is None:
        raise ValueError(
            f"{type(view.root).__name__} has no output projection for exit heads; apply to the model that has it "
            "(...ForConditionalGeneration), or use criterion 'saturation' or 'state_norm'."
        )


def _of_encoder_decoder(view: Any) -> ModelHead:
    check_generates(view)
    block = view.decoder[0]
    holders = [m for m in view.root.modules() if hasattr(m, "config") and any(part is block for part in m.modules())]
    _check_output(type(view.root).__name__, view.generator, block, [m.config for m in holders])
    return ModelHead(view.norm, view.generator)


def _of_decoder(view: Any) -> TiedHead:
    name = type(view.root).__name__
    generators = [module for module in view.generators if module.get_output_embeddings() is not None]
    norm = final_norm(view.root)
    if not generators or norm is None:
        raise ValueError(f"{name} has no {'norm' if generators else 'output projection'} for exit heads; {_ADVICE}")
    if getattr(view.root, "project_out", None) is not None:
        raise ValueError(f"{name} changes its logits by a projection, which exit heads do not apply; {_ADVICE}")
    _check_output(name, generators[0], view.blocks[0], [view.config])
    return TiedHead(norm, generators[0].get_output_embeddings())


def _check_output(name: str, generator: nn.Module, block: nn.Module, configs: Iterable[Any]) -> None:
    """Raise ValueError if a model computes its logits by more than a norm and a projection.

    Args:
        name: of the model.
        generator: holds the output projection.
        block: a layer of the decoder.
        configs: of the model and its parts.
    """
    found = {key for key in _SCALED for config in configs if getattr(config, key, None) not in (None, 1, 1.0)}
    projection = generator.get_output_embeddings()  # type: ignore[operator]
    for holder in generator.modules():
        children = list(holder.children())
        # the projection is part of a larger head, beside the decoder
        if any(child is projection for child in children) and not any(part is block for part in holder.modules()):
            found |= {type(c).__name__ for c in children if c is not projection and any(True for _ in c.parameters())}
    if found:
        raise ValueError(
            f"{name} changes its logits by {', '.join(sorted(found))}, which exit heads do not apply; {_ADVICE}"
        )
