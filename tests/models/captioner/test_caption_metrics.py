"""Caption scores equal the published ones, and those of COCO's own tools where these are installed."""

import importlib.util
import json

import pytest
from locations import SHARED_DATA as SHARED

from mmskip.models.captioner import metrics as scores
from mmskip.models.captioner.ptb import DROPPED, tokenize, tokenize_all

METRICS = SHARED / "caption_metrics"
needs_data = pytest.mark.skipif(not METRICS.is_dir(), reason="../shared/data/caption_metrics is not beside the tree")
needs_package = pytest.mark.skipif(
    importlib.util.find_spec("pycocoevalcap") is None, reason="the package pycocoevalcap is not installed"
)
needs_java = pytest.mark.skipif(scores.java_version() is None, reason="there is no Java on the path")


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A dog can't cannot.", "a dog ca n't can not"),
        ('A sign "Main St." near 5th Ave.', "a sign main st. near 5th ave."),
        (
            "The dog's t-shirt, 3 1/2 ft. tall (red/white)",
            "the dog 's t-shirt 3\u00a01/2 ft. tall -lrb- red/white -rrb-",
        ),
        ("It’s O'Brien's rock'n'roll at 10:30am!", "it 's o'brien 's rock 'n' roll at 10:30 am"),
        ("T.V. costs $1,000.50; café--bar...", "t.v. costs $ 1,000.50 café bar"),
        ("AT&T and m&m's, dog.cat.", "at&t and m & m 's dog.cat"),
        (" . ! \u200b", ""),
    ],
)
def test_tokens_are_those_of_cocos_tokenizer(caption: str, tokens: str) -> None:
    assert tokenize(caption) == [token for token in tokens.split(" ") if token]


def test_a_single_letter_at_the_end_depends_on_the_caption_behind_it() -> None:
    """COCO's tools tokenize all captions as one text."""
    assert tokenize_all(["a sign K.", "A man", "plan K.", "man"]) == [
        ["a", "sign", "k"],
        ["a", "man"],
        ["plan", "k."],
        ["man"],
    ]


def _published() -> list[tuple[str, dict[int, str], dict[int, list[str]], dict[str, float]]]:
    if not METRICS.is_dir():
        return []
    examples = json.loads((METRICS / "published_examples.json").read_text())
    nlg = examples["nlg_eval_example"]
    count = range(len(nlg["hypotheses"]))
    references = {i: [texts[i] for texts in nlg["references"]] for i in count}
    found = [("nlg_eval", {i: nlg["hypotheses"][i] for i in count}, references, nlg["published"])]
    for name in ("clipscore_good", "clipscore_bad"):
        one = examples[name]
        found.append((name, one["candidates"], one["references"], one["published"]))
    return found


@needs_data
@pytest.mark.parametrize("example", _published(), ids=lambda example: example[0])
def test_published_examples_to_their_printed_digits(example: tuple) -> None:
    _, captions, references, published = example
    totals = scores.score_captions(captions, references).totals
    for name in scores.NAMES:
        digits = len(str(published[name]).partition(".")[2])
        assert abs(totals[name] - published[name]) <= 0.5 * 10 ** -min(digits, 4) + 1e-9, name


@needs_data
@pytest.mark.parametrize("corpus", ["fakecap", "human_fifth_caption_vs_first_four"])
def test_corpus_references_set_by_set_and_caption_by_caption(corpus: str) -> None:
    reference = json.loads((METRICS / "coco_metric_reference.json").read_text())[corpus]
    items = dict(enumerate(reference["items"]))
    references = {index: item["references"] for index, item in items.items()}
    found = scores.score_captions({index: item["candidate"] for index, item in items.items()}, references)
    for name in scores.NAMES:
        assert found.totals[name] == pytest.approx(reference["scores"][name], abs=1e-6), name
    for index, item in items.items():
        for name in ("CIDEr", "ROUGE_L", "Bleu_4"):
            assert found.images[index][name] == pytest.approx(item[name], abs=1e-6), (index, name)


def _coco(images: int) -> dict[int, list[str]]:
    path = SHARED / "coco" / "captions_val2017_twothirds.json"
    texts: dict[int, list[str]] = {}
    for row in json.loads(path.read_text())["annotations"]:
        texts.setdefault(row["image_id"], []).append(row["caption"])
    return dict(list(texts.items())[:images])


