"""Measures of how a language model uses its depth (Do Language Models Use Their Depth Efficiently?, arXiv 2505.13898).

Everything is measured on the residual stream x -> x + a (attention) -> x + a + m (MLP) of the blocks of a decoder, on
token ids without padding. Models are not changed, and are run as they are (in `eval` mode by the caller).

Shape suffixes: B windows, T tokens, D width, L blocks, V vocabulary, N tokens of all windows.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, kl_div

from mmskip import families
from mmskip.hf.probes.residuals import Residual, entering, leaving, residuals

POINTS = ("attn", "mlp", "block")
Batches = Sequence[Tensor]


def view_of(model: Any) -> Any:
    """The decoder of a model.

    Raises:
        ValueError: no family fits, or methods are applied.
    """
    from mmskip.registry import applied

    if applied(model):
        raise ValueError(f"the analysis is of the untouched model, but it carries {applied(model)}; remove_ that.")
    return families.find(model, ("decoder",))


def _logits(model: Any, ids_BT: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids_BT, use_cache=False).logits
    return logits.float()


@torch.no_grad()
def contributions(model: Any, batches: Batches) -> dict[str, dict[str, list[float | None]]]:
    """Contribution of each block to the stream it reads, means over tokens.

    Returns:
        `norm` and `cosine`, each with `attn`, `mlp` and `block`, one number per block: ||a|| / ||x||,
        ||m|| / ||x + a||, ||a + m|| / ||x||, and the cosines of the same pairs. None where attention and MLP of a
        block cannot be distinguished.
    """
    view = view_of(model)
    found: dict[str, dict[str, list[float | None]]] = {
        kind: {point: [0.0] * len(view.blocks) for point in POINTS} for kind in ("norm", "cosine")
    }
    tokens = sum(ids.numel() for ids in batches)

    def seen(state: Residual) -> None:
        x, y = state.x_BTD.float(), state.y_BTD.float()
        mid = None if state.mid_BTD is None else state.mid_BTD.float()
        for point, before, after in (("attn", x, mid), ("mlp", mid, y), ("block", x, y)):
            norm, cosine = found["norm"][point], found["cosine"][point]
            if before is None or after is None:
                norm[state.index] = cosine[state.index] = None
                continue
            ratio = (after - before).norm(dim=-1) / before.norm(dim=-1).clamp(min=1e-12)
            norm[state.index] += float(ratio.sum()) / tokens  # type: ignore[operator]
            cosine[state.index] += float(cosine_similarity(after - before, before, dim=-1).sum()) / tokens  # type: ignore[operator]

    with residuals(view, seen):
        for ids in batches:
            _logits(model, ids)
    return found


def _updates(model: Any, view: Any, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Updates of each block [L, B, T, D], and the probabilities [B, T, V]."""
    added: list[Tensor] = []
    with residuals(view, lambda seen: added.append((seen.y_BTD - seen.x_BTD).float()), middle=False):
        probs = _logits(model, ids_BT).softmax(-1)
    return torch.stack(added), probs


@torch.no_grad()
def skip_effects(model: Any, batches: Batches, future: bool = False) -> dict[str, Any]:
    """Effect of skipping a block on the updates of later blocks, and on the output.

    Args:
        future: the block is left out for the first half of each window only, and effects are measured on the second
            half: what is passed on to later tokens, through attention.

    Returns:
        `layers`: [L, L], skipped block by affected block, ||dr - dr'|| / ||dr|| as a mean over tokens (0 up to the
        skipped block itself); `layers_max`: the largest over tokens; `output`: per skipped block, the largest
        ||p - p'||_2 over tokens; `output_mean`: its mean.
    """
    view = view_of(model)
    count = len(view.blocks)
    mean, most = torch.zeros(count, count), torch.zeros(count, count)
    output, output_mean, tokens = torch.zeros(count), torch.zeros(count), 0
    for ids in batches:
        start = ids.shape[1] // 2 if future else 0
        skipped_T = torch.arange(ids.shape[1], device=ids.device) < (start if future else ids.shape[1])
        dense, probs = _updates(model, view, ids)
        tokens += ids[:, start:].numel()
        for index in range(count):
            with leaving(view, index, _skip(skipped_T)):
                changed, other = _updates(model, view, ids)
            off = (changed - dense).norm(dim=-1) / dense.norm(dim=-1).clamp(min=1e-12)
            off = off[index + 1 :, :, start:].cpu()
            mean[index, index + 1 :] += off.sum((1, 2))
            most[index, index + 1 :] = torch.maximum(most[index, index + 1 :], off.flatten(1).amax(1))
            apart = (other - probs).norm(dim=-1)[:, start:].cpu()
            output[index] = max(output[index], apart.max())
            output_mean[index] += apart.sum()
    return {
        "layers": (mean / tokens).tolist(),
        "layers_max": most.tolist(),
        "output": output.tolist(),
        "output_mean": (output_mean / tokens).tolist(),
    }


