"""`evaluate.py coin`: a model trained on a small set in COIN's format answers by generation."""

import json
from pathlib import Path

import pytest
import torch
from trained_runs import TOWER, coin_set, train_run

from mmskip.datasets.narration.formats.coin import TASKS
from mmskip.models.video_llm.answering import answer
from mmskip.train.cli.evaluate import main
from mmskip.train.evaluation.video_llm.coin import accuracies
from mmskip.train.load_run import find_run, load_data, load_model

MOD = [{"class_path": "mmskip.MoDConfig", "init_args": {"keep": 0.4}}]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("coin")
    coin = coin_set(folder / "set")
    data = {
        "class_path": "mmskip.datasets.narration.CoinData",
        "init_args": {
            "root": str(folder / "data"),
            "annotations": dict.fromkeys(("train", "val", "test"), coin["annotations"]),
            "video_dir": coin["videos"],
            "batch_size": 4,
            **TOWER,
        },
    }
    return train_run(folder, data, MOD, epochs=60)


def evaluate(run: Path, out: Path, *options: str, status: int = 0) -> dict:
    command = ["coin", "--checkpoint", str(run), "--out", str(out), "--device", "cpu", "--max-new-tokens", "30"]
    assert main([*command, *options]) == status
    return json.loads((out / "results.json").read_text())


def test_all_five_accuracies_come_from_generated_answers(trained, tmp_path):
    results = evaluate(trained, tmp_path)
    totals = results["results"]
    assert list(totals) == list(TASKS)
    assert {task: values["questions"] for task, values in totals.items()} == {
        "step": 6,
        "task": 2,
        "next": 4,
        "procedure": 4,
        "procedure+": 4,
    }
    assert totals["procedure"]["answers"] == 6
    assert totals["step"]["accuracy"] > 0.5, "colours are easy to recognize: chance is a third"
    judged = {sample["uid"]: sample for sample in results["samples"]}
    assert judged["coin1/step/0"]["answers"] == ["paint it red"] and judged["coin1/step/0"]["said"]
    right = [ok for sample in judged.values() if sample["task"] == "next" for ok in sample["right"]]
    assert totals["next"]["accuracy"] == sum(right) / len(right)


def test_answers_do_not_depend_on_the_batch_and_equal_generation_without_a_cache(trained):
    run = find_run(trained)
    model, data = load_model(run), load_data(run)
    data.prepare_data()
    dataset = data.dataset("test")
    samples = [dataset[index] for index in (0, 3, 7, 8)]
    together = answer(model, samples, 12)
    assert together == [answer(model, [sample], 12)[0] for sample in samples]
    sample, said = samples[1], []
    turn = sample["turns"][0]
    for _ in range(12):
        ids = torch.cat([sample["input_ids"][: turn.text[0]], torch.tensor(said, dtype=torch.long)])[None]
        layout = torch.cat([sample["layout"][: turn.text[0]], torch.full((len(said),), -1)])[None]
        with torch.no_grad():
            embeds = model.embed(ids, layout, sample["features"])
            token = int(model.llm(inputs_embeds=embeds, layout=layout).logits[0, -1].argmax())
        if token == model.ids.eos:
            break
        said.append(token)
    assert said == together[1] and said


def test_tasks_can_be_chosen_and_the_video_blanked(trained, tmp_path):
    results = evaluate(trained, tmp_path, "--tasks", "step", "next")
    assert list(results["results"]) == ["step", "next"]
    seen = {sample["uid"]: sample["said"] for sample in results["samples"]}
    evaluate(trained, tmp_path, "--tasks", "step", "next", "--blank")
    blank = json.loads((tmp_path / "results-blank.json").read_text())
    assert len({sample["said"] for sample in blank["samples"] if sample["task"] == "step"}) == 1
    assert {sample["uid"]: sample["said"] for sample in blank["samples"]} != seen


def test_a_missing_video_is_counted_and_fails_only_if_asked(trained, tmp_path):
    other = coin_set(tmp_path / "other", 6)
    (tmp_path / "other" / "videos" / "coin3.mp4").unlink()
    options = ["--annotations", other["annotations"], "--videos", other["videos"], "--tasks", "task"]
    results = evaluate(trained, tmp_path / "out", *options)
    assert results["left_out"]["counts"] == {"video missing": 1} and len(results["samples"]) == 2
    evaluate(trained, tmp_path / "out", *options, "--strict", status=1)


def test_accuracies_by_hand():
    records = [
        {"task": "step", "right": [True]},
        {"task": "step", "right": [False]},
        {"task": "procedure", "right": [True, True, False]},
        {"task": "procedure", "right": [True]},
    ]
    assert accuracies(records) == {
        "step": {"accuracy": 0.5, "questions": 2, "answers": 2},
        "procedure": {"accuracy": 0.75, "questions": 2, "answers": 4},
    }
