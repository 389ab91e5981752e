"""Token reduction: drop vision tokens (FastV, arXiv 2403.06764) or merge them (ToMe, arXiv 2210.09461) once.

All later blocks run on the remaining tokens. FastV ranks the tokens of an image by the attention that text pays to
them in an early block; ToMe merges similar tokens. Both are scores here, beside random, uniform and norm, so that one
benchmark compares them.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mmskip.config import MethodConfig, check_choice, check_count, check_ratio, renamed
from mmskip.methods.mixture_of_depths import ATTENTIONS
from mmskip.ops.similarity import match_similar
from mmskip.protocols import TokenView
from mmskip.registry import register
from mmskip.swap import Change
from mmskip.tokens.controls import norm_scores, random_scores, uniform_scores
from mmskip.tokens.groups import ATTENTION_SCORES, TokenGroups
from mmskip.tokens.queries import ranking_queries
from mmskip.tokens.selection import Selection, select

SCORES = ("attention", "norm", "random", "uniform", "similarity")
QUERIES = ("next", "last")
_SELECTION = "token reduction"
_OWNERS = "merged tokens"


@renamed({"after": "after_layer"})
@dataclass(frozen=True)
class TokenReductionConfig(MethodConfig):
    """Configure dropping or merging vision tokens once.

    A dropped token costs nothing in later blocks: no attention, no feed-forward, no cache entry. Its hidden state stays
    as block `after_layer - 1` returned it. Under `torch.compile` the blocks that choose by `"attention"`
    (`after_layer - 1` and `after_layer`) or `"similarity"` (`after_layer`) break the graph; all others compile without
    a break. Calls take `layout=` as with `MoDConfig`.

    Args:
        keep: ratio of each frame's vision tokens that later blocks process, in (0, 1]; of n tokens,
            max(1, round(keep * n)).
        after_layer: number of blocks that process every token, >= 0; at least 1 for `score="attention"`. FastV's K.
            With 0 the tokens are chosen before the first block, from the features of vision tower and connector.
        score: how the tokens of a frame are ranked: `"attention"` (that text pays to them in block `after_layer - 1`,
            mean over the heads), `"norm"` (largest hidden states), the controls `"random"` and `"uniform"` (evenly
            spaced), or `"similarity"`: nothing is dropped, the most similar tokens of a frame are merged into their
            mean, which takes the place and position of one of them (ToMe's matching; without its weighting of
            attention by size, which the model would have to learn; DeepStack features that a VLM adds later are those
            of that one).
        query: the text that ranks a frame by `"attention"`. `"next"`: the first text token after the frame, so that
            nothing later decides what earlier tokens see: chunked streams, cached and uncached generation and
            training agree. `"last"` (FastV): the last token of the row in the call; in `generate`, of the prompt. In a
            forward over prompt and answer that is a token of the answer, so losses measured there are not those of
            generation, and training is refused.
        always_keep: `"last"`: the last vision token of each frame, where a stream decides to speak, is always kept;
            `"none"`: it competes like the others.
        seed: of the random score, >= 0.
        attention: attention implementation of the reduced blocks, as in `MoDConfig`.

    Example: half of a frame's four tokens are dropped after the first block.
        >>> import mmskip, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
        >>> model = mmskip.apply_(model, mmskip.TokenReductionConfig(keep=0.5, after_layer=1))
        >>> layout = torch.tensor([[-1, 0, 0, 0, 0, -1]])
        >>> with mmskip.trace(model) as trace:
        ...     output = model(torch.randint(64, (1, 6)), layout=layout)
        >>> [6 if layer.kept is None else int(layer.kept.sum()) for layer in trace.forwards[0].layers]
        [6, 4, 4]
    """

    ASPECTS: ClassVar[tuple[str, ...]] = ("tokens",)

    keep: float = 0.5
    after_layer: int = 2
    score: str = "attention"
    query: str = "next"
    always_keep: str = "none"
    seed: int = 0
    attention: str | None = None

    def __post_init__(self) -> None:
        check_ratio("keep", self.keep)
        check_count("after_layer", self.after_layer)
        check_count("seed", self.seed)
        choices: tuple[tuple[str, tuple[Any, ...]], ...] = (
            ("score", SCORES),
            ("query", QUERIES),
            ("always_keep", ("none", "last")),
            ("attention", ATTENTIONS),
        )
        for name, allowed in choices:
            check_choice(name, getattr(self, name), allowed)
        if self.score == "attention" and self.after_layer == 0:
            raise ValueError(
                "after_layer is 0; expected at least 1 for score='attention', which is read from the block before."
            )


@dataclass(frozen=True)
class ReductionPolicy:
    """The policy of one reduced block, see `mmskip.protocols.TokenPolicy`: the first block chooses, later ones follow.

    Attributes:
        config: of the method.
        index: of the block.
    """

    config: TokenReductionConfig
    index: int

    def prepare(self, groups: TokenGroups) -> None:
        """Count the tokens to keep, and check that the call has the text that ranks them."""
        groups.budget(self.config.keep)
        if self.config.score == "attention" and groups.has_vision and self.index == self.config.after_layer:
            ranking_queries(groups, self.config.query)

    def enter(self, block: nn.Module, x_BTD: Tensor, groups: TokenGroups) -> Tensor:
        """At the first reduced block, replace the tokens that represent others by the mean of what they represent."""
        if self.config.score != "similarity" or self.index != self.config.after_layer or not groups.has_vision:
            return x_BTD
        if _OWNERS not in groups.shared:
            groups.shared[_OWNERS] = _owners(x_BTD.detach(), groups, self.config)
        return _merge(x_BTD, groups, groups.shared[_OWNERS])

    def select(self, block: nn.Module, x_BTD: Tensor, groups: TokenGroups) -> Selection:
        """Return the tokens that the first reduced block of this forward chose."""
        chosen: Selection | None = groups.shared.get(_SELECTION)
        if chosen is None:
            with torch.no_grad():
                scores = self._scores(block, x_BTD.detach(), groups)
                chosen = select(scores, groups, self.config.keep, self.config.always_keep == "last")
        elif chosen.index_BS.device != x_BTD.device:
            chosen = chosen.to(x_BTD.device)
        groups.shared[_SELECTION] = chosen
        return chosen

    def _scores(self, block: nn.Module, x_BTD: Tensor, groups: TokenGroups) -> Tensor:
        score = self.config.score
        if not groups.has_vision:
            return x_BTD.new_zeros(groups.shape)
        if score == "norm":
            return norm_scores(x_BTD)
        if score == "random":
            return random_scores(groups, self.config.seed, block.training)
        if score == "uniform":
            return uniform_scores(groups, self.config.keep)
        if score == "similarity":
            return _score_representatives(groups)
        if self.config.query == "last" and block.training:
            raise ValueError(
                "score='attention' with query='last' ranks by the last token of a row, in training one of the answer, "
                "so that a target would select the tokens that its prediction sees; train with query='next'."
            )
        scores: Tensor | None = groups.shared.get(ATTENTION_SCORES)
        if scores is None:
            raise RuntimeError(
                f"block {self.index - 1} did not report its attention: its self-attention does not ask its config "
                "which function to call. Use another score."
            )
        return scores.to(x_BTD.device)

    def gate(self, block: nn.Module, x_BSD: Tensor, selection: Selection, groups: TokenGroups) -> Tensor | None:
        """Return None: updates are not scaled."""
        return None


def _owners(x_BTD: Tensor, groups: TokenGroups, config: TokenReductionConfig) -> Tensor:
    """Return flat positions [G, N] of the token each token of a group is merged into; unused entries hold B * T."""
    flat_MD = torch.cat([x_BTD.flatten(0, 1), x_BTD.new_zeros(1, x_BTD.shape[-1])])
    counts = groups.budget(config.keep).host_G
    owner_GN = match_similar(flat_MD[groups.table_GN], groups.sizes, counts, config.always_keep == "last")
    return groups.table_GN.gather(1, owner_GN)


def _merge(x_BTD: Tensor, groups: TokenGroups, owners_GN: Tensor) -> Tensor:
    """Replace each representative by the mean of the tokens merged into it, summed in fp32."""
    flat_MD = x_BTD.flatten(0, 1)
    rows = torch.arange(len(flat_MD) + 1, device=x_BTD.device)
    into_M = rows.scatter(0, groups.table_GN.flatten(), owners_GN.flatten())[:-1]
    wide = flat_MD.to(torch.promote_types(x_BTD.dtype, torch.float32))
    sums_MD = torch.zeros_like(wide).index_add(0, into_M, wide)
    counts_M = torch.zeros(len(wide), device=wide.device).index_add(0, into_M, torch.ones_like(wide[:, 0]))
    means_MD = (sums_MD / counts_M.clamp(min=1)[:, None]).to(x_BTD.dtype)
    return torch.where(counts_M[:, None] > 0, means_MD, flat_MD).view(x_BTD.shape)


def _score_representatives(groups: TokenGroups) -> Tensor:
    """Return scores [B, T]: 1 for a token that represents a merged set, else 0."""
    batch, length = groups.shape
    scores = torch.zeros(batch * length + 1, device=groups.layout_BT.device)
    scores.scatter_(0, groups.shared[_OWNERS].flatten(), 1.0)
    return scores[:-1].view(batch, length)


@register(TokenReductionConfig, "decoder", "vlm")
def token_reduction_decoder(config: TokenReductionConfig, view: TokenView) -> list[Change]:
    """Reduce the tokens of a decoder.

    Raises:
        ValueError: the model has too few blocks.
    """
    from mmskip.hf.probes.attention import probe_changes
    from mmskip.hf.routing.changes import routing_changes

    count = len(view.blocks)
    if config.after_layer >= count:
        raise ValueError(
            f"after_layer is {config.after_layer}; expected 0 to {count - 1}: the model has {count} blocks."
        )
    reduced = range(config.after_layer, count)
    policies = {i: ReductionPolicy(config, i) for i in reduced}
    changes = routing_changes(view, policies, attention=config.attention)
    if config.score == "attention":
        changes += probe_changes(view, config.after_layer - 1, config.query)
    return changes
