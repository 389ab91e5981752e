"""Conversations with images and videos, as they stand in files: Hugging Face messages, or LLaVA's conversations.

Both become `Chat`: messages whose content is a list of parts, and the media in the order of their placeholders.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
KINDS = ("image", "video")
_PATH_KEYS = ("path", "url", "image", "video")
_PLACEHOLDER = re.compile(r"\s*<(image|video)>\s*")


@dataclass(frozen=True)
class Medium:
    """An image or video of a conversation."""

    kind: str
    path: Path


@dataclass(frozen=True)
class Chat:
    """One conversation.

    Attributes:
        uid: its name, for messages.
        messages: as chat templates expect them: `role`, and `content` as a list of parts of type text, image or video
            (image and video parts carry no path).
        media: images and videos in the order of their parts.
    """

    uid: str
    messages: tuple[dict[str, Any], ...]
    media: tuple[Medium, ...]

    def of(self, kind: str) -> list[Path]:
        """Paths of the images, or of the videos."""
        return [medium.path for medium in self.media if medium.kind == kind]


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The records of a `.jsonl` file (one JSON object per line) or of a `.json` file (a list of objects).

    Raises:
        ValueError: there is no such file, it is not JSON, or it holds no records.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"there is no file {path}; expected a .json or .jsonl file of conversations")
    text = file.read_text()
    is_list = text.lstrip().startswith("[")
    pieces = [(1, text)] if is_list else [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    records: list[Any] = []
    for number, piece in pieces:
        try:
            value = json.loads(piece)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: not JSON ({error}); expected a list, or one object per line"
            ) from error
        records += value if is_list else [value]
    if not records or not all(isinstance(record, dict) for record in records):
        raise ValueError(f"{path} holds no conversations; expected a JSON list of objects, or one object per line")
    return records


def parse_chat(record: Mapping[str, Any], folder: Path, uid: str) -> Chat:
    """A conversation of a file.

    Args:
        record: with `messages` (Hugging Face, TRL) or `conversations` (LLaVA). Paths of media stand in the parts
            (`{"type": "image", "path": ...}`), or beside the messages as `image`, `images`, `video` or `videos` (a path
            or a list), to be taken in the order of the parts or of LLaVA's `<image>` and `<video>`.
        folder: what relative paths start from.
        uid: name, where the record has no `id`.

    Raises:
        ValueError: unknown keys of messages, roles or part types; no assistant turn; media and placeholders that do
            not fit.
    """
    uid = str(record.get("id", uid))
    turns = record.get("messages", record.get("conversations"))
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{uid}: no 'messages' and no 'conversations'; the keys are {', '.join(record)}")
    waiting = {kind: [*_paths(record, kind)] for kind in KINDS}
    given = {kind: len(waiting[kind]) for kind in KINDS}
    messages = []
    media: list[Medium] = []
    for turn in turns:
        role, content = _role_and_content(turn, uid)
        parts = []
        for part in _parts(content, "conversations" in record and "messages" not in record, uid):
            if part["type"] == "text":
                parts.append({"type": "text", "text": part["text"]})
                continue
            path = part.get("source") or (waiting[part["type"]].pop(0) if waiting[part["type"]] else None)
            if path is None:
                raise ValueError(
                    f"{uid}: more places for a {part['type']} than files ({given[part['type']]}); give each part a path"
                )
            media.append(Medium(part["type"], folder / path))
            parts.append({"type": part["type"]})
        messages.append({"role": role, "content": parts})
    for kind, left in waiting.items():
        if left:
            raise ValueError(f"{uid}: {len(left)} {kind} file(s) without a place in the messages, such as {left[0]}")
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError(f"{uid}: no assistant turn, so nothing to learn")
    return Chat(uid, tuple(messages), tuple(media))


def _paths(record: Mapping[str, Any], kind: str) -> Iterator[str]:
    for key in (kind, f"{kind}s"):
        value = record.get(key)
        for path in [value] if isinstance(value, str) else value or ():
            yield path["path"] if isinstance(path, Mapping) else path


def _role_and_content(turn: Any, uid: str) -> tuple[str, Any]:
    if not isinstance(turn, Mapping):
        raise ValueError(f"{uid}: a message is {turn!r}; expected an object")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if role not in ROLES:
        raise ValueError(f"{uid}: a message has the role {role!r}; expected one of {', '.join(ROLES)}")
    if content is None:
        raise ValueError(f"{uid}: a message has neither 'content' nor 'value'; its keys are {', '.join(turn)}")
    return ROLES[role], content


def _parts(content: Any, placeholders: bool, uid: str) -> list[dict[str, Any]]:
    """Parts of one message; `placeholders`: cut LLaVA's <image> and <video> out of the text."""
    if isinstance(content, str):
        if not placeholders:
            return [{"type": "text", "text": content}]
        pieces = _PLACEHOLDER.split(content)
        parts = [
            {"type": piece} if index % 2 else {"type": "text", "text": piece}
            for index, piece in enumerate(pieces)
            if index % 2 or piece
        ]
        return parts or [{"type": "text", "text": ""}]
    if not isinstance(content, list):
        raise ValueError(f"{uid}: content is a {type(content).__name__}; expected a text or a list of parts")
    return [_part(part, uid) for part in content]


def _part(part: Any, uid: str) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind in KINDS:
        return {"type": kind, "source": next((part[key] for key in _PATH_KEYS if part.get(key)), None)}
    raise ValueError(f"{uid}: a part is {part!r}; expected one of type text, image or video")
