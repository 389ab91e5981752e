"""The streaming benchmark measures what it says, on a tiny shape."""

import importlib
import json
import sys

import pytest
from locations import BENCHMARKS


@pytest.fixture
def streaming(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("streaming")


def test_a_quick_run_ends_with_one_line_and_a_picture(streaming, monkeypatch, tmp_path, capsys):
    sizes = ["--tokens", "10", "--chunks", "2", "--streams", "1", "--warm", "4"]
    arguments = ["--shape", "tiny", "--frames", "63", "--pairs", "2", "--prefill_frames", "20", *sizes]
    monkeypatch.setattr(sys, "argv", ["streaming.py", *arguments, "--device", "cpu", "--out", str(tmp_path / "r.json")])
    streaming.main()
    printed = capsys.readouterr().out
    result = json.loads(printed.strip().splitlines()[-1])
    # 2 of 4 blocks keep 2 of 10 vision tokens and the separator: (1 + 3 / 11) / 2
    assert result["position"]["kv_share"] == pytest.approx((1 + 3 / 11) / 2, abs=0.005)
    bounded = result["position"]["contenders"]["mod + window"]
    assert bounded["most_reserved_bytes"] <= bounded["kv_bound_bytes"]
    assert bounded["kv_bytes_end"] < result["position"]["contenders"]["mod"]["kv_bytes_end"]
    assert "at most" in printed
    assert result["prefill"]["ideal"] > 1.3
    assert result["flat"]["frames_timed"] == 3 and result["flat"]["late_over_early"] > 0
    assert [cell["tokens"] for cell in result["grid"]["cells"]] == [10]
    assert (tmp_path / "r.png").stat().st_size > 1000
    # every frame under the window, a part of them without
    assert bounded["frames_timed"] == [3, 3] == result["position"]["contenders"]["dense"]["frames_timed"]
    assert len(bounded["latency_ms_by_position"]) == 63


def test_what_was_measured_is_not_lost_when_a_later_part_is_interrupted(streaming, monkeypatch, tmp_path, capsys):
    """The parts before are in the file, and are taken from it by the next run: of the same commit only."""
    sizes = ["--tokens", "10", "1", "--chunks", "2", "--streams", "1", "--warm", "2"]
    small = ["--shape", "tiny", "--frames", "21", "--pairs", "2", "--prefill_frames", "6", *sizes]
    out = tmp_path / "r.json"
    monkeypatch.setattr(sys, "argv", ["streaming.py", *small, "--device", "cpu", "--out", str(out)])
    where = {"device": "cpu", "commit": "a", "dirty": False}
    monkeypatch.setattr(streaming, "environment", lambda: dict(where))
    cell, measured = streaming._cell, []

    def stopping(*args):
        if measured:
            raise KeyboardInterrupt
        measured.append(1)
        return cell(*args)

    monkeypatch.setattr(streaming, "_cell", stopping)
    with pytest.raises(KeyboardInterrupt):
        streaming.main()
    kept = json.loads(out.read_text())
    assert kept["prefill"]["speedup"] > 0 and len(kept["grid"]["cells"]) == 1

    def fail(*args):
        raise AssertionError("measured again")

    monkeypatch.setattr(streaming, "_cell", cell)
    monkeypatch.setattr(streaming, "position", fail)
    monkeypatch.setattr(streaming, "prefill", fail)
    monkeypatch.setattr(streaming, "flat", fail)
    streaming.main()
    result = json.loads(out.read_text())
    assert (result["position"], result["prefill"]) == (kept["position"], kept["prefill"])
    assert len(result["grid"]["cells"]) == 2 and result["grid"]["cells"][0] == kept["grid"]["cells"][0]
    where["commit"] = "b"
    with pytest.raises(AssertionError, match="measured again"):
        streaming.main()


def test_the_verdict_names_where_routing_does_not_pay(streaming):
    cells = [{"tokens": t, "chunk": 1, "streams": 2, "speedup": s} for t, s in ((1, 0.7), (64, 1.4))]
    assert "in 1 of 2 cells" in streaming.verdict(cells)
    assert "1x1x2 (0.70x)" in streaming.verdict(cells)
    assert "in all 1 cells" in streaming.verdict(cells[1:])


def test_spans_of_the_claim_and_of_shorter_streams(streaming):
    assert streaming.spans(2100) == ((500, 600), (2000, 2100))
    assert streaming.spans(210) == ((50, 60), (200, 210))
