"""Index a chat file: usable conversations, their lengths, and how they are packed into rows."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from mmskip.datasets.chat.format import Chat, parse_chat


@dataclass
class ChatIndex:
    """The usable conversations of a file.

    Attributes:
        lengths: tokens of each record, 0 where it cannot be used or was not looked at.
        usable: numbers of the records that can be used.
        left_out: how many were left out, by reason.
        examples: the first message of each reason.
    """

    lengths: list[int]
    usable: list[int]
    left_out: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)

    def leave_out(self, number: int, reason: str, message: str) -> None:
        """Count a record that cannot be used."""
        self.usable.remove(number)
        self.left_out[reason] += 1
        self.examples.setdefault(reason, message)

    def report(self) -> str:
        """Summarize the skipped conversations; empty if there are none."""
        return "; ".join(
            f"{count} {reason} (the first: {self.examples[reason]})" for reason, count in self.left_out.items()
        )


class _Measure(Dataset[tuple[int, str]]):
    """Length of each conversation, or the reason why it has none."""

    def __init__(self, chats: Sequence[Chat], measure: Callable[[Chat], int]) -> None:
        self.chats, self.measure = chats, measure

    def __len__(self) -> int:
        return len(self.chats)

    def __getitem__(self, index: int) -> tuple[int, str]:
        try:
            return self.measure(self.chats[index]), ""
        except ValueError as error:
            return 0, str(error)


def parse_all(records: Sequence[dict[str, Any]], folder: Path, name: str) -> tuple[list[Chat | None], ChatIndex]:
    """The conversations of a file, None where a record is none, and the index of the others."""
    index = ChatIndex([0] * len(records), list(range(len(records))))
    chats: list[Chat | None] = []
    for number, record in enumerate(records):
        try:
            chats.append(parse_chat(record, folder, f"{name}#{number}"))
        except ValueError as error:
            chats.append(None)
            index.leave_out(number, "bad records", str(error))
    return chats, index


def measure_all(
    chats: Sequence[Chat | None], index: ChatIndex, measure: Callable[[Chat], int], cache: Path, workers: int
) -> None:
    """Read every usable conversation once and note its length in `index`; broken ones are skipped. The result is
    kept in `cache`, so the next run reads nothing."""
    from mmskip.utils.files import write_text

    numbers = list(index.usable)
    if cache.exists():
        found = [tuple(entry) for entry in json.loads(cache.read_text())]
    else:
        data = _Measure([chat for n in numbers if (chat := chats[n]) is not None], measure)
        loader = DataLoader(data, batch_size=None, num_workers=workers)
        found = list(tqdm(loader, desc="reading conversations once", unit="conversation"))
        write_text(json.dumps(found), cache)
    for number, (length, message) in zip(numbers, found, strict=True):
        if message:
            index.leave_out(number, "broken", message)
        else:
            index.lengths[number] = int(length)


def cut_long(index: ChatIndex, max_tokens: int) -> None:
    """Drop conversations longer than `max_tokens`."""
    for number in list(index.usable):
        if index.lengths[number] > max_tokens:
            message = f"number {number} with {index.lengths[number]} tokens"
            index.leave_out(number, f"longer than max_tokens={max_tokens}", message)


def pack_rows(index: ChatIndex, max_tokens: int, seed: int) -> list[list[int]]:
    """Rows of conversations of at most `max_tokens` together: first fit, in an order drawn by `seed`."""
    order = np.random.default_rng(seed).permutation(index.usable)
    rows: list[list[int]] = []
    room: list[int] = []
    for number in order.tolist():
        length = index.lengths[number]
        place = next((row for row, free in enumerate(room) if free >= length), None)
        if place is None:
            rows.append([])
            room.append(max_tokens)
            place = len(rows) - 1
        rows[place].append(number)
        room[place] -= length
    return rows


def cache_key(*parts: Any) -> str:
    """Ten characters that name settings."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:10]
