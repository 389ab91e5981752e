"""Streams that are saved go on as if nothing had happened, and in half precision as recorded."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file
from streams import MOD, QUESTION, Transcript, engine, tiny_narrator, video

import mmskip
from mmskip.models.video_llm.speaking import speaks
from mmskip.models.video_llm.streaming.state import load_streams, save_streams
from mmskip.replay import Selections, replaying

THRESHOLD = 0.05
BOUNDED = {"window": 23, "sinks": 3, "positions": "rolling", "position_range": 90}


@pytest.mark.parametrize("methods", [(), (MOD,)])
@pytest.mark.parametrize("settings", [{}, BOUNDED, {"temperature": 1.2, "chunk": 2}])
def test_saved_in_the_middle_and_restored_streams_go_on_as_if_nothing_had_happened(tmp_path, methods, settings):
    model = tiny_narrator(methods, seed=4)
    videos = [video(16, seed) for seed in range(2)]

    def begin():
        running = engine(model, 2, threshold=THRESHOLD, **settings)
        for number, features in enumerate(videos):
            running.push(features, number)
        running.ask(QUESTION, 1)
        return running

    uninterrupted = begin()
    expected = uninterrupted.run()
    stopped, said = begin(), []
    for _ in range(9):  # in the middle of frames, texts and questions
        said += stopped.step()
    save_streams(stopped, tmp_path / "deep" / "streams.safetensors")
    again = load_streams(model, tmp_path / "deep" / "streams.safetensors")
    said += again.run()
    assert said == expected
    assert again.cache.totals == uninterrupted.cache.totals
    assert again.cache.stored_bytes == uninterrupted.cache.stored_bytes
    assert os.listdir(tmp_path / "deep") == ["streams.safetensors"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": [mmskip.MoDConfig(keep=0.8)]}, r"methods=.*0\.4.*0\.8"),
        ({"seed": 5}, "weights"),
        ({"llm_dtype": "bfloat16"}, "llm_dtype='float32'.*'bfloat16'"),
    ],
)
def test_streams_of_another_model_are_refused(tmp_path, change, message):
    running = engine(tiny_narrator((MOD,), seed=4))
    running.push(video(3))
    running.run()
    save_streams(running, tmp_path / "streams.safetensors")
    other = tiny_narrator(**{"methods": (MOD,), "seed": 4} | change)
    with pytest.raises(ValueError, match=message):
        load_streams(other, tmp_path / "streams.safetensors")


def test_other_files_are_refused(tmp_path):
    model = tiny_narrator()
    (tmp_path / "text").write_text("no tensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "tensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "newer", {"mmskip_streams": json.dumps({"format": 99})})
    for name, message in (("none", "none: not a file"), ("text", "not a file"), ("tensors", "not a file")):
        with pytest.raises(ValueError, match=message):
            load_streams(model, tmp_path / name)
    with pytest.raises(ValueError, match="format 99"):
        load_streams(model, tmp_path / "newer")


# --- half precision -------------------------------------------------------------------------------------------------


def offline(model, transcript, features):
    layout = torch.tensor([transcript.layout])
    with torch.no_grad():
        embeds = model.embed(torch.tensor([transcript.ids]), layout, features).to(model.llm.dtype)
        return model.llm(inputs_embeds=embeds, layout=layout, use_cache=False).logits[0].float()


@pytest.mark.parametrize("chunk", [1, 5])
def test_bfloat16_streams_equal_the_offline_forward_under_the_recorded_selections(chunk):
    model, features = tiny_narrator((MOD,), seed=4, llm_dtype="bfloat16"), video(14)
    running = engine(model, threshold=THRESHOLD, chunk=chunk)
    running.push(features)
    with mmskip.trace(model.llm) as trace:
        said = running.run()
    assert said
    transcript = Transcript(model, len(features), said)
    with replaying(Selections.of(trace)) as replay:
        logits = offline(model, transcript, features)
    for index, spoke in transcript.decisions:
        assert bool(speaks(logits[index], model.ids.silent, THRESHOLD)) == spoke
    for index, token in transcript.words:
        assert int(logits[index].argmax()) == token
    assert replay.compared == len(features) * 2  # one routed block keeps two tokens of each frame
    print(f"share of flipped selections in bfloat16: {replay.flipped_share:.1%}")
    assert replay.flipped_share < 0.2


def test_replay_counts_what_the_model_would_have_chosen_otherwise():
    model, features = tiny_narrator((MOD,), seed=4), video(6)
    running = engine(model, threshold=0.0)
    running.push(features)
    with mmskip.trace(model.llm) as trace:
        transcript = Transcript(model, len(features), running.run())
    recorded = Selections.of(trace)
    with replaying(recorded) as replay:
        same = offline(model, transcript, features)
    assert torch.equal(same, offline(model, transcript, features))
    assert (replay.compared, replay.flipped) == (12, 0)
    for kept in recorded.kept["block.1"].values():
        kept.copy_(torch.tensor([True, True, False, False, False]))
    with replaying(recorded) as replay:
        other = offline(model, transcript, features)
    assert replay.flipped > 0
    assert not torch.allclose(same, other, atol=1e-3)


def test_a_record_of_other_frames_is_refused():
    model, features = tiny_narrator((MOD,), seed=4), video(4)
    running = engine(model, threshold=0.0)
    running.push(features)
    with mmskip.trace(model.llm) as trace:
        transcript = Transcript(model, 4, running.run())
    recorded = Selections.of(trace)
    del recorded.kept["block.1"][0, 3]
    with pytest.raises(ValueError, match="frame 3 of row 0"), replaying(recorded):
        offline(model, transcript, features)
    with mmskip.trace(model.llm) as nothing:
        pass
    with pytest.raises(ValueError, match="no selections"):
        Selections.of(nothing)
