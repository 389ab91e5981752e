"""Labels of a conversation, on the learned tokens: those of the assistant's turns, end-of-turn token included.

The words are found in the rendered text, before a processor expands placeholders into hundreds of vision tokens, and
then found again in the expanded sequence. So any processor of transformers will do, whatever it expands to.
"""

import re
from collections.abc import Sequence
from typing import Any

from mmskip.datasets.chat.format import Chat
from mmskip.datasets.common.labels import IGNORE

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatLabels:
    """Renders conversations and labels their tokens, for one processor.

    Where the chat template marks the assistant's words (`{% generation %}`), the marks are used. Elsewhere the turn
    is what the template adds when the turn is appended to the messages before it.

    Args:
        processor: of transformers, with a chat template and a fast tokenizer.

    Raises:
        ValueError: no chat template, or a slow tokenizer.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        template = getattr(processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None)
        if isinstance(template, dict):
            template = template.get("default")
        if not template:
            raise ValueError(
                f"{type(processor).__name__} has no chat template; give one by chat_template (a Jinja text or a file)"
            )
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(f"{type(self.tokenizer).__name__} is a slow tokenizer; labels need a fast one")
        self.template: str = template
        self.marked = bool(_MARKER.search(template))
        names = [getattr(processor, name, None) for name in ("image_token", "video_token")]
        written = [name for name in names if isinstance(name, str)]
        vocabulary = self.tokenizer.get_vocab()
        self.placeholders = {vocabulary[name] for name in written if name in vocabulary}
        self._cut = re.compile("|".join(re.escape(name) for name in written) or r"(?!)")
        # some placeholders (SmolVLM's <video>) are no tokens, so one that is stands in for all
        self._stand_in = next((name for name in written if name in vocabulary), "")

    def render(self, messages: Sequence[dict[str, Any]], prompt: bool = False) -> str:
        """The text of a conversation, placeholders unexpanded; `prompt`: with the header of an answer to come."""
        text: Any = self.tokenizer.apply_chat_template(
            list(messages), chat_template=self.template, tokenize=False, add_generation_prompt=prompt
        )
        return text

    def special_tokens(self, text: str) -> bool:
        """Whether a tokenizer should add its special tokens; not if the template has written them."""
        bos = self.tokenizer.bos_token
        return not (bos is not None and text.startswith(bos))

    def runs(self, chat: Chat, text: str) -> list[tuple[list[int], list[bool]]]:
        """Stretches of `text` between placeholders that hold words to be learned: ids and whether each is learned.

        Raises:
            ValueError: the template does not say which words are the assistant's.
        """
        ids, learned = self._marked(chat) if self.marked else self._appended(chat, text)
        stretches: list[tuple[list[int], list[bool]]] = [([], [])]
        for token, flag in zip(ids, learned, strict=True):
            if token in self.placeholders:
                stretches.append(([], []))
            else:
                stretches[-1][0].append(token)
                stretches[-1][1].append(flag)
        found = [stretch for stretch in stretches if any(stretch[1])]
        if not found:
            raise ValueError(f"{chat.uid}: the chat template renders no assistant word to learn")
        return found

    def _marked(self, chat: Chat) -> tuple[list[int], list[bool]]:
        out: Any = self.tokenizer.apply_chat_template(
            list(chat.messages),
            chat_template=self.template,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return list(out["input_ids"]), [bool(flag) for flag in out["assistant_masks"]]

    def _appended(self, chat: Chat, text: str) -> tuple[list[int], list[bool]]:
        spans = []
        for index, message in enumerate(chat.messages):
            if message["role"] != "assistant":
                continue
            before = self.render(chat.messages[:index], prompt=True)
            after = self.render(chat.messages[: index + 1])
            if not text.startswith(after.rstrip()) or not after.startswith(before):
                raise ValueError(
                    f"{chat.uid}: the chat template writes turn {index} otherwise once turns follow it, so its words "
                    "cannot be found; give a chat_template with {% generation %} marks"
                )
            spans.append((len(before), len(after.rstrip())))
        learned = [False] * len(text)
        for begin, end in spans:
            learned[begin:end] = [True] * (end - begin)
        pieces, flags, start = [], [], 0
        for cut in [*self._cut.finditer(text), None]:
            end = len(text) if cut is None else cut.start()
            pieces.append(text[start:end])
            flags += learned[start:end]
            if cut is not None:
                flags += [False] * len(self._stand_in)
                start = cut.end()
        out: Any = self.tokenizer(self._stand_in.join(pieces), add_special_tokens=False, return_offsets_mapping=True)
        return list(out["input_ids"]), [any(flags[a:b]) for a, b in out["offset_mapping"]]

    def label(self, uid: str, ids: Sequence[int], runs: Sequence[tuple[list[int], list[bool]]]) -> list[int]:
        """Labels of an expanded sequence: its ids at learned tokens, -100 elsewhere.

        Args:
            uid: name of the conversation.
            ids: as the processor gave them.
            runs: of the conversation, see `runs`.

        Raises:
            ValueError: a stretch of text does not stand in the sequence (the processor cut or changed it).
        """
        labels = [IGNORE] * len(ids)
        start = 0
        for stretch, learned in runs:
            start = _find(ids, stretch, start)
            if start < 0:
                raise ValueError(
                    f"{uid}: the assistant's words were not found again among the {len(ids)} tokens of the processor; "
                    "it must not truncate or rewrite the text"
                )
            for offset, flag in enumerate(learned):
                if flag:
                    labels[start + offset] = ids[start + offset]
            start += len(stretch)
        return labels


def _find(ids: Sequence[int], part: Sequence[int], start: int) -> int:
    """The first place at or after `start` where `part` stands in `ids`; -1: nowhere."""
    wanted, length = list(part), len(part)
    for begin in range(start, len(ids) - length + 1):
        if ids[begin] == wanted[0] and list(ids[begin : begin + length]) == wanted:
            return begin
    return -1
