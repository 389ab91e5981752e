"""Check that a decoder can run a plan exactly, and assign a cache entry to each visit."""

from collections.abc import Sequence
from typing import Any

from mmskip.plan import DepthPlan
from mmskip.protocols import STATE


def entries_of(plan: DepthPlan, kinds: Sequence[str]) -> list[int | None]:
    """Assign a cache entry to each visit; None: it stores nothing.

    Raises:
        ValueError: no entry would be left where transformers reads lengths.
    """
    count = len(kinds)
    if plan.fill:
        seen: set[int] = set()
        entries: list[int | None] = []
        following = count
        for visit in plan.visits:
            entries.append(following if visit.block in seen else visit.block)
            following += visit.block in seen
            seen.add(visit.block)
        return entries
    storing = [visit.block for visit in plan.visits if visit.attn and kinds[visit.block] != STATE]
    firsts = {kind: kinds.index(kind) for kind in dict.fromkeys(kinds) if kind != STATE}
    head = min(firsts, key=firsts.__getitem__)
    if head not in {kinds[block] for block in storing}:
        raise ValueError(
            f"the plan leaves out every {head} attention, and transformers reads the length of a cache from block "
            f"{firsts[head]}, which has it; keep one of the blocks {[i for i, k in enumerate(kinds) if k == head]}, or "
            "use cache_policy='recompute'."
        )
    used = {kinds[block] for block in storing}
    own = storing == sorted(set(storing)) and all(firsts[kind] in storing for kind in used)
    if own:
        return [visit.block if visit.attn and kinds[visit.block] != STATE else None for visit in plan.visits]
    if plan.phase != "both":
        raise ValueError(
            f"the plan leaves out the attention of block {next(firsts[k] for k in used if firsts[k] not in storing)}, "
            f"where transformers reads the length of a cache, in the {plan.phase} phase alone; keep it, or use "
            "cache_policy='recompute'."
        )
    pools = {kind: [i for i, other in enumerate(kinds) if other == kind] for kind in firsts}
    entries, following = [], count
    for visit in plan.visits:
        kind = kinds[visit.block]
        if not visit.attn or kind == STATE:
            entries.append(None)
        elif pools[kind]:
            entries.append(pools[kind].pop(0))
        else:
            entries.append(following)
            following += 1
    return entries


def check_plan(view: Any, plan: DepthPlan) -> None:
    """Raise ValueError for a plan that this decoder cannot run exactly."""
    kinds = view.kinds
    stateful = [i for i, kind in enumerate(kinds) if kind == STATE]
    order = [visit.block for visit in plan.visits]
    if [block for block in order if block in stateful] != stateful or any(
        not visit.attn for visit in plan.visits if visit.block in stateful
    ):
        raise ValueError(
            f"blocks {stateful} of {type(view.root).__name__} carry a state from token to token, or have no "
            "attention; a plan can leave out their MLP, but not drop, repeat or move them."
        )
    moved = order != sorted(set(order))
    if stateful and moved:
        raise ValueError(f"{type(view.root).__name__} has blocks with a state; a plan can drop blocks, not move them.")
    if moved and plan.phase != "both":
        raise ValueError(
            f"the plan repeats or moves blocks in the {plan.phase} phase alone; that needs phase='both', because the "
            "other phase would leave the added cache entries empty."
        )
    if plan.phase == "prefill" and not plan.fill:
        raise ValueError(
            "phase='prefill' needs cache_policy='recompute': decoding would attend to keys that were never stored."
        )
    if plan.fill and stateful:
        raise ValueError("cache_policy='recompute' does not serve models with state blocks; use cache_policy='skip'.")