def _skip(skipped_T: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x_BTD, y_BTD: torch.where(skipped_T[None, :, None], x_BTD, y_BTD)


@torch.no_grad()
def logit_lens(model: Any, batches: Batches, top: int = 5) -> dict[str, list[float]]:
    """Predictions of the final norm and head on the stream after each block.

    Returns:
        `kl`: KL(final || after the block) in nats, mean over tokens; `overlap`: share of the `top` likeliest tokens
        that are among those of the final output. The last entries are 0 and 1.
    """
    view = view_of(model)
    last = len(view.blocks) - 1
    kl, overlap = [0.0] * (last + 1), [0.0] * (last + 1)
    tokens = sum(ids.numel() for ids in batches)
    for ids in batches:
        states: list[Tensor] = []
        with residuals(view, lambda seen, states=states: states.append(seen.y_BTD), middle=False):  # type: ignore[misc]
            final = _logits(model, ids).log_softmax(-1)
        best = final.topk(top).indices
        for index, state in enumerate(states):
            with leaving(view, last, lambda x, y, state=state: state):  # type: ignore[misc]
                early = _logits(model, ids).log_softmax(-1)
            kl[index] += float(kl_div(early, final, reduction="sum", log_target=True)) / tokens
            same = (early.topk(top).indices[..., None] == best[..., None, :]).any(-1)
            overlap[index] += float(same.float().mean(-1).sum()) / tokens
    return {"kl": kl, "overlap": overlap}


@torch.no_grad()
def mean_states(model: Any, batches: Batches) -> list[Tensor]:
    """The mean state [D] that enters each block."""
    view = view_of(model)
    sums: list[Any] = [0.0] * len(view.blocks)

    def seen(state: Residual) -> None:
        sums[state.index] = sums[state.index] + state.x_BTD.float().sum((0, 1))

    with residuals(view, seen, middle=False):
        for ids in batches:
            _logits(model, ids)
    tokens = sum(ids.numel() for ids in batches)
    return [total / tokens for total in sums]


@torch.no_grad()
def erasure(model: Any, ids_T: Tensor, means: Sequence[Tensor], rows: int = 32) -> Tensor:
    """Change of the last prediction of a text without a token at a depth: the state of one token that enters one
    block is replaced by the mean state there.

    Args:
        ids_T: a text of at least two tokens.
        means: of `mean_states`.

    Returns:
        [L, T - 1]: ||p - p'||_2 of the last prediction, by block and erased token (the last token is never erased).
    """
    view = view_of(model)
    length = len(ids_T)
    probs_V = _logits(model, ids_T[None])[0, -1].softmax(-1)
    found = torch.zeros(len(view.blocks), length - 1)
    for index in range(len(view.blocks)):
        for chunk in torch.arange(length - 1, device=ids_T.device).split(rows):
            here_BT = torch.arange(length, device=ids_T.device)[None] == chunk[:, None]
            with entering(view, index, _erase(here_BT, means[index])):
                other_BV = _logits(model, ids_T[None].expand(len(chunk), -1))[:, -1].softmax(-1)
            found[index, chunk.cpu()] = (other_BV - probs_V).norm(dim=-1).cpu()
    return found


def _erase(here_BT: Tensor, mean_D: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x_BTD: torch.where(here_BT[..., None], mean_D.to(x_BTD), x_BTD)


def integrated_gradients(model: Any, ids_T: Tensor, steps: int = 256, rows: int = 16) -> Tensor:
    """Contribution of each block's update of each token to the last prediction: the gradient of the log-probability of
    the likeliest next token, integrated while that block's update grows from zero to its value (midpoint rule).

    Summed over tokens, a row is the log-probability with the block minus that without it.

    Returns:
        [L, T] in nats.
    """
    view = view_of(model)
    with torch.no_grad():
        target = int(_logits(model, ids_T[None])[0, -1].argmax())
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        return torch.stack(
            [_attribution(model, view, index, ids_T, target, steps, rows) for index in range(len(view.blocks))]
        )
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def _attribution(model: Any, view: Any, index: int, ids_T: Tensor, target: int, steps: int, rows: int) -> Tensor:
    found_T = torch.zeros(len(ids_T))
    for part_B in ((torch.arange(steps, device=ids_T.device) + 0.5) / steps).split(rows):
        update: list[Tensor] = []
        leaf: list[Tensor] = []

        def grown(x: Tensor, y: Tensor, part=part_B, update=update, leaf=leaf) -> Tensor:  # type: ignore[no-untyped-def]
            update.append((y - x).detach())
            leaf.append((part.to(x.dtype)[:, None, None] * update[0]).requires_grad_())
            return x.detach() + leaf[0]

        with torch.enable_grad(), leaving(view, index, grown):
            logits_BV = _logits(model, ids_T[None].expand(len(part_B), -1))[:, -1]
            (gradient_BTD,) = torch.autograd.grad(logits_BV.log_softmax(-1)[:, target].sum(), leaf)
        found_T += (gradient_BTD * update[0]).float().sum((0, 2)).cpu() / steps
    return found_T


@torch.no_grad()
def states(model: Any, batches: Batches) -> Tensor:
    """The stream before the first block and after each one, [L + 1, N, D]."""
    view = view_of(model)
    parts: list[list[Tensor]] = [[] for _ in range(len(view.blocks) + 1)]

    def seen(state: Residual) -> None:
        if state.index == 0:
            parts[0].append(state.x_BTD.flatten(0, 1).float().cpu())
        parts[state.index + 1].append(state.y_BTD.flatten(0, 1).float().cpu())

    with residuals(view, seen, middle=False):
        for ids in batches:
            _logits(model, ids)
    return torch.stack([torch.cat(part) for part in parts])


def linear_maps(from_LND: Tensor, to_LND: Tensor, held_out: float = 0.25, ridge: float = 1e-3) -> Tensor:
    """Error of a linear map from the states of one model to those of another on the same tokens.

    Args:
        from_LND, to_LND: of `states`, with as many tokens N.
        held_out: share of the tokens at the end that maps are judged on, not fitted on.
        ridge: times the mean variance of the inputs.

    Returns:
        [L, L']: error as a share of the variance, 0 where the map is perfect, 1 where it is no better than the mean.

    Raises:
        ValueError: other tokens, or fewer to fit on than the inputs are wide.
    """
    if from_LND.shape[1] != to_LND.shape[1]:
        raise ValueError(f"the models saw {from_LND.shape[1]} and {to_LND.shape[1]} tokens; they need the same ones.")
    fitted = int(from_LND.shape[1] * (1 - held_out))
    if fitted <= from_LND.shape[2]:
        raise ValueError(
            f"{fitted} tokens are too few to fit maps from {from_LND.shape[2]} dimensions; give more text."
        )
    found = torch.zeros(len(from_LND), len(to_LND))
    for i, x in enumerate(_centred(from_LND.double(), fitted)):
        gram = x[:fitted].T @ x[:fitted]
        gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        factor = torch.linalg.cholesky(gram)
        for j, y in enumerate(_centred(to_LND.double(), fitted)):
            weight = torch.cholesky_solve(x[:fitted].T @ y[:fitted], factor)
            rest = y[fitted:] - x[fitted:] @ weight
            found[i, j] = rest.square().sum() / y[fitted:].square().sum()
    return found


def _centred(states_LND: Tensor, fitted: int) -> Iterator[Tensor]:
    for state_ND in states_LND:
        yield state_ND - state_ND[:fitted].mean(0)
