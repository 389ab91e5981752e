"""A word-level tokenizer for data sets with a small vocabulary."""

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def word_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the words of `texts` in lower case, with pad, bos, eos and unk.

    Every character that is neither a letter, a digit nor a blank is a separate token. Same texts, same ids.

    Raises:
        ValueError: `texts` holds no word.
    """
    pieces = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), behavior="removed", invert=True)
    words = {word for text in texts for word, _ in pieces.pre_tokenize_str(text.lower())}
    if not words:
        raise ValueError("word_tokenizer needs texts with at least one word, got none")
    order = ["<pad>", "<bos>", "<eos>", "<unk>", *sorted(words)]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(order)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pieces
    core.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
