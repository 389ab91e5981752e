"""`stream.py`: a run watches a video; its texts, figures and report."""

import importlib
import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from locations import BENCHMARKS
from PIL import Image
from trained_runs import TOWER, narrated_set, train_run

from mmskip.datasets.narration.tokenizer import train_tokenizer
from mmskip.models.video_llm.streaming.engine import StreamEngine
from mmskip.train.cli.stream import Session, build_parser, main
from mmskip.train.playback import Question, place_questions
from mmskip.viz.stream_page import grid_of, stream_page, thumbnail

MOD = {"class_path": "mmskip.MoDConfig", "init_args": {"keep": 0.4}}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny trained run, and the folder of its videos."""
    folder = tmp_path_factory.mktemp("stream")
    made = narrated_set(folder / "set", 3)
    data = {
        "class_path": "mmskip.datasets.narration.NarrationData",
        "init_args": {
            "root": str(folder / "data"),
            "annotations": dict.fromkeys(("train", "val"), made["annotations"]),
            "video_dir": made["videos"],
            **TOWER,
        },
    }
    return train_run(folder, data, [MOD]), folder / "set" / "videos"


def play(run, out, *arguments, video="v0.mp4"):
    folder, videos = run
    path = videos / video if isinstance(video, str) else video
    status = main(["--checkpoint", str(folder), "--video", str(path), "--out", str(out), *arguments])
    lines = [json.loads(line) for line in (out / "stream.jsonl").read_text().splitlines()]
    return status, lines[:-1], lines[-1]


def said(lines):
    return [(line["type"], line["time_s"], line["text"]) for line in lines]


def test_a_run_narrates_a_video_and_reports_it(run, tmp_path, capsys):
    status, lines, summary = play(run, tmp_path, "--threshold", "0.6", "--question", "0:03 what leaves?")
    assert status == 0
    assert summary["frames"] == round(summary["frames"])
    assert [line["question"] for line in lines if line["type"] == "answer"] == ["what leaves?"]
    assert [line["time_s"] for line in lines if line["type"] == "answer"] == [3.0]
    printed = capsys.readouterr().out
    for line in lines:
        assert line["text"] in printed
    assert {"latency_ms", "kv_bytes", "frames_per_second"} <= set(summary)
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/jpeg") == summary["frames"]
    assert "http" not in page.replace("http-equiv", "")  # nothing is fetched
    data = json.loads(re.search(r"const D = (.*);\n", page)[1])
    assert data["blocks"] == ["block.1"]
    assert {bits.count("1") for frame in data["frames"] for bits in frame["k"]} == {2}
    assert len(data["said"]) == len(lines)


def test_the_texts_do_not_depend_on_chunks_and_images_play_as_well(run, tmp_path):
    full = play(run, tmp_path / "a", "--threshold", "0.6")
    chunked = play(run, tmp_path / "b", "--threshold", "0.6", "--chunk", "3", "--report_frames", "4")
    assert said(full[1]) == said(chunked[1])
    assert (tmp_path / "b" / "report.html").read_text().count("data:image/jpeg") <= 4
    images = tmp_path / "images"
    images.mkdir()
    for index, frame in enumerate(np.random.default_rng(0).integers(0, 255, (5, 48, 40, 3), dtype=np.uint8)):
        Image.fromarray(frame).save(images / f"{index}.jpg")
    status, _, summary = play(run, tmp_path / "c", "--report_frames", "0", video=images)
    assert (status, summary["frames"]) == (0, 5)
    assert not (tmp_path / "c" / "report.html").exists()


def test_a_stream_is_saved_and_continued_as_if_it_had_not_stopped(run, tmp_path, capsys):
    """Two halves of a folder of images, the second with the state of the first, say what the full video says."""
    pictures = np.random.default_rng(0).integers(0, 255, (8, 48, 40, 3), dtype=np.uint8)
    for part, frames in (("full", pictures), ("first", pictures[:4]), ("second", pictures[4:])):
        (tmp_path / part).mkdir()
        for index, frame in enumerate(frames):
            Image.fromarray(frame).save(tmp_path / part / f"{index}.png")
    threshold = ("--threshold", "0.6")
    full = play(run, tmp_path / "a", *threshold, "--question", "0:03 who?", video=tmp_path / "full")
    state = tmp_path / "states" / "s.safetensors"
    first = play(run, tmp_path / "b", *threshold, "--save_state", str(state), video=tmp_path / "first")
    assert str(state) in capsys.readouterr().out
    question = ("--question", "0:01 who?")
    second = play(run, tmp_path / "c", *threshold, *question, "--load-state", str(state), video=tmp_path / "second")
    assert second[2]["frames"] == 4 and second[2]["tokens"] == full[2]["tokens"]
    later = [(kind, time_s + 2, text) for kind, time_s, text in said(second[1])]  # 4 frames at 2 per second
    assert said(first[1]) + later == said(full[1])
    answers = [line["question"] for line in second[1] if line["type"] == "answer"]
    assert answers == ["who?"]
    page = (tmp_path / "c" / "report.html").read_text()
    data = json.loads(re.search(r"const D = (.*);\n", page)[1])
    assert {bits.count("1") for frame in data["frames"] for bits in frame["k"]} == {2}


def test_a_state_that_does_not_fit_is_one_line(run, tmp_path, capsys):
    folder, videos = run
    state = tmp_path / "s.safetensors"
    play(run, tmp_path / "a", "--save_state", str(state), "--report_frames", "0")
    base = ["--checkpoint", str(folder), "--video", str(videos / "v0.mp4"), "--out", str(tmp_path / "b")]
    capsys.readouterr()
    for given, message in (
        (["--load_state", str(tmp_path / "gone")], "not a file of saved streams"),
        (["--load_state", str(state), "--window", "30"], "saved with window=None; --window says 30"),
        (["--save_state", str(state / "below" / "it")], "is a file; give a folder"),
    ):
        assert main([*base, *given]) == 2
        error = capsys.readouterr().err
        assert message in error and len(error.splitlines()) == 1
    assert not (tmp_path / "b").exists()


def test_a_window_announces_its_bound_and_keeps_it(run, tmp_path, capsys):
    arguments = ("--window", "30", "--sinks", "4", "--positions", "rolling", "--fps", "20", "--threshold", "0.6")
    status, _, summary = play(run, tmp_path, *arguments)
    assert status == 0
    assert summary["kv_reserved_bytes"] <= summary["kv_bound_bytes"]
    printed = capsys.readouterr().out
    assert "at most" in printed.split("\n")[2]
    assert "trained on 2 frames per second, this is 20" in printed


def test_what_was_watched_before_a_break_is_written(run, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for index in range(4):
        Image.fromarray(np.full((40, 40, 3), 50 * index, np.uint8)).save(images / f"{index}.png")
    (images / "4.png").write_bytes(b"cut off")
    status, _, summary = play(run, tmp_path / "out", video=images)
    assert (status, summary["frames"]) == (1, 4)
    assert "4.png: not a readable image" in summary["stopped"]
    assert "stopped:" in capsys.readouterr().err


def test_a_stream_that_dies_keeps_what_was_said_until_then(run, tmp_path, monkeypatch):
    full = play(run, tmp_path, "--threshold", "0.6", "--report_frames", "0")
    assert len(full[1]) > 2 and not (tmp_path / "stream.jsonl.part").exists()
    before = (tmp_path / "stream.jsonl").read_text()
    step, said_so_far = StreamEngine.step, []

    def dying(self):
        if len(said_so_far) > 1:
            raise MemoryError
        now = step(self)
        said_so_far.extend(now or ())
        return now

    monkeypatch.setattr(StreamEngine, "step", dying)
    with pytest.raises(MemoryError):
        play(run, tmp_path, "--threshold", "0.6", "--report_frames", "0")
    part = (tmp_path / "stream.jsonl.part").read_text()
    assert part.endswith("\n") and said([json.loads(line) for line in part.splitlines()]) == said(full[1])[:2]
    assert (tmp_path / "stream.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--question", "what?"], "expected a time and a text"),
        (["--question", "9:00 what?"], "is asked at 540 s, the video ends at"),
        (["--window", "3"], "one frame has 5"),
        (["--window", "20", "--positions", "rolling", "--sinks", "-1"], "sinks is -1"),
        (["--positions", "rolling"], "needs a window"),
        (["--video", "nowhere.mp4"], "nowhere.mp4: no such video"),
        (["--checkpoint", "nowhere"], "nowhere: no such checkpoint"),
        (["--fps", "100000"], "tokens without any text, the model"),
        (["--report_frames", "-1"], "report_frames is -1"),
        (["--fps", "0"], "fps is 0"),
        (["--max_new_tokens", "0"], "max_new_tokens is 0"),
        (["--sample", "nan"], "temperature is nan"),
        (["--sample", "--seed", "-1"], "seed is -1"),
        (["--device", "gpu"], "device is 'gpu'"),
        (["--device", "cuda:99"], "CUDA devices can be used here"),
    ],
)
def test_what_cannot_be_played_is_refused_in_one_line(run, tmp_path, capsys, arguments, message):
    folder, videos = run
    base = ["--checkpoint", str(folder), "--video", str(videos / "v0.mp4"), "--out", str(tmp_path / "out")]
    assert main([*base, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_results_that_cannot_be_written_are_refused_before_the_video_is_watched(run, tmp_path, capsys):
    folder, videos = run
    (tmp_path / "file").write_text("")
    base = ["--checkpoint", str(folder), "--video", str(videos / "v0.mp4")]
    assert main([*base, "--out", str(tmp_path / "file" / "deep")]) == 2
    assert "file is a file; give a folder" in capsys.readouterr().err


def test_a_run_streams_where_its_training_data_is_not(run, tmp_path):
    folder, videos = run
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    config = (moved / "config.yaml").read_text()
    assert str(videos) in config
    (moved / "config.yaml").write_text(config.replace(str(videos), "/gone").replace("narrations.json", "gone.json"))
    here = play(run, tmp_path / "a", "--threshold", "0.6", "--report_frames", "0")
    there = play((moved, videos), tmp_path / "b", "--threshold", "0.6", "--report_frames", "0")
    assert said(there[1]) == said(here[1]) and said(here[1])


def test_a_long_stream_keeps_selections_of_pictured_frames_only(run, tmp_path):
    folder, videos = run
    arguments = ["--checkpoint", str(folder), "--video", str(videos / "v0.mp4"), "--out", str(tmp_path)]
    for pictured, kept in (("3", 3), ("0", 0)):
        session = Session(build_parser().parse_args([*arguments, "--report_frames", pictured]))
        watched = session.play()
        assert len(watched.times_s) > 6
        assert len(watched.kept) == len(session.pictures) == kept


def test_texts_are_printed_as_they_are_spoken_and_those_before_a_break_stay(run, tmp_path):
    """Texts of a chunk that outgrows the model's range are kept up to that point."""
    folder, videos = run
    arguments = ["--checkpoint", str(folder), "--video", str(videos / "v0.mp4"), "--out", str(tmp_path)]
    session = Session(build_parser().parse_args([*arguments, "--threshold", "0.99", "--chunk", "8"]))
    session.engine.cache.range = 60  # the announced check knows the frames only, not the texts
    watched = session.play()
    assert "60" in watched.stopped
    assert 0 < len(watched.times_s) < 8 and len(watched.times_s) == session.engine.frames_seen[0]
    assert watched.spoken and watched.spoken[-1].frame < len(watched.times_s)


