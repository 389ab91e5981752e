"""An encoder that runs image and text tokens apart, with the same weights, each leaving it on their own (MuE).

Every block runs once per modality, on its tokens alone, so that they never attend to each other in the encoder. Tokens
keep the embeddings, positions included, that the model gave them in the whole sequence.

Shape suffixes: B batch, T tokens, D width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmskip.hf.exits.block import ExitRule, Run, encode
from mmskip.swap import Change, bind, state_of

MODALITIES = ("image", "text")


@dataclass
class Modalities:
    """Which tokens of an encoder's input are image tokens.

    Attributes:
        pending: boolean [B, T], told by the model for its next encoding; None: nothing.
        given: the same for all encodings, told from outside.
        places: of the forward under way, the indices [B, N] of each modality's tokens; None: it has them all.
    """

    pending: Tensor | None = None
    given: Tensor | None = None
    places: dict[str, Tensor | None] = field(default_factory=dict)

    def start(self, x_BTD: Tensor) -> None:
        """Find the tokens of each modality.

        Raises:
            ValueError: the mask does not fit the tokens, or rows differ in their number of image tokens.
        """
        mask_BT = self.given if self.given is not None else self.pending
        self.pending = None
        if mask_BT is None:
            self.places = {"text": None}
            return
        if mask_BT.shape != x_BTD.shape[:2]:
            raise ValueError(
                f"the mask of image tokens is {tuple(mask_BT.shape)}, the encoder gets {tuple(x_BTD.shape[:2])} tokens."
            )
        counts = mask_BT.sum(1)
        count = int(counts[0])
        if bool((counts != count).any()):
            raise ValueError(
                f"rows have {counts.tolist()} image tokens; images that run the encoder apart need equally many in "
                "every row of a batch."
            )
        if count in (0, x_BTD.shape[1]):  # a call of one modality alone is not taken apart
            self.places = {"image" if count else "text": None}
            return
        order_BT = torch.sort((~mask_BT).to(torch.uint8), dim=1, stable=True).indices
        self.places = {"image": order_BT[:, :count], "text": order_BT[:, count:]}


@dataclass(frozen=True)
class SplitState:
    """State of `SplitEncoder` on one block: rules and runs by modality."""

    index: int
    rules: dict[str, ExitRule]
    told: dict[str, Run]
    modalities: Modalities


class SplitEncoder:
    """Mixin of an encoder block that runs once per modality, on the samples that still need it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state: SplitState = state_of(self, SplitEncoder)  # type: ignore[arg-type]
        values = bind(self, args, kwargs)  # type: ignore[arg-type]
        x_BTD = values["hidden_states"]
        if state.index == 0:
            state.modalities.start(x_BTD)
        y_BTD, places = x_BTD, state.modalities.places
        for name, run in state.told.items():
            if name not in places:
                run.exits = None
                continue
            places_BN, rule, part = places[name], state.rules[name], values
            if places_BN is not None:
                index_BND = places_BN[..., None].expand(-1, -1, x_BTD.shape[2])
                part = {**values, "hidden_states": x_BTD.gather(1, index_BND)}
                part["attention_mask"] = _mask_of(values.get("attention_mask"), places_BN)
            if self.training:  # type: ignore[attr-defined]
                run.exits = None
                found = super().forward(**part)  # type: ignore[misc]
            elif state.index and not run.left:
                found = part["hidden_states"]
            else:
                found = encode(super().forward, run, rule, state.index, part)  # type: ignore[misc]
            if state.index + 1 == run.depth:
                run.finish()
            y_BTD = found if places_BN is None else y_BTD.scatter(1, index_BND, found)
        return y_BTD


def _mask_of(mask: Tensor | None, places_BN: Tensor) -> Tensor | None:
    """The attention mask [B, 1, N, N] of some tokens.

    Raises:
        ValueError: a mask of another kind.
    """
    if mask is None:
        return None
    if mask.dim() != 4:
        raise ValueError(
            f"the encoder's attention mask is {tuple(mask.shape)}; modalities run apart under [B, 1, T, T] masks, "
            "which the attention implementations 'eager' and 'sdpa' use."
        )
    count = places_BN.shape[1]
    mask = mask.expand(len(places_BN), *mask.shape[1:])
    if mask.shape[2] > 1:
        mask = mask.gather(2, places_BN[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    return mask.gather(3, places_BN[:, None, None].expand(-1, mask.shape[1], mask.shape[2], count))


class ImagePlaces(nn.Module):
    """Mixin of a module that finds the places of image features among the tokens: notes them for the encoder."""

    def get_placeholder_mask(self, *args: Any, **kwargs: Any) -> Tensor:
        mask: Tensor = super().get_placeholder_mask(*args, **kwargs)  # type: ignore[misc]
        modalities: Modalities = state_of(self, ImagePlaces)
        modalities.pending = mask[..., 0] if mask.dim() == 3 else mask
        return mask


@contextmanager
def telling(modalities: Modalities, mask_BT: Tensor) -> Iterator[None]:
    """Encodings inside have their image tokens where `mask_BT` is True."""
    before, modalities.given = modalities.given, mask_BT
    try:
        yield
    finally:
        modalities.given = before


def split_changes(root: nn.Module, blocks: tuple[nn.Module, ...], rules: dict[str, ExitRule]) -> list[Change]:
    """The changes by which the modalities run an encoder apart."""
    modalities, runs = Modalities(), {name: Run(len(blocks)) for name in MODALITIES}
    changes = [
        Change(f"encoder.{index}", block, SplitEncoder, SplitState(index, rules, runs, modalities), aspect="exit")
        for index, block in enumerate(blocks)
    ]
    holders = [module for module in root.modules() if hasattr(module, "get_placeholder_mask")]
    return changes + [Change("image_places", module, ImagePlaces, modalities) for module in holders[-1:]]
