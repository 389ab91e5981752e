"""Streaming with a video LLM: watch frame by frame, decide at each frame whether to speak, and narrate greedily.

Shapes: T tokens of a chunk, F frames, N tokens per frame, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mmskip.datasets.tokenizer import StreamTokens


@dataclass(frozen=True)
class TokenIds:
    """Token ids of the stream template as plain numbers: what a model keeps of its tokenizer in a checkpoint.

    Attributes:
        silent, speak, eos: single ids; see `mmskip.datasets.tokenizer.StreamTokens`.
        open, assistant: ids of the template's pieces.
        vocab_size: number of ids a language model has to know. `<v>` and padding are never embedded nor
            predicted, so a pretrained vocabulary need not grow for them.
    """

    silent: int
    speak: int
    eos: int
    open: tuple[int, ...]
    assistant: tuple[int, ...]
    vocab_size: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "TokenIds":
        """From a tokenizer that went through `prepare_tokenizer`.

        Raises:
            ValueError: a token of the template is missing.
        """
        tokens = StreamTokens.of(tokenizer)
        # a pad token that is also the eos (GPT-2) is predicted, so only a pad of its own is left out
        unused = {tokens.vision, tokens.pad} - {tokens.eos, tokens.bos}
        known = set(tokenizer.get_vocab().values()) - unused
        return cls(tokens.silent, tokens.speak, tokens.eos, tokens.open, tokens.assistant, max(known) + 1)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TokenIds":
        """From `to_dict`."""
        return cls(**{f.name: _plain(values[f.name]) for f in fields(cls)})

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, fit for a weights-only checkpoint."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


class Utterance(NamedTuple):
    """One narration of the model. (A named tuple: Lightning moves what a predict step returns.)

    Attributes:
        frame: index of the frame after which it was spoken.
        tokens: the generated ids, without eos.
    """

    frame: int
    tokens: tuple[int, ...]


def speaks(logits: Tensor, silent: int, threshold: float = 0.0) -> Tensor:
    """Whether to speak, given the logits behind frames.

    Args:
        logits: [..., V].
        silent: id of the silent token.
        threshold: in [0, 1]; a silent token with a lower probability is set to zero. 0: plain argmax.

    Returns:
        BoolTensor [...].
    """
    argmax = logits.argmax(-1) != silent
    if threshold <= 0:
        return argmax
    return argmax | (logits.float().softmax(-1)[..., silent] < threshold)


def stream_narrations(
    step: Callable[[list[int], Tensor | None], Tensor],
    features: Tensor,
    head: Sequence[int],
    ids: TokenIds,
    threshold: float,
    max_new_tokens: int,
) -> list[Utterance]:
    """The streaming loop of VideoLLM-online.

    Args:
        step: takes text ids and, behind them, the features [1, N, C] of one frame (None: text alone); appends them to
            the stream and returns the logits [V] behind the last token.
        features: [F, N, C].
        head: ids before the first frame (`<bos>`, instruction, `\\n[`).
        ids: the token ids of the template.
        threshold: see `speaks`.
        max_new_tokens: longest narration, tokens.

    Returns:
        The narrations in order. The decision at the first frame is not learned and therefore not taken.
    """
    said = []
    pending = list(head)
    for frame in range(len(features)):
        logits = step(pending, features[frame : frame + 1])
        pending = [ids.silent]
        if frame == 0 or not bool(speaks(logits, ids.silent, threshold)):
            continue
        words: list[int] = []
        logits = step([ids.speak, *ids.assistant], None)
        while (token := int(logits.argmax())) != ids.eos and len(words) < max_new_tokens:
            words.append(token)
            if len(words) < max_new_tokens:
                logits = step([token], None)
        # the eos, and a last word cut off by the limit, have not been seen by the model yet
        unseen = words[-1:] if len(words) == max_new_tokens else []
        pending = [*unseen, ids.eos, *ids.open]
        said.append(Utterance(frame, tuple(words)))
    return said


class StreamState:
    """The running stream of one video: everything fed so far, in the model's KV cache."""

    def __init__(self, embed: Callable[[Tensor, Tensor, Tensor], Tensor], llm: Any, routed: bool, empty: Tensor):
        """`embed` takes input_ids [1, T], layout [1, T] and features [F, N, C]; `empty` is features of no frame."""
        self._embed, self._llm, self._routed, self._empty = embed, llm, routed, empty
        self._cache: Any = None
        self._frames = 0
        self._seen = 0

    def __call__(self, text: list[int], frame: Tensor | None) -> Tensor:
        """Append `text`, then `frame` [1, N, C]; returns the logits [V] behind the last token."""
        tokens = 0 if frame is None else frame.shape[1]
        device = self._empty.device
        ids = torch.tensor([[*text, *[0] * tokens]], device=device)
        layout = torch.full_like(ids, -1)
        if frame is not None:
            layout[:, len(text) :] = self._frames
            self._frames += 1
        self._seen += ids.shape[1]
        features = self._empty if frame is None else frame
        out = self._llm(
            inputs_embeds=self._embed(ids, layout, features),
            attention_mask=torch.ones(1, self._seen, dtype=torch.long, device=device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
            **({"layout": layout} if self._routed else {}),
        )
        self._cache = out.past_key_values
        return out.logits[0, -1]


def split_rows(batch: dict[str, Any]) -> list[dict[str, Any]]:
    """The samples of a batch as they were before `collate_narration`, without padding."""
    rows: list[dict[str, Any]] = []
    done = 0
    frames = (batch["layout"].amax(1) + 1).tolist()
    for row, mask in enumerate(batch["attention_mask"].bool()):
        start = int(mask.int().argmax())
        rows.append(
            {
                **{key: batch[key][row][mask] for key in ("input_ids", "labels", "layout")},
                "features": batch["features"][done : done + frames[row]],
                "turns": [turn.shifted(-start) for turn in batch["turns"][row]],
                "uid": batch["uid"][row],
            }
        )
        done += frames[row]
    return rows
