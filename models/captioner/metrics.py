"""Caption scores as COCO's evaluation takes them: BLEU-1..4, ROUGE-L, CIDEr-D; with Java, METEOR and SPICE.

| score | of a caption against its references |
|---|---|
| Bleu_n | geometric mean of clipped precisions of 1- to n-grams, times a brevity penalty (closest reference length) |
| ROUGE_L | F-score (beta 1.2) of the longest common subsequence, best precision and best recall over the references |
| CIDEr | CIDEr-D: TF-IDF cosine of 1- to 4-grams, clipped, with a Gaussian length penalty (sigma 6), times 10 |

BLEU of a set is taken over its summed counts, the others are means over images. CIDEr's inverse document frequencies
come from the references that are given: scores of subsets are not comparable with each other unless one
`DocumentFrequency` is used for all. Sources: Papineni et al. 2002, Lin 2004, Vedantam et al. 2015 (arXiv 1411.5726),
Chen et al. 2015 (arXiv 1504.00325).
"""

import importlib
import math
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmskip.models.captioner.ptb import tokenize_all
from mmskip.utils.extras import check_installed

ORDERS = 4
NAMES = (*(f"Bleu_{n}" for n in range(1, ORDERS + 1)), "ROUGE_L", "CIDEr")
JAVA_NAMES = ("METEOR", "SPICE")
BETA, SIGMA = 1.2, 6.0
_SMALL, _TINY = 1e-9, 1e-15  # COCO's guards against division by zero; they show in the ninth digit

Tokens = Sequence[str]
Grams = Counter[tuple[str, ...]]


@dataclass(frozen=True)
class CaptionScores:
    """Scores of a set of captions.

    Attributes:
        totals: name of the score -> over all captions.
        images: image -> name -> score of its caption alone.
        caption_tokens, reference_tokens: summed lengths BLEU's brevity penalty compares.
    """

    totals: dict[str, float]
    images: dict[Any, dict[str, float]]
    caption_tokens: int
    reference_tokens: int


@dataclass(frozen=True)
class DocumentFrequency:
    """In the references of how many images each n-gram (n up to 4) stands.

    Attributes:
        counts: n-gram -> images.
        images: in all.
    """

    counts: Mapping[tuple[str, ...], int]
    images: int

    @classmethod
    def of(cls, references: Mapping[Any, Sequence[str]]) -> "DocumentFrequency":
        """Count the n-grams of a corpus: image -> its captions."""
        return cls.of_tokens(list(_tokenized(references).values()))

    @classmethod
    def of_tokens(cls, references: Sequence[Sequence[Tokens]]) -> "DocumentFrequency":
        """Count the n-grams of tokenized captions."""
        counts = Counter(gram for captions in references for gram in {g for tokens in captions for g in _grams(tokens)})
        return cls(counts, len(references))


def score_captions(
    captions: Mapping[Any, str],
    references: Mapping[Any, Sequence[str]],
    frequency: DocumentFrequency | None = None,
) -> CaptionScores:
    """BLEU-1..4, ROUGE-L and CIDEr-D of one caption per image.

    Args:
        captions: image -> caption. One without any word scores 0.
        references: image -> at least one caption, for the same images. Their order is the one COCO's evaluation would
            tokenize in (see `tokenize`).
        frequency: of another corpus, for CIDEr; None: of these references.

    Raises:
        ValueError: no images; images on one side only; an image without references; one image alone without
            `frequency` (all of CIDEr's weights are then log 1 = 0).
    """
    _check(captions, references)
    if frequency is None and len(references) < 2:
        raise ValueError("CIDEr weighs words by the images they stand at and got one image; give `frequency` as well.")
    tokens = _tokenized(references)
    said = dict(zip(references, tokenize_all([captions[image] for image in references]), strict=True))
    weights = _Weights(frequency or DocumentFrequency.of_tokens(list(tokens.values())))
    total = BleuCounts()
    images: dict[Any, dict[str, float]] = {}
    for image, known in tokens.items():
        counts = bleu_counts(said[image], known)
        total = total + counts
        scores = dict(zip(NAMES, counts.scores(), strict=False))
        images[image] = scores | {"ROUGE_L": rouge_l(said[image], known), "CIDEr": weights.cider(said[image], known)}
    totals = dict(zip(NAMES, total.scores(), strict=False))
    totals |= {name: math.fsum(scores[name] for scores in images.values()) / len(images) for name in NAMES[ORDERS:]}
    return CaptionScores(totals, images, total.length, total.reference)


