"""Scoring the turns of a batch for the narration metrics.

Shapes: B samples, T tokens, N tokens per frame, P labelled positions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmskip.datasets.common.labels import IGNORE
from mmskip.datasets.narration.turns import TurnSpan, collate_narration
from mmskip.models.common.positions import Positions
from mmskip.models.video_llm.metrics import TurnScore, appended_frames, correct_prefix, frame_diff
from mmskip.models.video_llm.speaking import TokenIds, speaks, split_rows

if TYPE_CHECKING:
    from mmskip.models.video_llm.module import VideoLLM


@dataclass(frozen=True)
class _Late:
    """A turn in which the model stayed silent, and how many further frames it is shown."""

    row: int
    turn: int
    frames: int


@torch.no_grad()
def score_turns(model: "VideoLLM", batch: dict[str, Any]) -> list[list[TurnScore]]:
    """Score each turn of each sample of a batch, teacher-forced.

    Where the model stays silent through a turn that is not the last, it is shown further frames as if nobody had
    spoken: those sequences are computed again from their beginning, as many at a time as the batch has samples.

    Returns:
        For each sample its turns' scores.
    """
    positions = Positions.of(batch["labels"], batch["layout"])
    logits = model(batch, positions.rows, positions.cols).float()
    shape = batch["labels"].shape

    def grid(values: Tensor) -> list[list[float]]:
        """Values of the labelled positions [P] at their place [B][T] of the predicted token."""
        full = torch.zeros(shape, dtype=torch.float64)
        full[positions.rows.cpu(), positions.cols.cpu() + 1] = values.double().cpu()
        return full.tolist()

    nll = grid(F.cross_entropy(logits, positions.labels, reduction="none"))
    right = grid(logits.argmax(-1) == positions.labels)
    speak = grid(speaks(logits, model.ids.silent))
    spoken = [
        [[speak[row][index + 1] > 0 for index in turn.stream] for turn in turns]
        for row, turns in enumerate(batch["turns"])
    ]
    later = _show_more_frames(model, batch, _late_turns(batch["turns"], spoken))
    scores: list[list[TurnScore]] = []
    for row, turns in enumerate(batch["turns"]):
        scores.append([])
        for index, turn in enumerate(turns):
            start, stop = turn.text
            scores[-1].append(
                TurnScore(
                    nll=sum(nll[row][start:stop]),
                    correct=correct_prefix([ok > 0 for ok in right[row][start:stop]]),
                    text_tokens=stop - start,
                    stream_tokens=len(turn.stream),
                    frame_diff=frame_diff(spoken[row][index], later.get((row, index), [])),
                )
            )
    return scores


def _late_turns(turns: Sequence[Sequence[TurnSpan]], spoken: Sequence[Sequence[Sequence[bool]]]) -> list[_Late]:
    late = []
    for row, spans in enumerate(turns):
        for index in range(len(spans) - 1):
            frames = appended_frames(len(spans[index].stream), len(spans[index + 1].stream))
            if frames > 0 and not any(spoken[row][index]):
                late.append(_Late(row, index, frames))
    return late


def _show_more_frames(
    model: "VideoLLM", batch: dict[str, Any], late: Sequence[_Late]
) -> dict[tuple[int, int], list[bool]]:
    """Whether the model speaks at each appended frame, by (row, turn)."""
    samples = split_rows(batch)
    size = len(samples)
    # sequences of similar length together, so that little is padded
    order = sorted(late, key=lambda item: samples[item.row]["turns"][item.turn].stream[-1])
    spoken: dict[tuple[int, int], list[bool]] = {}
    for start in range(0, len(order), size):
        part = order[start : start + size]
        longer = collate_narration([_continued(samples[i.row], i, model.ids) for i in part], 0)
        longer = {key: value.to(model.device) if torch.is_tensor(value) else value for key, value in longer.items()}
        positions = Positions.of(longer["labels"], longer["layout"])
        decided = speaks(model(longer, positions.rows, positions.cols), model.ids.silent).tolist()
        for item in part:
            spoken[item.row, item.turn] = decided[: item.frames]
            decided = decided[item.frames :]
    return spoken


def _continued(sample: dict[str, Any], late: _Late, ids: TokenIds) -> dict[str, Any]:
    """The stream up to the last frame of a turn, and then `,` and a further frame, again and again; the only labels
    follow the further frames."""
    turn: TurnSpan = sample["turns"][late.turn]
    stop = turn.stream[-1] + 1
    tokens = sample["features"].shape[1]
    device = sample["input_ids"].device
    block = torch.zeros(tokens + 1, dtype=torch.long, device=device)
    block[0] = ids.silent
    layout = torch.arange(turn.frames[1], turn.frames[1] + late.frames, device=device)
    layout = torch.cat([torch.full_like(layout, -1)[:, None], layout[:, None].expand(-1, tokens)], 1)
    # a last token after the last frame, whose label asks for the decision there
    input_ids = torch.cat([sample["input_ids"][:stop], block.repeat(late.frames), block[:1]])
    labels = torch.full_like(input_ids, IGNORE)
    labels[stop + tokens + 1 :: tokens + 1] = ids.silent
    return {
        "input_ids": input_ids,
        "labels": labels,
        "layout": torch.cat([sample["layout"][:stop], layout.flatten(), layout[0, :1]]),
        "features": sample["features"][: turn.frames[1] + late.frames],
        "turns": [],
        "uid": sample["uid"],
    }
