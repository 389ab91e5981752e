"""Token ids of the template, the decision to speak, and the samples of a batch, for training, scoring and streaming."""

from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mmskip.datasets.narration.tokenizer import StreamTokens


@dataclass(frozen=True)
class TokenIds:
    """Token ids of the stream template as plain numbers, which a model keeps in its checkpoint.

    Attributes:
        silent, speak, eos: single ids; see `mmskip.datasets.narration.tokenizer.StreamTokens`.
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
        # a pad token that is also the eos (GPT-2) is predicted, so only a separate pad is left out
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
    """One narration of a sample. (A named tuple: Lightning moves what a predict step returns.)

    Attributes:
        frame: index of the frame after which it was spoken.
        tokens: the generated ids, without eos.
    """

    frame: int
    tokens: tuple[int, ...]


class StreamUtterance(NamedTuple):
    """A text that the model spoke in a running stream.

    Attributes:
        stream: number of the stream.
        frame: the last frame it had watched; -1: none.
        tokens: the generated ids, without eos.
        question: number of the question it answers, as `StreamEngine.ask` gave it; None: it spoke by itself.
    """

    stream: int
    frame: int
    tokens: tuple[int, ...]
    question: int | None


def speaks(logits: Tensor, silent: int, threshold: float = 0.0) -> Tensor:
    """Whether to speak, given the logits after frames.

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