def _check(captions: Mapping[Any, str], references: Mapping[Any, Sequence[str]]) -> None:
    if not references:
        raise ValueError("there are no references to score against.")
    for fault, names in (
        ("no caption is given", references.keys() - captions.keys()),
        ("no references are given", captions.keys() - references.keys()),
        ("the list of references is empty", {image for image, texts in references.items() if not texts}),
    ):
        if names:
            some = ", ".join(sorted(map(str, names))[:5])
            raise ValueError(f"{fault} for {len(names)} images ({some}{', ...' if len(names) > 5 else ''}).")


def _tokenized(references: Mapping[Any, Sequence[str]]) -> dict[Any, list[list[str]]]:
    tokens = iter(tokenize_all([text for texts in references.values() for text in texts]))
    return {image: [next(tokens) for _ in texts] for image, texts in references.items()}


def _grams(tokens: Tokens) -> Grams:
    """Counts of all n-grams, n = 1..4."""
    return Counter(tuple(tokens[i : i + n]) for n in range(1, ORDERS + 1) for i in range(len(tokens) - n + 1))


# --- BLEU -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BleuCounts:
    """The counts BLEU is computed from; those of a set are the sums over its captions.

    Attributes:
        right: n-grams that stand in a reference, clipped, for n = 1..4.
        given: n-grams of the caption.
        length: tokens of the caption.
        reference: tokens of the reference of the closest length.
    """

    right: tuple[int, ...] = (0,) * ORDERS
    given: tuple[int, ...] = (0,) * ORDERS
    length: int = 0
    reference: int = 0

    def __add__(self, other: "BleuCounts") -> "BleuCounts":
        return BleuCounts(
            tuple(a + b for a, b in zip(self.right, other.right, strict=True)),
            tuple(a + b for a, b in zip(self.given, other.given, strict=True)),
            self.length + other.length,
            self.reference + other.reference,
        )

    def scores(self) -> list[float]:
        """Bleu_1 to Bleu_4."""
        ratio = (self.length + _TINY) / (self.reference + _SMALL)
        brevity = math.exp(1 - 1 / ratio) if ratio < 1 and self.length else float(ratio >= 1)
        product, found = 1.0, []
        for n, (right, given) in enumerate(zip(self.right, self.given, strict=True), 1):
            product *= (right + _TINY) / (given + _SMALL)
            found.append(product ** (1 / n) * brevity)
        return found


def bleu_counts(tokens: Tokens, references: Sequence[Tokens]) -> BleuCounts:
    """The counts of one caption."""
    most: Grams = Counter()
    for reference in references:
        most |= _grams(reference)
    right = [0] * ORDERS
    for gram, count in (_grams(tokens) & most).items():
        right[len(gram) - 1] += count
    given = tuple(max(0, len(tokens) - n) for n in range(ORDERS))
    closest = min((abs(len(reference) - len(tokens)), len(reference)) for reference in references)[1]
    return BleuCounts(tuple(right), given, len(tokens), closest)


# --- ROUGE-L and CIDEr-D --------------------------------------------------------------------------------------------


