"""One self-contained HTML page of a watched stream: frames with dropped tokens greyed by block, and what was said.

Shapes: F frames, N vision tokens per frame, G grid side with N = G * G or 1 + G * G, L blocks.
"""

import base64
import html
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np
from PIL import Image

from mmskip.viz.figure import HIGHLIGHT, INK, LINE, RAN, SKIPPED

THUMBNAIL = 224
QUALITY = 72


def thumbnail(frame: np.ndarray, side: int = THUMBNAIL) -> str:
    """Encode a frame, uint8 [H, W, 3], as a small JPEG in a data URL."""
    image = Image.fromarray(frame)
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def grid_of(tokens: int) -> int:
    """G of N vision tokens; 0 where they form no square grid, with or without CLS."""
    for count in (tokens, tokens - 1):
        side = math.isqrt(count)
        if side and side * side == count:
            return side
    return 0


def stream_page(
    title: str,
    pictures: Mapping[int, str],
    times_s: Sequence[float],
    kept: Mapping[int, Mapping[str, Any]],
    tokens: int,
    spoken: Sequence[Mapping[str, Any]],
    figures: Sequence[tuple[str, str]],
) -> str:
    """Build the page.

    Args:
        title: of the video.
        pictures: data URLs by frame index, from `thumbnail`; frames without one are not shown.
        times_s: [F], seconds.
        kept: by frame index, by block: which of the N tokens it processed (any sequence of truth values); a frame
            without an entry kept all.
        tokens: N.
        spoken: dicts with `time_s`, `frame`, `text` and `question` (None: unprompted).
        figures: (name, value) pairs for the table.

    Returns:
        HTML that needs no other file.
    """
    blocks = sorted({site for frame in kept.values() for site in frame}, key=_number)
    shown = sorted(pictures)
    data = {
        "frames": [
            {
                "t": round(times_s[i], 3),
                "i": i,
                "p": pictures[i],
                "k": [_bits(kept.get(i, {}).get(block), tokens) for block in blocks],
            }
            for i in shown
        ],
        "blocks": blocks,
        "tokens": tokens,
        "grid": grid_of(tokens),
        "end": round(float(times_s[-1]), 3) if len(times_s) else 0,
        "said": [{"t": s["time_s"], "i": s["frame"], "x": s["text"], "q": s.get("question")} for s in spoken],
    }
    rows = "".join(f"<tr><th>{html.escape(n)}</th><td>{html.escape(v)}</td></tr>" for n, v in figures)
    values = {
        "TITLE": html.escape(title),
        "ROWS": rows,
        # a text must not be able to end the script it stands in, nor to open a comment or a script in it
        "DATA": json.dumps(data, allow_nan=False).replace("<", "\\u003c"),
        "RAN": RAN,
        "SKIPPED": SKIPPED,
        "INK": INK,
        "LINE": LINE,
        "HIGHLIGHT": HIGHLIGHT,
    }
    page = resources.files("mmskip.viz").joinpath("stream_page.html").read_text(encoding="utf-8")
    return re.sub("__([A-Z]+)__", lambda found: values[found[1]], page)


def _number(site: str) -> tuple[int, str]:
    digits = "".join(c for c in site if c.isdigit())
    return int(digits or 0), site


def _bits(kept: Any, tokens: int) -> str:
    return "1" * tokens if kept is None else "".join("1" if value else "0" for value in kept)
