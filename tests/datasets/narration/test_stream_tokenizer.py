"""Tokenizers of the stream: trained ones and those of Hugging Face."""

import pytest
from locations import SHARED_DATA
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mmskip.datasets.narration.tokenizer import StreamTokens, prepare_tokenizer, train_tokenizer

STORIES = SHARED_DATA / "stories260K"
SENTENCE = "a small red circle enters, from the left"


def byte_bpe():
    """A byte-level BPE in which ']' and the newline after it are one token, as in Llama 3."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(["]\nAssistant: C opens the door"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|end|>")


def test_trained_tokenizer_round_trips_text():
    tokens = StreamTokens.of(prepare_tokenizer(train_tokenizer([SENTENCE, "the green star hides"])))
    for text in (SENTENCE, "the green star hides"):
        ids = tokens.narration(text)
        assert tokens.decode(ids) == text and len(ids) == len(text.replace(",", " ,").split()) + 1
    assert len(tokens.open) == len(tokens.assistant) == 1


def test_trained_tokenizer_is_the_same_for_the_same_words_and_after_saving(tmp_path):
    first, second = train_tokenizer([SENTENCE, "b c"]), train_tokenizer(["c b", SENTENCE])
    assert first.get_vocab() == second.get_vocab()
    prepare_tokenizer(first).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == len(first) and StreamTokens.of(loaded) == StreamTokens.of(first)
    assert StreamTokens.of(loaded).decode(StreamTokens.of(first).narration(SENTENCE)) == SENTENCE


def test_unknown_words_do_not_fail():
    tokens = StreamTokens.of(prepare_tokenizer(train_tokenizer([SENTENCE])))
    assert len(tokens.narration("a zebra enters")) == 4


def test_training_on_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one word"):
        train_tokenizer([])


def test_special_tokens_are_added_where_missing():
    tokenizer = byte_bpe()
    before = len(tokenizer)
    tokens = StreamTokens.of(prepare_tokenizer(tokenizer))
    assert tokens.eos == tokens.bos == tokenizer.convert_tokens_to_ids("<|end|>")
    assert len(tokenizer) == before + 2, "<pad> and <v>"
    assert prepare_tokenizer(tokenizer) is tokenizer and len(tokenizer) == before + 2, "twice changes nothing"
    assert tokenizer("<v><v>", add_special_tokens=False)["input_ids"] == [tokens.vision] * 2


def test_a_merging_tokenizer_keeps_its_decision_tokens():
    tokenizer = prepare_tokenizer(byte_bpe())
    joined = tokenizer.encode("]\nAssistant:", add_special_tokens=False)
    tokens = StreamTokens.of(tokenizer)
    assert tokens.speak not in joined, "the case this is about: joined text has no separate ']'"
    assert tokenizer.decode([tokens.speak, *tokens.assistant]) == "]\nAssistant:"
    assert tokens.decode(tokens.narration("C opens the door")) == "C opens the door"


def test_decisions_must_be_single_tokens():
    core = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1, "]": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    with pytest.raises(ValueError, match="',' must be a single token"):
        prepare_tokenizer(tokenizer)
    assert len(tokenizer) == 3, "a refused tokenizer stays as it was"


def test_unprepared_tokenizers_are_refused():
    with pytest.raises(ValueError, match="call prepare_tokenizer"):
        StreamTokens.of(byte_bpe())


@pytest.mark.skipif(not STORIES.is_dir(), reason="the SentencePiece-like tokenizer (../shared/data) is not here")
def test_sentencepiece_style_tokenizer():
    tokenizer = prepare_tokenizer(AutoTokenizer.from_pretrained(STORIES))
    tokens = StreamTokens.of(tokenizer)
    assert tokenizer.convert_ids_to_tokens([tokens.silent, tokens.speak]) == [",", "]"]
    assert tokens.decode(tokens.narration("C lifts the container")) == "C lifts the container"
