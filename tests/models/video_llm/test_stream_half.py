"""Streams in half precision beside the offline forward under their recorded selections."""

import pytest
import torch
from memorised import ARCHITECTURES, memorised, samples
from streams import HEAD, MOD, tiny_narrator, video

from common.stream_exactness import compare
from mmskip.hf.streaming.cache import StreamCache
from mmskip.models.video_llm.streaming.engine import StreamEngine
from mmskip.models.video_llm.streaming.settings import StreamSettings

THRESHOLD = 0.05
VIDEOS = [given["features"] for given in samples()]
SAID = {"red circle enters", "blue square leaves", "green star hides now", "red star"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bfloat16_streams_say_word_for_word_what_the_offline_forward_says(name):
    """One stream or several of a batch, at every chunk size, and after save and restore in the middle."""
    model = memorised(name)
    for chunk, streams, reopen_after in ((1, 1, None), (1, 3, 9), (2, 3, None), (5, 3, 4)):
        settings = StreamSettings(chunk=chunk, max_new_tokens=12)
        found = compare(model, VIDEOS[:streams], HEAD, settings, reopen_after=reopen_after)
        assert found.choices >= 15 * streams
        assert not found.different
        assert found.compared >= 2 * sum(map(len, VIDEOS[:streams]))
        assert found.flipped < 0.2 * found.compared


def test_bfloat16_streams_say_what_was_learned_and_go_on_bit_for_bit_after_a_restore():
    model, expected = memorised("llama"), samples()
    settings = StreamSettings(max_new_tokens=12)
    for stop in (5, 15):
        running = StreamEngine(model, VIDEOS[0].shape[1], settings, [HEAD] * 3)
        for number, features in enumerate(VIDEOS):
            running.push(features, number)
        said = [text for _ in range(stop) for text in running.step()]
        again = StreamEngine(model, VIDEOS[0].shape[1], settings, [[]] * 3)
        again.restore(*running.state())
        rest = again.run()
        assert rest == running.run()
        assert torch.equal(again.cache.layers[1].keys, running.cache.layers[1].keys)
        frames = {(text.stream, text.frame) for text in said + rest}
        assert frames == {(row, turn.frames[1] - 1) for row, sample in enumerate(expected) for turn in sample["turns"]}


@pytest.mark.parametrize("methods", [(), (MOD,)])
def test_what_differs_in_bfloat16_is_a_near_tie(methods):
    """A wrong position, mask or gate would move logits by much more than rounding does."""
    for dtype, steps in (("float32", 0), ("bfloat16", 8)):
        model = tiny_narrator(methods, seed=4, llm_dtype=dtype)
        for seed in range(3):
            found = compare(
                model, [video(14, seed)], HEAD, StreamSettings(threshold=THRESHOLD, chunk=3, max_new_tokens=5)
            )
            assert found.choices > 13 and (found.compared > 0) == bool(methods)
            assert all(item.margin <= steps * item.resolution for item in found.different)
            assert found.largest < (0.5 if steps else 1e-4)
            assert steps or not found.different


def test_a_stream_that_computes_something_else_is_reported(monkeypatch):
    """The comparison itself can fail: positions shifted by one in the stream alone."""
    model = tiny_narrator((MOD,), seed=4)
    begin = StreamCache.begin

    def shifted(self, layout, lengths, dtype):
        announced = begin(self, layout, lengths, dtype)
        places = announced["position_ids"]
        return announced | {"position_ids": places + (places > 20)}

    monkeypatch.setattr(StreamCache, "begin", shifted)
    found = compare(model, [video(14)], HEAD, StreamSettings(threshold=THRESHOLD, max_new_tokens=5))
    assert found.largest > 1e-2
    with pytest.raises(ValueError, match="omit it"):
        compare(model, [video(2)], HEAD, StreamSettings(window=20))