def test_another_tokenizer_than_the_models_is_refused(run, tmp_path, capsys):
    folder, videos = run
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    train_tokenizer(["other words"]).save_pretrained(moved / "tokenizer")
    assert main(["--checkpoint", str(moved), "--video", str(videos / "v0.mp4")]) == 2
    assert "is not the one the model was trained with" in capsys.readouterr().err


def test_a_checkpoint_of_another_method_is_refused(run, tmp_path, capsys):
    folder, videos = run
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    checkpoint["hyper_parameters"]["methods"][0]["init_args"]["layers"] = "all"
    torch.save(checkpoint, tmp_path / "other.ckpt")
    status = main(["--checkpoint", str(tmp_path / "other.ckpt"), "--video", str(videos / "v0.mp4")])
    assert status == 2
    assert "do not fit its settings" in capsys.readouterr().err


def test_times_of_questions():
    asked = [Question.parse(text) for text in ("12 a", "0:12 what is moving?", "1:00:02.5 x y", "3s b")]
    assert [(q.time_s, q.text) for q in asked] == [(12, "a"), (12, "what is moving?"), (3602.5, "x y"), (3, "b")]
    times = np.arange(10) / 2
    placed = place_questions([Question(0.0, "a"), Question(1.4, "b"), Question(4.6, "c")], times, 4.7)
    assert {frame: [q.text for q in found] for frame, found in placed.items()} == {0: ["a"], 2: ["b"], 9: ["c"]}
    with pytest.raises(ValueError, match=r"asked at 4.8 s, the video ends at 4.7 s"):
        place_questions([Question(4.8, "d")], times, 4.7)


