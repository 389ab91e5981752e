"""Penn Treebank tokens of captions as COCO's evaluation defines them, without Java.

COCO's scores are taken on the lower-cased tokens of Stanford's English tokenizer of 2014 (CoreNLP 3.4.1) without
punctuation. `tokenize` gives the same tokens by other rules, found by comparing outputs: at each place the longest
rule wins, the earlier one of equally long ones. Rare symbols beyond Latin text may differ.
"""

import re
import unicodedata
from collections.abc import Sequence

DROPPED = frozenset(("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", *".?!,:;-", "--", "..."))
"""Punctuation, as COCO's evaluation defines it. Brackets are lower-cased before and so stay, as "-lrb-"."""

_NUMERALS = "\u00b2\u00b3\u00b9\u00bc-\u00be\u2070-\u2079\u2080-\u2089\u2150-\u2189\u2460-\u24ff\u2776-\u2793"
_L = rf"(?:(?![{_NUMERALS}])[^\W\d_]|[\u00ad\u0300-\u036f])"  # a letter
_A = rf"(?:{_L}|\d)"  # a letter or digit
_Q = "['\u2019\u0092]"  # an apostrophe
_QG = "['\u2019\u0092`]"  # one in the middle of a word
_AUX = rf"(?:'(?:[msd]|re|ve|ll)(?!{_L})|[\u2019\u0092](?:[msd]|re|ve|ll))"
_NUM = r"(?:\d*(?:[.:,]\d+)+|\d+)"
_WORD = rf"{_L}{_A}*(?:[.!?]{_L}{_A}*)*"
_PART = rf"(?:(?:[dolDOL]|[A-Z]){_QG}{_L}{{2}}{_A}*|{_A}+)"
_HYPHENED = rf"(?:{_PART}|{_A}(?:{_A}|[.,])*)(?:[-_]{_PART})+"
_SLASHED = r"[A-Za-z0-9]+(?:-[A-Za-z]+)*"

_ANY_CASE = (
    "jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri ala ariz calif colo conn ct dak "
    "fla ga ind kans? ky md mich minn mo mont neb nev okla penn tenn va vt wisc? wyo mr mrs ms drs? profs? sens? reps? "
    "attys? lt col gen messrs govs? adm rev maj sgt cpl pvt mt capt ste? ave pres lieut hon brig co?mdr pfc spc supts? "
    "det mlle mme insp jr sr bros blvd rd esq ph\\.d ed\\.d inc cos? corp ltd plc bancorp dept bhd assn univ intl natl "
    "sys mfg bldg etc al seq est ext sq tel vs? cf ft"
)
_CAPITAL = "Ark Az Del Ill La Mass Miss Ore Pa Tex Wash"  # separate words in small letters
_NUMBERED = "nos? art figs? pp?"
_SPLIT_IN_TWO = (("can", "not"), ("gon", "na"), ("got", "ta"), ("lem", "me"), ("gim", "me"), ("wan", "na"))
_OPENERS = (
    "A About According Additionally After An As At But Earlier He Her Here However If In It Last Many More Mr Ms Now "
    "Once One Other Our She Since So Some Such That The Their Then There These They This We What When While Yet You"
)
_PHONE = (
    r"(?:\(\d{2,3}\)[ \u00a0]?|(?:\+\+?)?(?:\d{2,4}[- \u00a0])?\d{2,4}[- \u00a0])\d{3,4}[- \u00a0]?\d{3,5}"
    r"|(?:(?:\+\+?)?\d{2,4}\.)?\d{2,4}\.\d{3,4}\.\d{3,5}"
)


def _any_of(words: str) -> str:
    return "(?:" + "|".join(words.split()) + ")"


