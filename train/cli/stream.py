"""`mmskip stream`: a trained run watches a video and narrates what it sees."""

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmskip.datasets.narration.tokenizer import StreamTokens
from mmskip.datasets.video.frames import ImageFolder, VideoFrames, open_frames
from mmskip.datasets.video.tower import VisionTower
from mmskip.env import pick_device
from mmskip.models.video_llm.streaming.engine import StreamEngine
from mmskip.models.video_llm.streaming.settings import StreamSettings
from mmskip.models.video_llm.streaming.state import load_streams, save_streams
from mmskip.train.load_run import TrainedRun, check_tokens, find_run, load_data, load_model, tokenizer_folder
from mmskip.train.playback import Player, Question, Spoken, Watched, place_questions
from mmskip.utils.command import CommandParser, exit_status
from mmskip.utils.files import GrowingLines, check_folder, write_text
from mmskip.viz.stream_page import stream_page, thumbnail


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = CommandParser(
        prog="mmskip stream", description="Narrate a video while it plays, with the checkpoint of a training run."
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="RUN", help="checkpoint file, or folder of a run of train.py")
    add("--config", metavar="YAML", help="config of the run, if it does not lie beside the checkpoint")
    add("--video", required=True, metavar="FILE", help="video file, or folder of images")
    add("--fps", type=float, help="frames watched per second of video (default: those of the run's training)")
    add("--window", type=int, metavar="N", help="tokens a token looks back on; default: the full stream")
    add("--sinks", type=int, default=0, metavar="N", help="first tokens that stay visible under a window")
    add("--positions", choices=("absolute", "rolling"), default="absolute", help="rolling: streams without end")
    add("--chunk", type=int, default=1, metavar="F", help="frames per call of the model")
    add("--question", action="append", default=[], metavar='"M:S TEXT"', help="ask at a time; may be repeated")
    add("--threshold", type=float, help="speak if the silent token is less probable (default: the run's)")
    add("--max_new_tokens", type=int, help="longest text (default: the run's)")
    add(
        "--sample", type=float, nargs="?", const=1.0, default=0.0, metavar="T", help="sample texts at temperature T (1)"
    )
    add("--top_p", type=float, default=1.0, help="sample among the likeliest tokens of this total probability")
    add("--seed", type=int, default=0, help="of sampling")
    add("--realtime", action="store_true", help="play at the video's own pace")
    add("--out", metavar="DIR", help="folder for stream.jsonl and report.html (default: in the run's folder)")
    add("--report_frames", type=int, default=240, metavar="F", help="most frames pictured in the report; 0: no report")
    add("--load_state", metavar="FILE", help="continue a stream that --save_state wrote; the video goes on from there")
    add("--save_state", metavar="FILE", help="write the stream's state at the end, to continue it with another video")
    add("--device", default="auto", help="auto, cpu, cuda")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; an error in arguments or files is one line.

    Returns:
        Exit status: 0 played to its end, 1 stopped early (results so far are written), 2 nothing was played.
    """
    return exit_status(lambda: _watch(build_parser().parse_args(arguments)))


def _watch(args: argparse.Namespace) -> int:
    session = Session(args)
    session.announce()
    watched = session.play()
    session.finish(watched)
    return 1 if watched.stopped else 0


class Session:
    """One run watching one video. Everything is checked on construction, before a frame is decoded.

    Raises:
        ValueError: a bad argument, see `main`.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        if args.report_frames < 0:
            raise ValueError(f"report_frames is {args.report_frames}; expected a number >= 0")
        if not os.path.exists(args.video):
            raise ValueError(f"{args.video}: no such video file or folder of images")
        if args.fps is not None and not (args.fps > 0 and math.isfinite(args.fps)):
            raise ValueError(f"fps is {args.fps:g}; expected a positive number of frames per second")
        self.args = args
        questions = [Question.parse(text) for text in args.question]
        device = pick_device(args.device)
        self.run = find_run(args.checkpoint, args.config)
        self.out = check_folder(args.out or self.run.folder / "streams" / Path(args.video).stem)
        self.model: Any = load_model(self.run, device)
        self.data = _data(self.run)
        self.tower = VisionTower(**self.data.tower_args).to(device)
        if self.tower.dim != self.model.hparams["feature_dim"]:
            raise ValueError(
                f"the model reads features of {self.model.hparams['feature_dim']} channels, the tower of the run's "
                f"config, {self.data.tower_args['name']}, gives {self.tower.dim}; give the config the run was made by"
            )
        self.fps = args.fps if args.fps is not None else self.model.hparams["fps"] or self.data.fps
        self.frames: ImageFolder | VideoFrames = open_frames(args.video, self.fps, self.tower.image_size)
        self.questions = place_questions(questions, self.frames.times_s, self.frames.duration_s)
        check_tokens(self.model, self.data)
        self.tokens = StreamTokens.of(self.data.tokenizer)
        self.engine = self._open_engine()
        self._check_range()
        self.pictures: dict[int, str] = {}
        self._lines: GrowingLines | None = None
        self._stride = math.ceil(len(self.frames.times_s) / args.report_frames) if args.report_frames else 0

    def _open_engine(self) -> StreamEngine:
        """A new stream, or the saved one; its settings are those of the arguments in both cases."""
        args, settings = self.args, self._settings()
        if args.save_state is not None:
            check_folder(Path(args.save_state).parent)
        if args.load_state is None:
            return StreamEngine(self.model, self.tower.num_tokens, settings, [self.tokens.head(self.data.instruction)])
        engine = load_streams(self.model, args.load_state)
        if engine.frame_tokens != self.tower.num_tokens or len(engine.frames_seen) != 1:
            raise ValueError(
                f"{args.load_state} holds {len(engine.frames_seen)} streams of {engine.frame_tokens} tokens a frame; "
                f"expected one of {self.tower.num_tokens}"
            )
        for name in ("window", "sinks", "positions"):  # the stored keys and values depend on these
            if getattr(engine.settings, name) != getattr(settings, name):
                raise ValueError(
                    f"{args.load_state} was saved with {name}={getattr(engine.settings, name)!r}; "
                    f"--{name} says {getattr(settings, name)!r}"
                )
        engine.settings = settings
        return engine

    def _settings(self) -> StreamSettings:
        args, own = self.args, self.model.hparams
        return StreamSettings(
            window=args.window,
            sinks=args.sinks,
            positions=args.positions,
            chunk=args.chunk,
            threshold=own["silent_threshold"] if args.threshold is None else args.threshold,
            max_new_tokens=own["max_new_tokens"] if args.max_new_tokens is None else args.max_new_tokens,
            temperature=args.sample,
            top_p=args.top_p,
            seed=args.seed,
        )

    def _check_range(self) -> None:
        """Absolute positions that cannot last for the frames alone are refused before the first of them."""
        cache, frames = self.engine.cache, len(self.frames.times_s)
        needed = cache.totals[0] + frames * (self.tower.num_tokens + 1)
        if cache.roll is None and cache.range is not None and needed > cache.range:
            raise ValueError(
                f"{self.args.video} has {frames} frames at {self.fps:g} per second, {needed} tokens without any text, "
                f"the model {cache.range} positions; give --positions rolling --window N, or a lower --fps"
            )

    # --- playing ------------------------------------------------------------------------------------------------

    def announce(self) -> None:
        """Print the settings of the stream, and the most memory it can take."""
        times = self.frames.times_s
        print(f"{self.args.video}: {len(times)} frames, {self.fps:g} per second, {self.tower.num_tokens} tokens each")
        for note in self._notes():
            print(f"warning: {note}")
        limit = self.engine.kv_bound()
        if limit is None:
            print("keys and values: no bound without --window")
        else:
            print(f"keys and values: at most {_mib(limit)} in a window of {self.args.window} tokens")

    def _notes(self) -> list[str]:
        notes = list(self.frames.notes)
        trained = self.model.hparams["fps"]
        if trained and self.fps != trained:
            notes.append(f"the run was trained on {trained:g} frames per second, this is {self.fps:g}")
        return notes

    def play(self) -> Watched:
        """Play the video, printing and writing each text as it is spoken."""
        self._lines = GrowingLines(self.out / "stream.jsonl")
        seen = (self._say, self._see, self._stride)
        player = Player(self.engine, self._encode, self.tokens, self.args.realtime, *seen)
        return player.play(self.frames, self.frames.times_s, self.questions)

    def _encode(self, frames: torch.Tensor) -> torch.Tensor:
        # the features a run is trained on are stored in half precision
        return self.tower(frames.to(self.engine.cache.device)).half().float()

    def _say(self, spoken: Spoken) -> None:
        assert self._lines is not None
        self._lines.add({"type": "answer" if spoken.question else "narration", **asdict(spoken)})
        _print(spoken)

    def _see(self, index: int, frame: np.ndarray) -> None:
        self.pictures[index] = thumbnail(frame)

    def finish(self, watched: Watched) -> None:
        """Save the state, print the figures, write them after the texts, and write the report."""
        assert self._lines is not None
        if watched.stopped:
            sys.stderr.write(f"stopped: {watched.stopped}\n")
        if self.args.save_state is not None:
            save_streams(self.engine, self.args.save_state)
            print(f"state of the stream: {self.args.save_state}")
        figures = self._figures(watched)
        for name, value in figures:
            print(f"{name:24s} {value}")
        summary = {**watched.summary(), "kv_bound_bytes": self.engine.kv_bound(), "notes": self._notes()}
        about = {
            "type": "summary",
            "video": str(self.args.video),
            "checkpoint": str(self.run.checkpoint),
            "fps": self.fps,
            "settings": self.engine.settings.to_dict(),
            "made": time.strftime("%Y-%m-%dT%H:%M:%S"),
        }
        self._lines.add({**about, **summary})
        written = [self._lines.close()]
        if self.pictures:
            page = stream_page(
                Path(self.args.video).name,
                self.pictures,
                watched.times_s,
                watched.kept,
                self.tower.num_tokens,
                [asdict(spoken) for spoken in watched.spoken],
                figures,
            )
            written.append(write_text(page, self.out / "report.html"))
        print("written to " + ", ".join(map(str, written)))

    def _figures(self, watched: Watched) -> list[tuple[str, str]]:
        summary, limit = watched.summary(), self.engine.kv_bound()
        latency, tower = (
            ", ".join(f"{name} {value} ms" for name, value in summary[key].items()) or "none"
            for key in ("latency_ms", "vision_tower_ms")
        )
        stored = f"{_mib(summary['kv_bytes'])} stored, {_mib(summary['kv_reserved_bytes'])} reserved"
        rows = [
            ("frames", f"{summary['frames']} in {summary['seconds']:.1f} s, {summary['frames_per_second']} per second"),
            ("latency of a frame" if self.args.chunk == 1 else f"latency of {self.args.chunk} frames", latency),
            ("vision tower", tower),
            ("stream", f"{summary['tokens']} tokens, {summary['texts']} texts"),
            ("keys and values", stored + (f", bound {_mib(limit)}" if limit else "")),
        ]
        if self.args.realtime:
            rows.append(("behind real time", f"at most {summary['behind_s']} s"))
        return rows + ([("stopped", watched.stopped)] if watched.stopped else [])


def _data(run: TrainedRun) -> Any:
    """The data module of a run, for its tower, tokenizer and instruction. With the tokenizer that the run kept nothing
    of what it was trained on need be there any more."""
    folder = tokenizer_folder(run)
    if folder is None:
        return load_data(run)
    free = {"annotations": None, "video_dir": None, "tokenizer": folder}
    return load_data(run, "mmskip.datasets.narration.NarrationData", **free)


def _print(spoken: Spoken) -> None:
    minutes, seconds = divmod(spoken.time_s, 60)
    clock = f"{int(minutes):3d}:{seconds:04.1f}"
    if spoken.question:
        print(f"{clock}  ? {spoken.question}", flush=True)
    print(f"{clock}  {'> ' if spoken.question else ''}{spoken.text}", flush=True)


def _mib(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"