def test_a_page_escapes_what_was_said_and_fits_any_model():
    picture = thumbnail(np.zeros((64, 64, 3), np.uint8))
    spoken = [{"time_s": 0.0, "frame": 0, "text": "</script><b>%RAN%<!--<script>", "question": None}]
    page = stream_page("<x>", {0: picture}, [0.0], {}, 7, spoken, [("a", "<b>")])
    assert page.count("</script>") == page.count("<script") == 1
    assert "<!--" not in page
    assert json.loads(re.search(r"const D = (.*);\n", page)[1])["said"][0]["x"] == spoken[0]["text"]
    assert "&lt;x&gt;" in page
    assert "%RAN%" in page
    assert [grid_of(tokens) for tokens in (10, 9, 5, 1, 7)] == [3, 3, 2, 1, 0]


def test_the_benchmark_compares_a_checkpoint_with_its_offline_forward(run, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    stream_exact = importlib.import_module("stream_exact")
    where = {"device": "cpu", "commit": "a", "dirty": False}
    monkeypatch.setattr(stream_exact, "environment", lambda: dict(where))
    out = tmp_path / "exact.json"
    common = ["stream_exact.py", "--checkpoint", str(run[0]), "--split", "val", "--samples", "3", "--out", str(out)]
    common += ["--head", "600", "8", "--pairs", "2"]
    for part in (["--kinds", "float32", "--ways", "4"], ["--kinds", "bfloat16", "--ways", "0"]):
        monkeypatch.setattr(sys, "argv", [*common, *part])
        stream_exact.main()
    result = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert result == json.loads(out.read_text())
    # what an earlier call found is kept
    assert set(result["results"]) == {"float32, chunks of 5, 5 streams, restored", "bfloat16, chunks of 1, 1 streams"}
    exact = result["results"]["float32, chunks of 5, 5 streams, restored"]
    assert exact["choices"] > 30 and exact["different"] == exact["flipped"] == 0 and exact["selected"] > 50