def _table() -> list[tuple[str, str, int]]:
    """Return patterns of tokens, of what follows (which counts for the length, but is not taken), and flags."""
    i = re.IGNORECASE
    return [
        *((first, second, i) for first, second in _SPLIT_IN_TWO),
        ("'t", "(?:is|was)", i),
        (rf"{_L}+", rf"n{_QG}t", i),
        (rf"n{_QG}t", "", i),
        (_AUX, "", i),
        *((word, _AUX, i) for word in (_WORD, _HYPHENED, rf"{_A}+")),
        (rf"(?:{_HYPHENED}|{_WORD}|{_A}+)\.", "[,;:]", 0),
        (_WORD, "", 0),
        (rf"{_A}+", "", 0),
        (_HYPHENED, "", 0),
        (rf"(?:{_A}(?:{_A}|[.,])*(?:[-_]{_PART})*-)(?:[A-Za-z]\.){{2,}}", "", 0),
        (rf"{_SLASHED}(?:/{_SLASHED}){{1,2}}", "", 0),
        (r"\d{1,2}/\d{1,2}/\d{2,4}", "", 0),
        # apostrophes inside of words
        (rf"{_Q}n{_Q}", "", i),
        (rf"{_Q}(?:n|em|till?|cause)", rf"(?!{_L})", i),
        (rf"{_Q}[2-9]0s", rf"(?!{_A})", i),
        (rf"{_Q}\d\d", r"(?=\s|$)", 0),
        (rf"[ldj]{_Q}|(?:ol|dunkin|somethin){_Q}(?!{_L})", "", i),
        (rf"y{_Q}", "(?:all|know)", i),
        (rf"(?:[dolDOL]|[A-HJ-XZn]){_QG}{_L}{{2}}{_A}*", "", 0),
        (rf"{_L}{_L}*[aeiouyAEIOUY]{_QG}[aeiouA-Z]{_L}*", "", 0),
        (rf"(?:e{_Q}er|c{_Q}mon|ev{_Q}ry|li{_Q}l|nor{_Q}easter|s{_Q}mores|nat{_Q}l)", "", i),
        # abbreviations
        (r"[A-Za-z]", rf"\.\s+{_any_of(_OPENERS)}\s", 0),
        (r"[A-Za-z](?:\.[A-Za-z])*\.", "", 0),
        (rf"{_any_of(_ANY_CASE)}\.", "", i),
        (rf"{_any_of(_CAPITAL)}\.", "", 0),
        (rf"{_any_of(_NUMBERED)}\.", r"\s?\d", i),
        # numbers and money
        (rf"[-+]?{_NUM}", "", 0),
        (r"(?:\d{1,4}[- ])?\d{1,4}/\d{1,4}", "", 0),
        (_PHONE, "", 0),
        (r"[A-Z]{1,2}\$", r"\d", 0),
        # names, addresses, signs
        (r"[A-Z]+(?:(?:[+&]|&amp;)[A-Z]+)+", "", 0),
        (r"[cC]\+\+|[cfCF]#", "", 0),
        (rf"#{_L}+|@[A-Za-z_][A-Za-z0-9_]*", "", 0),
        (r"https?://[^\s\"<>|(){}]+[^\s\"<>|.!?(){},-]", "", i),
        (r"[A-Za-z0-9][^\s\"<>|(){}]*@(?:[^\s\"<>|(){}.]+\.)*[^\s\"<>|(){}.]+", "", 0),
        (
            rf"(?:www\.(?:[^\s\"<>|.!?(){{}},]+\.)+[a-z]{{2,4}}|(?:{_L}+\.)+(?:com|net|org|edu))"
            r"(?:/[^\s\"<>|()]+[^\s\"<>|.!?(){},-])?",
            "",
            i,
        ),
        (r"</?[A-Za-z!?][^>\s]*>", "", 0),
        (r"[<>]?[:;=][-o*']?[()DPpO\\{@|\[\]](?![A-Za-z])|[<>]?:[03]", "", 0),
        (r"\^_\^|-_-|>_<|[~0]_[~0]", "", 0),
        (r"[?!]+|\.{3,5}|-{2,}|#+|\*+|_+|@@|<<|>>", "", 0),
        (r"&(?:amp|lt|gt|quot|nbsp|mdash);|&#\d+;|&[aeiou](?:acute|grave|uml);", "", i),
        (rf"{_QG}{{2}}|``|\u2018\u2018", "", 0),
    ]


