"""Mixture-of-depths routing of vision tokens (VideoLLM-MoD, arXiv 2408.16730).

A routed block runs attention and feed-forward on all text and on k = max(1, round(keep * n)) of the n vision tokens of
each frame: x' = x + mu * f(x_kept). The other tokens skip the block unchanged and store no key or value.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmskip.config import MethodConfig, check_choice, check_count, check_indices, check_number, check_ratio, renamed
from mmskip.protocols import STATE, TokenView
from mmskip.registry import register
from mmskip.swap import Change, states
from mmskip.tokens.controls import norm_scores, random_scores, uniform_scores
from mmskip.tokens.groups import TEXT, TokenGroups
from mmskip.tokens.router import GATES, LEARNED, ROUTERS, TokenRouter
from mmskip.tokens.selection import Selection, select

ATTENTIONS = (None, "mmskip_ragged")
PATTERNS = ("alternate", "alternate_deep", "all", "deep")


@renamed(values={"gate": {"own": "separate"}})
@dataclass(frozen=True)
class MoDConfig(MethodConfig):
    """Configure mixture-of-depths routing of vision tokens.

    Calls of the model then take `layout=`, an integer tensor [B, T] with the frame id of each vision token and -1 for
    text; VLMs work it out from their inputs.

    Args:
        keep: ratio of each frame's vision tokens that a routed block processes, in (0, 1]; a sequence with one
            value per routed block (or per block of the model); or `"cosine"`, p-MoD's schedule
            0.5 * cos(pi * l / (L - 1)) + 0.5 of block l of L, at least `keep_floor`.
        layers: the routed blocks: `"alternate"` (1, 3, 5, ...: best in the paper), `"alternate_deep"` (those of the
            deeper half), `"all"`, `"deep"` (the deeper half), or block indices. The first block of each attention type
            stays dense, because transformers reads lengths and masks there: patterns leave it out, indices that
            include it are refused unless they include every block of its type. Blocks without attention (of hybrid
            models) are never routed.
        router: `"linear"` (learned, as in the paper), `"mlp"` (learned, with `router_hidden` units), or without
            parameters: `"norm"` (largest hidden states) and the controls `"random"` and `"uniform"` (evenly spaced).
        gate: multiplier of the update of a kept vision token with score mu: `"tanh"` (1 + 0.2 tanh mu,
            zero-initialised: safe on pretrained weights), `"linear"` (mu, as in the paper), `"sigmoid"`, `"none"` (1:
            the router gets no gradient); these serve learned routers only. `"separate"`: 1 + 0.2 tanh(v . x) with
            zero-initialised weights v that the loss trains, beside any router; the ranking weights of a learned router
            then get no gradient and are to be fitted (`mmskip.calibration.fit_routers`).
        always_keep: `"last"`: the last vision token of each frame, where a stream decides to speak, is one of the
            k; `"none"`: it competes like the others.
        noise: scale of the Gumbel noise added to the scores of a learned router in training, >= 0. At 1 the kept tokens
            are a sample without replacement in proportion to exp(mu), so that every token is tried and can be learned
            from; 0 (as in the paper): always the best k. Evaluation never adds noise.
        keep_floor: least keep ratio of the cosine schedule, in (0, 1].
        seed: of the random router, >= 0.
        router_hidden: units of the `"mlp"` router, >= 1.
        attention: attention implementation of the routed blocks: None, the model's, or `"mmskip_ragged"`, which packs
            samples without padding and runs xFormers where it loads (`python -m mmskip.env`). The other blocks keep
            the model's.

    Example: two frames of four tokens in a text of two; a routed block processes two tokens of each frame.
        >>> import mmskip, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
        >>> model = mmskip.apply_(model, mmskip.MoDConfig(keep=0.5, layers="alternate"))
        >>> layout = torch.tensor([[-1, 0, 0, 0, 0, 1, 1, 1, 1, -1]])
        >>> with mmskip.trace(model) as trace:
        ...     output = model(torch.randint(64, (1, 10)), layout=layout)
        >>> [10 if layer.kept is None else int(layer.kept.sum()) for layer in trace.forwards[0].layers]
        [10, 6, 10, 6]
    """

    ASPECTS: ClassVar[tuple[str, ...]] = ("tokens",)

    keep: float | Sequence[float] | str = 0.2
    layers: str | Sequence[int] = "alternate"
    router: str = "linear"
    gate: str = "tanh"
    always_keep: str = "none"
    noise: float = 0.0
    keep_floor: float = 0.1
    seed: int = 0
    attention: str | None = None
    router_hidden: int = 32

    def __post_init__(self) -> None:
        for name in ("keep", "layers"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        _check_keep(self.keep)
        check_ratio("keep_floor", self.keep_floor)
        check_number("noise", self.noise, 0)
        _check_layers(self.layers)
        for name, choices in (("router", ROUTERS), ("gate", GATES), ("always_keep", ("none", "last"))):
            check_choice(name, getattr(self, name), choices)
        check_count("seed", self.seed)
        check_count("router_hidden", self.router_hidden, 1)
        check_choice("attention", self.attention, ATTENTIONS)


def _check_keep(keep: Any) -> None:
    if isinstance(keep, str):
        if keep != "cosine":
            raise ValueError(f"keep is {keep!r}; expected a number in (0, 1], a list of them, or 'cosine'.")
    elif isinstance(keep, tuple):
        if not keep:
            raise ValueError("keep is empty; expected one number in (0, 1] per routed layer.")
        for i, value in enumerate(keep):
            check_ratio(f"keep[{i}]", value)
    else:
        check_ratio("keep", keep)


def _check_layers(layers: Any) -> None:
    if (isinstance(layers, str) and layers not in PATTERNS) or not isinstance(layers, str | tuple):
        raise ValueError(f"layers is {layers!r}; expected one of {', '.join(PATTERNS)}, or a list of block indices.")
    if isinstance(layers, tuple):
        check_indices("layers", layers, empty=False)


def choose_layers(layers: str | Sequence[int], types: Sequence[str]) -> tuple[int, ...]:
    """Return the indices of the blocks to route.

    Args:
        layers: see `MoDConfig`.
        types: attention type of each block of the model, or `mmskip.protocols.STATE`.

    Raises:
        ValueError: an index out of range, or the first block of an attention type while others of that type stay dense.
    """
    count = len(types)
    if not isinstance(layers, str):
        chosen = sorted(layers)
        if chosen[-1] >= count:
            raise ValueError(f"layers holds {chosen[-1]}; the model has {count} blocks, 0 to {count - 1}.")
    else:
        first = count // 2 if layers in ("deep", "alternate_deep") else 0
        step = 2 if layers.startswith("alternate") else 1
        offset = first + (first + 1) % 2 if step == 2 else first
        chosen = list(range(offset, count, step))
        chosen = [index for index in chosen if types[index] != STATE]
    firsts = {kind: types.index(kind) for kind in dict.fromkeys(types) if kind != STATE}
    for kind, index in firsts.items():
        complete = all(i in chosen for i, other in enumerate(types) if other == kind)
        if index not in chosen or (complete and not isinstance(layers, str)):
            continue
        if not isinstance(layers, str):
            raise ValueError(
                f"layers claims block {index}, the first with {kind} attention, where transformers reads lengths and "
                "masks; leave it dense, or claim every block of that type."
            )
        chosen.remove(index)
    if not chosen:
        raise ValueError(
            f"layers={layers!r} leaves no block to route in a model of {count} blocks (the first block of each "
            "attention type stays dense)."
        )
    return tuple(chosen)


def choose_ratios(config: MoDConfig, routed: Sequence[int], count: int) -> tuple[float, ...]:
    """Return the keep ratio of each routed block.

    Args:
        routed: indices of the routed blocks.
        count: blocks of the model.

    Raises:
        ValueError: `config.keep` lists ratios for another number of blocks.
    """
    keep = config.keep
    if isinstance(keep, str):
        ratios = [0.5 * math.cos(math.pi * i / max(count - 1, 1)) + 0.5 for i in routed]
        return tuple(max(ratio, config.keep_floor) for ratio in ratios)
    if isinstance(keep, (int, float)):
        return (float(keep),) * len(routed)
    if len(keep) == len(routed):
        return tuple(float(ratio) for ratio in keep)
    if len(keep) == count:
        return tuple(float(keep[i]) for i in routed)
    raise ValueError(
        f"keep has {len(keep)} values; expected {len(routed)}, one per routed block {list(routed)}, or {count}, one "
        "per block of the model."
    )


@dataclass
class MoDPolicy:
    """The policy of one routed block, see `mmskip.protocols.TokenPolicy`.

    Attributes:
        config: of the method.
        target: keep ratio of the block, in (0, 1].
        index: of the block.
        progress: how far `anneal` has moved the keep ratio from 1 to `target`, in [0, 1].
    """

    config: MoDConfig
    target: float
    index: int
    progress: float = 1.0

    @property
    def keep(self) -> float:
        """The keep ratio at the present `progress`."""
        return self.target if self.progress == 1 else 1 - self.progress * (1 - self.target)

    def prepare(self, groups: TokenGroups) -> None:
        """Count the tokens to keep."""
        groups.budget(self.keep)

    def enter(self, block: nn.Module, x_BTD: Tensor, groups: TokenGroups) -> Tensor:
        """Return the hidden states as they are."""
        return x_BTD

    def select(self, block: nn.Module, x_BTD: Tensor, groups: TokenGroups) -> Selection:
        """Select the k best vision tokens of each frame, and all text."""
        with torch.no_grad():
            scores = self._scores(block, x_BTD.detach(), groups)
            return select(scores, groups, self.keep, self.config.always_keep == "last")

    def _scores(self, block: nn.Module, x_BTD: Tensor, groups: TokenGroups) -> Tensor:
        kind = self.config.router
        if kind in LEARNED:
            mu_BT = block.mmskip_router(x_BTD)  # type: ignore[operator]
            if self.config.noise and block.training:
                mu_BT = mu_BT - self.config.noise * torch.empty_like(mu_BT).exponential_().log()
            return mu_BT
        if kind == "norm":
            return norm_scores(x_BTD)
        if kind == "random":
            return random_scores(groups, self.config.seed + 1000 * self.index, block.training)
        return uniform_scores(groups, self.keep)

    def gate(self, block: nn.Module, x_BSD: Tensor, selection: Selection, groups: TokenGroups) -> Tensor | None:
        """Return the multiplier [B, S] of the update: of vision tokens from their score, of text 1."""
        gate = self.config.gate
        if gate == "none" or (gate != "separate" and self.config.router not in LEARNED):
            return None
        if block.training and torch.is_grad_enabled():
            _check_learning(block, self.index)
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in block.mmskip_router.parameters())  # type: ignore[union-attr]
        if not groups.has_vision and not learns:
            return None
        gate_BS = block.mmskip_router.gate(x_BSD)  # type: ignore[operator, union-attr]
        vision_BS = groups.layout_BT.gather(1, selection.index_BS) != TEXT
        return torch.where(vision_BS, gate_BS, 1.0).to(x_BSD.dtype)


def anneal(model: nn.Module, progress: float) -> None:
    """Set the keep ratio of all routed blocks of `model` between 1 and the config's, in this process: training may
    start from the base model and end at the target (Router-Tuning, p-MoD). Configs and saved files do not change.

    Args:
        progress: 0: every token is kept; 1: the config's ratio; linear in between.

    Raises:
        ValueError: out of range.
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress is {progress!r}; expected a number from 0 (keep all) to 1 (the config's keep).")
    for policy in find_policies(model):
        policy.progress = float(progress)


def read_keep(model: nn.Module) -> float:
    """Return the present keep ratio, see `anneal`: the mean over the routed blocks of `model`; 1 without any."""
    ratios = [policy.keep for policy in find_policies(model)]
    return sum(ratios) / len(ratios) if ratios else 1.0


def find_policies(model: nn.Module) -> list[MoDPolicy]:
    """Return the policies of the routed blocks of `model`, in order."""
    found = (getattr(state, "policy", None) for state in states(model))
    return [policy for policy in found if isinstance(policy, MoDPolicy)]


_RENAMED = {"keep_in_use": read_keep, "policies": find_policies}


def __getattr__(name: str) -> Any:
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{name} is now {_RENAMED[name].__name__}; the old name goes in the next release.", FutureWarning, 2)
    return _RENAMED[name]


def _check_learning(block: nn.Module, index: int) -> None:
    """Raise RuntimeError if the router is frozen while its block trains, most likely by accident: peft freezes all
    weights that it did not make, and the router would silently never learn."""
    if any(p.requires_grad for p in block.mmskip_router.parameters()):  # type: ignore[union-attr]
        return
    if any(p.requires_grad for p in block.parameters()):
        raise RuntimeError(
            f"the router of block {index} is frozen while the block trains (peft's get_peft_model freezes every weight "
            "it did not make). Call mmskip.apply_ after get_peft_model, or pass modules_to_save=['mmskip_router'] to "
            "LoraConfig, or set requires_grad on the mmskip_router weights before building the optimizer; to train "
            "without it on purpose, use gate='none'."
        )


@register(MoDConfig, "decoder", "vlm")
def mod_decoder(config: MoDConfig, view: TokenView) -> list[Change]:
    """Route the blocks of a decoder."""
    from mmskip.hf.routing.changes import routing_changes

    routed = choose_layers(config.layers, view.attention_types())
    ratios = choose_ratios(config, routed, len(view.blocks))
    policies = {i: MoDPolicy(config, ratio, i) for i, ratio in zip(routed, ratios, strict=True)}
    children: dict[int, dict[str, nn.Module]] = {i: {} for i in routed}
    if config.router in LEARNED or config.gate == "separate":
        for i in routed:
            children[i]["mmskip_router"] = _router(config, view, i)
    return routing_changes(view, policies, children, config.attention)


def _router(config: MoDConfig, view: TokenView, index: int) -> TokenRouter:
    block = view.blocks[index]
    # not the dtype of the block's weights: quantized blocks keep scales and norms in other dtypes than hidden states
    device = next(block.parameters()).device
    hidden = config.router_hidden if config.router == "mlp" else 0
    router = TokenRouter(view.width, config.gate, device, view.dtype, config.router in LEARNED, hidden)
    router.train(block.training)
    # without a gate no gradient reaches the scores, and DDP waits for every weight that requires one
    for weight in router.ranking_weights().values():
        weight.requires_grad_(config.gate not in ("none", "separate"))
    return router