@needs_data
@needs_package
@needs_java
def test_equals_pycocoevalcap_tokenizer_included_on_real_captions() -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    texts = _coco(520)
    captions = {image: texts_of[-1] for image, texts_of in texts.items()}
    references = {image: texts_of[:-1] for image, texts_of in texts.items()}
    ours = scores.score_captions(captions, references)
    tokenizer = PTBTokenizer()
    truth = tokenizer.tokenize({image: [{"caption": text} for text in row] for image, row in references.items()})
    said = tokenizer.tokenize({image: [{"caption": text}] for image, text in captions.items()})
    bleu, bleu_each = Bleu(4).compute_score(truth, said, verbose=0)
    parts = list(zip(scores.NAMES[:4], bleu, bleu_each, strict=True))
    parts += [(name, *tool.compute_score(truth, said)) for name, tool in (("ROUGE_L", Rouge()), ("CIDEr", Cider()))]
    for name, total, each in parts:
        assert ours.totals[name] == pytest.approx(total, abs=1e-6), name
        assert [row[name] for row in ours.images.values()] == pytest.approx(list(each), abs=1e-6), name


@needs_data
@needs_package
@needs_java
def test_tokens_equal_the_java_tokenizer_on_3500_coco_captions() -> None:
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS, PTBTokenizer

    assert set(PUNCTUATIONS) == DROPPED
    texts = _coco(700)
    tokenized = PTBTokenizer().tokenize({image: [{"caption": text} for text in row] for image, row in texts.items()})
    theirs = [line.split(" ") for row in tokenized.values() for line in row]
    ours = tokenize_all([text for row in texts.values() for text in row])
    assert len(ours) > 3400
    assert [pair for pair in zip(ours, theirs, strict=True) if pair[0] != pair[1]] == []


@needs_data
@needs_package
@needs_java
def test_meteor_runs_where_java_is() -> None:
    _, captions, references, published = _published()[0]
    assert scores.java_score("METEOR", captions, references)[0] == pytest.approx(published["METEOR"], abs=1e-5)


def test_java_scores_say_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "java_version", lambda: None)
    with pytest.raises(ValueError, match="METEOR runs in Java and there is none"):
        scores.check_java("METEOR")
    with pytest.raises(ValueError, match="expected one of METEOR, SPICE"):
        scores.check_java("ROUGE")
    monkeypatch.setattr(scores, "java_version", lambda: 17)
    monkeypatch.setattr(scores, "check_installed", lambda *names: None)
    with pytest.raises(ValueError, match="above 8 and this one is 17"):
        scores.check_java("SPICE")


def test_a_given_corpus_makes_cider_of_subsets_comparable() -> None:
    references = {1: ["a red cat sits"], 2: ["a dog runs"], 3: ["a red bus"]}
    captions = {1: "a red cat", 2: "a dog", 3: "a bus"}
    corpus = scores.DocumentFrequency.of(references)
    both = scores.score_captions(captions, references)
    one = scores.score_captions({1: captions[1]}, {1: references[1]}, corpus)
    assert one.totals["CIDEr"] == pytest.approx(both.images[1]["CIDEr"])
    assert both.images[1]["CIDEr"] > 0


def test_wordless_captions_score_nothing_and_bad_input_is_named() -> None:
    found = scores.score_captions({1: " . ", 2: "a dog"}, {1: ["a cat"], 2: ["a dog"]})
    assert {name: value for name, value in found.images[1].items() if value > 1e-6} == {}
    for captions, references, match in (
        ({1: "a"}, {1: ["a"], 2: ["b"]}, "no caption is given for 1 images \\(2\\)"),
        ({1: "a", 7: "b"}, {1: ["a"]}, "no references are given for 1 images \\(7\\)"),
        ({1: "a"}, {1: []}, "references is empty for 1 images \\(1\\)"),
        ({}, {}, "no references to score"),
        ({1: "a"}, {1: ["a"]}, "one image"),
    ):
        with pytest.raises(ValueError, match=match):
            scores.score_captions(captions, references)