_RULES = [
    re.compile(f"(?P<token>{token})(?={f'(?P<ahead>{ahead})' if ahead else ''})", flag)
    for token, ahead, flag in _table()
]
_PLAIN = re.compile(r"[A-Za-z]{2,}(?=\s|$|, |\.(?:\n|$))")
_ABBREVIATED = re.compile(f"(?i:{_any_of(_ANY_CASE)})|{_any_of(_CAPITAL)}")
_JOINED = frozenset(first + second for first, second in _SPLIT_IN_TWO)
_SAME = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
    "\u00a2": "cents", "\u00a3": "#", "\u20ac": "$", "\u0080": "$", "\u00a4": "$", "\u20a0": "$",
    "\u00bc": "1/4", "\u00bd": "1/2", "\u00be": "3/4", "\u2153": "1/3", "\u2154": "2/3",
    "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": "''", "&nbsp;": "''", "&mdash;": "--",
}  # fmt: skip
_QUOTES = frozenset("\"'`\u2018\u2019\u201b\u201c\u201d\u00ab\u00bb\u2039\u203a\u0091\u0092\u0093\u0094")
_DASHES = frozenset("\u00ad\u2013\u2014\u2015\u2026\u0085\u0096\u0097")


def tokenize(caption: str, following: str = "") -> list[str]:
    """Lower-cased tokens of one caption without punctuation.

    Args:
        caption: text; line breaks count as spaces.
        following: the caption that follows it in COCO's evaluation, which gives all captions to the tokenizer as
            one text: after a single letter ("sign K.") the full stop is a part of the token unless the next sentence
            opens with a word such as "The".
    """
    text = f"{_one_line(caption)}\n{_one_line(following)[:20]} "
    end = text.index("\n")
    tokens: list[str] = []
    at = 0
    while at < end:
        plain = _PLAIN.match(text, at)
        if (
            plain
            and plain[0].lower() not in _JOINED
            and not (text[plain.end()] == "." and _ABBREVIATED.fullmatch(plain[0]))
        ):
            tokens.append(plain[0].lower())
            at = plain.end()
        elif text[at].isspace():
            at += 1
        else:
            token = _longest(text, at)
            at += len(token)
            tokens.extend(_written(token))
    return tokens


def tokenize_all(captions: Sequence[str]) -> list[list[str]]:
    """`tokenize` for captions in the order in which COCO's evaluation reads them."""
    return [tokenize(caption, following) for caption, following in zip(captions, [*captions[1:], ""], strict=True)]


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\r", " ")


def _longest(text: str, at: int) -> str:
    """The token at a place: that of the longest rule, or one character."""
    best, length = text[at], 1
    for rule in _RULES:
        found = rule.match(text, at)
        if found:
            reach = len(found["token"]) + len(found.groupdict().get("ahead") or "")
            if reach > length:
                best, length = found["token"], reach
    return best


def _written(token: str) -> list[str]:
    """A token as COCO's evaluation writes it; none where it drops it."""
    if len(token) == 1:
        if token in _QUOTES or token in _DASHES or _is_dropped(token):
            return []
    elif set(token) <= _QUOTES or set(token) <= {"."} or set(token) == {"-"}:
        return []
    text = _SAME.get(token.lower())
    if text is None:
        text = token.replace("\u00ad", "").replace("&amp;", "&").lower()
        if any(mark in text for mark in "()[]{}"):
            text = "".join(_SAME.get(mark, mark) if mark in "()" else mark for mark in text)
        text = re.sub(rf"^{_Q}(?=(?:[msd]|re|ve|ll|s)$)", "'", text)
        text = re.sub(rf"^n{_Q}t$", "n't", text).replace(" ", "\u00a0")
    return [] if text in DROPPED else [text]


def _is_dropped(mark: str) -> bool:
    """Whether the tokenizer drops a character: controls, invisible ones, emoji beyond the basic plane."""
    return ord(mark) > 0xFFFC or unicodedata.category(mark) in ("Cc", "Cf", "Cn", "Co", "Cs")
