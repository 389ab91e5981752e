"""Run image and text tokens apart through an encoder, with the same weights, each exiting on its own (MuE).

Every block runs once per modality, on its tokens alone, so that they never attend to each other in the encoder. Tokens
keep the embeddings, positions included, that they have in the full sequence.

Shape suffixes: B batch, T tokens, D width.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmskip.exits.rules import MODALITIES, ExitRule
from mmskip.exits.runs import Run
from mmskip.hf.calls import argument_names
from mmskip.hf.exits.block import encode
from mmskip.swap import Change, around, bind, state_of, states


@dataclass
class Modalities:
    """Which tokens of an encoder's input are image tokens.

    Attributes:
        pending: boolean [B, T], set by the model for its next encoding; None: not set.
        given: the same for all encodings, set by `image_mask`.
        places: of the forward under way, the indices [B, N] of each modality's tokens; None: all tokens are its.
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
        if count in (0, x_BTD.shape[1]):  # a call of one modality alone is not split
            self.places = {"image" if count else "text": None}
            return
        order_BT = torch.sort((~mask_BT).to(torch.uint8), dim=1, stable=True).indices
        self.places = {"image": order_BT[:, :count], "text": order_BT[:, count:]}


@dataclass(frozen=True)
class SplitState:
    """State of `SplitEncoder` on one block: rules and runs by modality."""

    index: int
    rules: dict[str, ExitRule]
    exit_runs: dict[str, Run]
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
        for name, run in state.exit_runs.items():
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
                found = run.count(super().forward(**part))  # type: ignore[misc]
            elif state.index and not run.num_active:
                found = part["hidden_states"]
            else:
                found = encode(super().forward, run, rule, state.index, part)  # type: ignore[misc]
            run.record(self, state.index, name, splits=True)  # type: ignore[arg-type]
            if state.index + 1 == run.depth:
                run.finish()
            y_BTD = found if places_BN is None else y_BTD.scatter(1, index_BND, found)
        return y_BTD


def _mask_of(mask: Tensor | None, places_BN: Tensor) -> Tensor | None:
    """Return the attention mask [B, 1, N, N] of some tokens.

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
    """Mixin of the module that places image features among the tokens: passes their places to the encoder."""

    def get_placeholder_mask(self, *args: Any, **kwargs: Any) -> Tensor:
        mask: Tensor = super().get_placeholder_mask(*args, **kwargs)  # type: ignore[misc]
        modalities: Modalities = state_of(self, ImagePlaces)
        modalities.pending = mask[..., 0] if mask.dim() == 3 else mask
        return mask


@contextmanager
def image_mask(model: nn.Module, mask_BT: Tensor) -> Iterator[None]:
    """Within the context, the image tokens of every encoding of `model` are where `mask_BT`, boolean [B, T], is True.

    Raises:
        ValueError: the modalities of `model` do not run apart.
    """
    modalities = next((state.modalities for state in states(model) if hasattr(state, "modalities")), None)
    if modalities is None:
        raise ValueError("image and text tokens do not run apart: apply an EarlyExitConfig(image=..., text=...) first.")
    before, modalities.given = modalities.given, mask_BT
    try:
        yield
    finally:
        modalities.given = before


def split_changes(
    view: Any, rules: dict[str, ExitRule], children: Mapping[int, Mapping[str, nn.Module]] | None = None
) -> list[Change]:
    """Return the changes by which image and text tokens run the encoder apart and exit it early.

    Args:
        view: of an encoder-decoder.
        rules: by modality, see `MODALITIES`.
        children: new modules of blocks, by index and name (`mmskip_...`).

    Raises:
        ValueError: a block of the encoder reads more than its tokens and their mask.
    """
    sites = [site for site in view.sites("block") if site.stack == "encoder"]
    more = set(argument_names(sites[0].module)) - {"self", "hidden_states", "attention_mask", "kwargs"}
    if more:
        raise ValueError(
            f"{type(sites[0].module).__name__} takes {', '.join(sorted(more))}, so that image and text tokens cannot "
            "run it apart; use encoder instead of image and text."
        )
    modalities, runs = Modalities(), {name: Run(len(sites)) for name in MODALITIES}
    changes = [
        around(
            site,
            SplitEncoder,
            SplitState(site.index, rules, runs, modalities),
            "exit",
            (children or {}).get(site.index),
        )
        for site in sites
    ]
    holders = [module for module in view.root.modules() if hasattr(module, "get_placeholder_mask")]
    return changes + [Change("image_places", module, ImagePlaces, modalities) for module in holders[-1:]]
