"""Evaluate one checkpoint at other compute: another keep ratio, another router, no method, no video."""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mmskip
from mmskip import MoDConfig
from mmskip.saving import added_weights
from mmskip.tokens.router import LEARNED
from mmskip.utils.deprecated import renamed_names
from mmskip.utils.timing import paired_models, sharing_copy

if TYPE_CHECKING:
    from mmskip.models.video_llm.module import VideoLLM

ROUTERS = ("learned", "random", "uniform", "norm")


@dataclass(frozen=True)
class Variant:
    """One setting a checkpoint is evaluated in.

    Attributes:
        name: for folders and tables.
        methods: configs applied to the language model.
        blank: whether all features are zeros.
        series: points of one series are joined in the picture; None: a point alone.
    """

    name: str
    methods: tuple[Any, ...]
    blank: bool = False
    series: str | None = None


def plan_variants(
    methods: Sequence[Any], keep: Sequence[float] | None, routers: Sequence[str] | None, blank: bool
) -> list[Variant]:
    """The variants of a sweep: "trained" alone without `keep` and `routers`; else "dense" (the same weights without any
    method) and each router at each keep ratio. At keep 1.0 only the learned router is run: the others are dense then.
    With `blank` the checkpoint's own setting is among them, seeing and blanked.

    Args:
        methods: the checkpoint's own configs.
        keep: ratios in (0, 1]; None: the checkpoint's.
        routers: some of `ROUTERS`; None: the checkpoint's.
        blank: add the checkpoint's own setting with blanked features.

    Raises:
        ValueError: the checkpoint has no learned router, or no single keep ratio to start from.
    """
    trained = tuple(methods)
    variants = [Variant("trained", trained)]
    own = next((method for method in trained if isinstance(method, MoDConfig)), None)
    if keep or routers:
        if own is None and routers is None:
            raise ValueError(
                "the checkpoint was trained without MoDConfig, so it has no router whose budget --keep could change; "
                "give --router random uniform to drop tokens of it untrained"
            )
        learned = own is not None and own.router in LEARNED
        names = list(dict.fromkeys(routers or ())) or ["learned" if learned or own is None else own.router]
        if "learned" in names and not learned:
            present = "no MoDConfig" if own is None else f"router={own.router!r}"
            raise ValueError(f"the checkpoint has no learned router ({present}); give --router random uniform")
        base = own or MoDConfig()
        ratios: list[Any] = list(dict.fromkeys(keep)) if keep else [base.keep]
        if not all(isinstance(ratio, int | float) for ratio in ratios):
            raise ValueError(f"the checkpoint has keep={base.keep!r}, one ratio per layer; give --keep")
        variants = [Variant("dense", ())]
        for name in names:
            for ratio in ratios:
                if name == "learned" or ratio < 1:
                    config = dataclasses.replace(base, keep=ratio, router=base.router if name == "learned" else name)
                    changed = tuple(config if method is own else method for method in trained) if own else (config,)
                    variants.append(Variant(f"{name}-{ratio:g}", changed, series=name))
    if blank:
        if all(variant.methods != trained for variant in variants):
            variants.append(Variant("trained", trained))
        variants.append(Variant("blanked", trained, blank=True))
    return variants


class Budgets:
    """Puts variants onto a trained language model and takes them off again; the weights of the methods are kept.

    Args:
        llm: with the methods it was trained with.
    """

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.trained = tuple(mmskip.applied(llm))
        self._weights = {}
        if self.trained:
            self._weights = {name: weight.detach().clone() for name, weight in added_weights(llm).items()}

    def set(self, methods: Sequence[Any]) -> None:
        """Apply these methods instead of those that are there, with the trained weights."""
        if list(methods) == mmskip.applied(self.llm):
            return
        mmskip.remove_(self.llm)
        for method in methods:
            mmskip.apply_(self.llm, method)
        if methods:
            for name, weight in added_weights(self.llm).items():
                weight.data = self._weights[name].clone()

    @contextmanager
    def using(self, methods: Sequence[Any]) -> Iterator[None]:
        """Apply the methods inside the block, and the trained ones after it."""
        self.set(methods)
        try:
            yield
        finally:
            self.set(self.trained)


def variant_cost(
    model: "VideoLLM", budgets: Budgets, methods: Sequence[Any], batch: dict[str, Any], pairs: int
) -> dict[str, float | None]:
    """Cost of scoring a batch with some methods, as shares of the same weights without any.

    Args:
        model: in evaluation mode; call it under `torch.no_grad`.
        budgets: of its language model.
        methods: the variant's.
        batch: on the model's device.
        pairs: paired, interleaved runs with and without the methods, at least 2; 0: not measured.

    Returns:
        `counted` (FLOPs), `measured` (time; median ratio, with its quartiles `low` and `high`; None if not measured).
    """
    if not methods:
        return {"counted": 1.0, "measured": 1.0, "low": 1.0, "high": 1.0}
    with budgets.using(methods):
        with mmskip.trace(model.llm) as trace:
            model.loss_sums(batch)
        cost = mmskip.cost(model.llm, trace)
        shares: dict[str, float | None] = {"counted": cost.flops / cost.dense_flops}
        if not pairs:
            return shares | {"measured": None, "low": None, "high": None}
        dense = mmskip.remove_(sharing_copy(model.llm))
        ratio = paired_models(model, "llm", dense, model.llm, lambda: model.loss_sums(batch), pairs)
    return shares | {"measured": 1 / ratio.median, "low": 1 / ratio.q3, "high": 1 / ratio.q1}


__getattr__ = renamed_names(__name__, compute="variant_cost")
