"""Tiny narrating models, and what an offline forward says of a streamed text."""

import copy

import torch
from naive_stream import naive_stream_logits
from narration_data import FEATURES, FPS, LLAMA, TOKENS, stream_tokens, token_ids

import mmskip
from mmskip.models.video_llm.module import VideoLLM
from mmskip.models.video_llm.speaking import speaks
from mmskip.models.video_llm.streaming.engine import StreamEngine
from mmskip.models.video_llm.streaming.settings import StreamSettings

MOD = mmskip.MoDConfig(keep=0.4, gate="sigmoid")
HEAD = [stream_tokens().bos]
QUESTION = [*stream_tokens().narration("blue square now")[:-1]]


def tiny_narrator(methods=(), seed: int = 0, **kwargs) -> VideoLLM:
    """A model with large random weights, whose outputs differ from token to token."""
    torch.manual_seed(seed)
    kwargs = {"llm": LLAMA, "feature_dim": FEATURES, "fps": FPS, "tokens": token_ids().to_dict()} | kwargs
    model = VideoLLM(methods=list(methods), **kwargs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("mmskip" in name or parameter.ndim > 1):
                parameter.add_(torch.randn_like(parameter) * 0.3)
        # so that the silent token is at some frames the likeliest of all, and at others not
        model.llm.lm_head.weight[model.ids.silent] *= 4
    return model.eval()


def video(frames: int, seed: int = 0) -> torch.Tensor:
    """Features [F, N, C] that differ from frame to frame."""
    return torch.randn(frames, TOKENS, FEATURES, generator=torch.Generator().manual_seed(seed))


def engine(model: VideoLLM, streams: int = 1, **settings) -> StreamEngine:
    """An engine with short texts."""
    return StreamEngine(model, TOKENS, StreamSettings(**{"max_new_tokens": 5} | settings), [HEAD] * streams)


class Transcript:
    """The token sequence of one stream, and what was decided where.

    Attributes:
        ids, layout: of the whole stream.
        decisions: (index of a frame's last token, whether the model spoke there).
        words: (index of the predicting token, the token it chose).
    """

    def __init__(self, model: VideoLLM, frames: int, said, questions=(), limit: int = 5) -> None:
        self.ids, self.layout = list(HEAD), [-1] * len(HEAD)
        self.decisions: list[tuple[int, bool]] = []
        self.words: list[tuple[int, int]] = []
        self._limit, own, opened = limit, model.ids, False
        for frame in range(-1, frames):
            if frame >= 0:
                self._write([own.silent] if opened else own.open)
                self.ids += [0] * TOKENS
                self.layout += [frame] * TOKENS
                opened = True
            now = [item for item in said if item.frame == frame]
            asked = any(item.question is not None for item in now)
            if frame > 0 and not asked:
                self.decisions.append((len(self.ids) - 1, bool(now)))
            for item in now:
                self._write([own.speak] if opened else [])
                self._write([] if item.question is None else questions[item.question])
                self._text([*own.assistant], item.tokens, own.eos)
                opened = False

    def _write(self, ids) -> None:
        self.ids += ids
        self.layout += [-1] * len(ids)

    def _text(self, lead, tokens, eos) -> None:
        self._write(lead)
        chosen = list(tokens) if len(tokens) == self._limit else [*tokens, eos]
        self.words += [(len(self.ids) - 1 + index, token) for index, token in enumerate(chosen)]
        self._write([*tokens, eos])

    def offline_logits(self, model: VideoLLM, features, window=None, sinks: int = 0, bases=None) -> torch.Tensor:
        """Logits [T, V] of the naive full forward."""
        base = mmskip.remove_(copy.deepcopy(model.llm))
        blocks = enumerate(model.llm.get_decoder().layers)
        routers = {index: b.mmskip_router.weight for index, b in blocks if hasattr(b, "mmskip_router")}
        layout = torch.tensor(self.layout)
        with torch.no_grad():
            embeds = model.embed(torch.tensor([self.ids]), layout[None], features)[0]
            return naive_stream_logits(base, routers, embeds, layout, 0.4, "sigmoid", window, sinks, bases)

    def check(self, model: VideoLLM, features, threshold: float, **how) -> None:
        """The offline forward decides and chooses the same everywhere."""
        logits = self.offline_logits(model, features, **how)
        for index, spoke in self.decisions:
            assert bool(speaks(logits[index], model.ids.silent, threshold)) == spoke, index
        for index, token in self.words:
            assert int(logits[index].argmax()) == token, index