def rouge_l(tokens: Tokens, references: Sequence[Tokens]) -> float:
    """ROUGE-L of one caption."""
    if not tokens:
        return 0.0
    common = [_common_subsequence(tokens, reference) for reference in references]
    precision = max(common) / len(tokens)
    recall = max(n / max(1, len(reference)) for n, reference in zip(common, references, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _common_subsequence(one: Tokens, other: Tokens) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for token in one:
        corner = 0
        for j, word in enumerate(other, 1):
            corner, row[j] = row[j], corner + 1 if token == word else max(row[j], row[j - 1])
    return row[-1]


class _Weights:
    """TF-IDF vectors of captions."""

    def __init__(self, frequency: DocumentFrequency) -> None:
        self.counts, self.log_images = frequency.counts, math.log(frequency.images)

    def _vector(self, tokens: Tokens) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        """Weights by n, their lengths by n, and the number of 2-grams, which the length penalty compares."""
        vector: list[dict[tuple[str, ...], float]] = [{} for _ in range(ORDERS)]
        for gram, count in _grams(tokens).items():
            vector[len(gram) - 1][gram] = count * (self.log_images - math.log(max(1, self.counts.get(gram, 0))))
        return vector, [math.hypot(*part.values()) for part in vector], max(0, len(tokens) - 1)

    def cider(self, tokens: Tokens, references: Sequence[Tokens]) -> float:
        """CIDEr-D of one caption."""
        said, said_norms, said_length = self._vector(tokens)
        total = 0.0
        for reference in references:
            wanted, wanted_norms, wanted_length = self._vector(reference)
            penalty = math.exp(-((said_length - wanted_length) ** 2) / (2 * SIGMA**2))
            norms = [a * b for a, b in zip(said_norms, wanted_norms, strict=True)]
            for mine, theirs, norm in zip(said, wanted, norms, strict=True):
                if norm:
                    product = sum(min(mine[gram], theirs[gram]) * theirs[gram] for gram in mine.keys() & theirs.keys())
                    total += penalty * product / norm
        return 10 * total / ORDERS / len(references)


# --- scores that run in Java ----------------------------------------------------------------------------------------


def java_version() -> int | None:
    """Major version of the Java on the path (8 for 1.8); None: there is none."""
    if shutil.which("java") is None:
        return None
    printed = subprocess.run(["java", "-version"], capture_output=True, text=True, check=False).stderr
    found = re.search(r'version "(?:1\.)?(\d+)', printed)
    return int(found[1]) if found else None


def check_java(name: str) -> None:
    """Raise ValueError, with the reason, where METEOR or SPICE cannot run here."""
    if name not in JAVA_NAMES:
        raise ValueError(f"the score is {name!r}; expected one of {', '.join(JAVA_NAMES)}.")
    version = java_version()
    if version is None:
        raise ValueError(f"{name} runs in Java and there is none on the path; install Java 8 or omit {name}.")
    check_installed("coco", "pycocoevalcap", name)
    if name == "SPICE" and version > 8:
        raise ValueError(f"SPICE fails on every Java above 8 and this one is {version}; omit SPICE.")


def java_score(
    name: str, captions: Mapping[Any, str], references: Mapping[Any, Sequence[str]]
) -> tuple[float, dict[Any, float]]:
    """METEOR or SPICE of the set, and of each image. (SPICE's own package fetches its parser on the first call.)

    Raises:
        ValueError: as `check_java` and `score_captions`.
    """
    check_java(name)
    _check(captions, references)
    module = importlib.import_module(f"pycocoevalcap.{name.lower()}.{name.lower()}")
    truth = {image: [" ".join(tokens) for tokens in texts] for image, texts in _tokenized(references).items()}
    said = _tokenized({image: [captions[image]] for image in references})
    total, parts = getattr(module, name.capitalize())().compute_score(
        truth, {image: [" ".join(texts[0])] for image, texts in said.items()}
    )
    values = [part["All"]["f"] if isinstance(part, dict) else float(part) for part in parts]
    return float(total), dict(zip(truth, values, strict=True))
