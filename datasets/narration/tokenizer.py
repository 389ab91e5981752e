"""Tokenizers of the stream: the vision token, the two decision tokens, and a small word-level one to train."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

VISION = "<v>"
SILENT = ","
SPEAK = "]"
OPEN = "\n["
ASSISTANT = "\nAssistant:"
USER = "\nUser:"


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Add the tokens of the stream to a Hugging Face tokenizer, in place: `<v>`, and pad, bos and eos where missing.

    A missing pad token becomes `<pad>`, a missing bos the eos (GPT-2 and Qwen have it so) or `<bos>`.

    Args:
        tokenizer: any fast or slow Hugging Face tokenizer.

    Returns:
        The same object.

    Raises:
        ValueError: `,` or `]` is not one token; nothing was added then.
    """
    for text in (SILENT, SPEAK):
        _single_id(tokenizer, text)
    missing: dict[str, Any] = {}
    if tokenizer.eos_token is None:
        missing["eos_token"] = "<eos>"
    if tokenizer.bos_token is None:
        missing["bos_token"] = tokenizer.eos_token or "<bos>"
    if tokenizer.pad_token is None:
        missing["pad_token"] = "<pad>"
    tokenizer.add_special_tokens(missing)
    if VISION not in tokenizer.get_vocab():
        tokenizer.add_tokens([VISION], special_tokens=True)
    return tokenizer


@dataclass(frozen=True)
class StreamTokens:
    """Token ids of the stream template for one tokenizer. Build it with `StreamTokens.of`.

    Pieces of text are tokenized one by one and joined as ids, never as text: a byte-pair tokenizer would merge `]` with
    the newline after it, and the decision token would be lost.

    Attributes:
        vision: id of `<v>`.
        silent: id of `,`.
        speak: id of `]`.
        open: ids of `\\n[`.
        assistant: ids of `\\nAssistant:`.
        bos, eos, pad: special ids.
    """

    vision: int
    silent: int
    speak: int
    open: tuple[int, ...]
    assistant: tuple[int, ...]
    bos: int
    eos: int
    pad: int
    tokenizer: PreTrainedTokenizerBase = field(repr=False, compare=False)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "StreamTokens":
        """The ids for a tokenizer that went through `prepare_tokenizer`.

        Raises:
            ValueError: a token is missing.
        """
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(tokenizer, name) is None:
                raise ValueError(f"the tokenizer has no {name}; call prepare_tokenizer(tokenizer) first")
        if VISION not in tokenizer.get_vocab():
            raise ValueError(f"the tokenizer has no {VISION!r} token; call prepare_tokenizer(tokenizer) first")
        return cls(
            vision=tokenizer.get_vocab()[VISION],
            silent=_single_id(tokenizer, SILENT),
            speak=_single_id(tokenizer, SPEAK),
            open=tuple(_encode(tokenizer, OPEN)),
            assistant=tuple(_encode(tokenizer, ASSISTANT)),
            bos=tokenizer.bos_token_id,
            eos=tokenizer.eos_token_id,
            pad=tokenizer.pad_token_id,
            tokenizer=tokenizer,
        )

    def head(self, instruction: str = "") -> list[int]:
        """`<bos>` and the instruction."""
        return [self.bos, *_encode(self.tokenizer, instruction)] if instruction else [self.bos]

    def narration(self, text: str) -> list[int]:
        """The words of a narration after `Assistant:`, and the eos."""
        return [*_encode(self.tokenizer, f" {text}"), self.eos]

    def question(self, text: str) -> list[int]:
        """`\\nUser:` and a question; the stream part is closed before it and `\\nAssistant:` follows."""
        return _encode(self.tokenizer, f"{USER} {text}")

    def decode(self, ids: Iterable[int]) -> str:
        """Readable text of narration ids, without special tokens and outer blanks."""
        text: Any = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text.strip()


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the words of `texts`, with the stream's own tokens.

    Words are kept as written; every other character but blanks is a separate token. Unknown words become `<unk>`.
    Same texts, same ids: special tokens first, then the template, then words in alphabetical order.

    Raises:
        ValueError: `texts` holds no word.
    """
    pieces = pre_tokenizers.Split(Regex(r"\n\[|\nAssistant:|\n|\w+|[^\w\s]"), behavior="removed", invert=True)
    words = {word for text in texts for word, _ in pieces.pre_tokenize_str(text)}
    if not words:
        raise ValueError("train_tokenizer needs texts with at least one word, got none")
    special = ["<pad>", "<bos>", "<eos>", "<unk>", VISION]
    template = [SILENT, SPEAK, OPEN, ASSISTANT]
    order = special + template + sorted(words - {*special, *template})
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(order)}, unk_token="<unk>"))
    core.pre_tokenizer = pieces
    core.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.add_tokens([VISION], special_tokens=True)
    return tokenizer


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: Any = tokenizer.encode(text, add_special_tokens=False)
    return list(ids)


def _single_id(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Id of a text that must be one token. SentencePiece puts a blank before it, so the vocabulary is asked too."""
    ids = _encode(tokenizer, text)
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        return ids[0]
    vocabulary = tokenizer.get_vocab()
    if text not in vocabulary:
        raise ValueError(
            f"{text!r} must be a single token of the tokenizer, it is {len(ids)} tokens {ids}; "
            f"add it with tokenizer.add_tokens([{text!r}])"
        )
    return vocabulary[text]
