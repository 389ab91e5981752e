"""The DataModule: embedded set and Ego4D-format folders, from nothing to batches."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning import LightningModule, Trainer

from mmskip.datasets.common.labels import IGNORE
from mmskip.datasets.narration.module import NarrationData
from mmskip.datasets.narration.tokenizer import StreamTokens
from mmskip.datasets.synthetic.videos import GeneratedConfig
from mmskip.datasets.synthetic.world import SceneConfig
from mmskip.datasets.video.reader import write_video

SMALL = GeneratedConfig(train=5, val=3, test=2, image_size=32, scene=SceneConfig(ticks=12))
TINY_TOWER = {
    "tower": "timm/vit_tiny_patch16_224",
    "image_size": 32,
    "grid": 2,
    "tower_kwargs": {"depth": 1, "embed_dim": 32, "num_heads": 2},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    NarrationData(root=str(root), generated=SMALL, **TINY_TOWER).prepare_data()
    return root


def make(root, **kwargs):
    return NarrationData(**({"root": str(root), "generated": SMALL, "batch_size": 2} | TINY_TOWER | kwargs))


def ready(root, **kwargs):
    data = make(root, **kwargs)
    data.prepare_data()
    data.setup()
    return data


def test_from_nothing_to_batches(root):
    data = ready(root)
    batches = list(data.train_dataloader())
    assert sum(len(batch["uid"]) for batch in batches) == 5
    for batch in batches:
        vision = int((batch["layout"] >= 0).sum())
        assert batch["features"].shape == (vision // 5, 5, 32) and batch["features"].dtype == torch.float32
        assert (batch["labels"] != IGNORE).any() and data.frame_tokens == 5 and data.feature_dim == 32
    assert [len(list(loader)) for loader in (data.val_dataloader(), data.test_dataloader())] == [2, 1]
    words = data.tokenizer.decode(batch["input_ids"][0][batch["layout"][0] < 0], skip_special_tokens=True)
    assert batch["turns"][0][0].narration in words


def test_what_a_model_needs_is_known_before_any_file_exists(tmp_path):
    data = make(tmp_path)
    assert (data.feature_dim, data.frame_tokens) == (32, 5)
    assert data.vocab_size == len(data.tokenizer) and data.tokens.vision < data.vocab_size
    assert not list(tmp_path.rglob("*.mp4"))


def test_the_second_time_nothing_is_made_again(root, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("the tower was built although all features are there")

    monkeypatch.setattr("mmskip.datasets.narration.encoding.VisionTower", never)
    data = ready(root)
    assert len(data.dataset("train")) == 5 and data.feature_dim == 32


def test_vocabulary_is_the_same_before_and_after_saving(root, tmp_path):
    assert StreamTokens.of(make(root).tokenizer) == StreamTokens.of(make(tmp_path).tokenizer)
    assert make(root).tokenizer.get_vocab() == make(tmp_path).tokenizer.get_vocab()


def test_blanked_data_differs_in_features_only(root):
    seen, blank = (next(iter(ready(root, blank=blank).val_dataloader())) for blank in (False, True))
    assert not blank["features"].any() and seen["features"].any()
    assert blank["features"].shape == seen["features"].shape
    assert torch.equal(seen["input_ids"], blank["input_ids"]) and torch.equal(seen["labels"], blank["labels"])


def test_feature_statistics_are_those_of_the_training_videos(root):
    data = ready(root)
    dataset = data.dataset("train")
    rows = torch.cat([dataset[index]["features"] for index in range(len(dataset))]).flatten(0, 1)
    mean, std = data.feature_statistics()
    torch.testing.assert_close(mean, rows.mean(0), atol=0.1, rtol=0.1)
    torch.testing.assert_close(std, rows.std(0).clamp(min=1e-3), atol=0.1, rtol=0.1)


def order(data, epoch):
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return [uid for batch in loader for uid in batch["uid"]]


def test_order_depends_on_seed_and_epoch_alone(root):
    first = order(ready(root), 0)
    torch.manual_seed(123)
    assert order(ready(root), 0) == first
    assert sorted(order(ready(root), 1)) == sorted(first)
    orders = {tuple(order(ready(root, seed=seed), epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) > 4


def test_left_padding_reaches_the_batch(root):
    batch = next(iter(ready(root, padding_side="left", batch_size=5).train_dataloader()))
    assert batch["attention_mask"][:, -1].all() and not batch["attention_mask"].all()


def test_long_videos_become_several_samples(root):
    data = ready(root, max_frames=5)
    dataset = data.dataset("train")
    assert len(dataset) > 5 and data.counts["train"]["split"] == len(dataset) - 5
    assert all(len(sample["features"]) <= 5 for sample in (dataset[index] for index in range(len(dataset))))
    uids = [dataset[index]["uid"] for index in range(len(dataset))]
    assert len(set(uids)) == len(uids)


class Collect(LightningModule):
    """Notes the samples it sees."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen = {"train": [], "val": [], "test": []}

    def training_step(self, batch, index):
        self.seen["train"] += batch["uid"]
        return self.weight.sum()

    def validation_step(self, batch, index):
        self.seen["val"] += batch["uid"]

    def test_step(self, batch, index):
        self.seen["test"] += batch["uid"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_lightning_runs_it(root, tmp_path):
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )
    model = Collect()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*num_workers.*")
        trainer.fit(model, datamodule=make(root))
        trainer.test(model, datamodule=make(root), verbose=False)
    assert model.seen["train"] == order(make(root), 0) + order(make(root), 1)
    assert model.seen["val"] == [f"val-0000{index}" for index in range(3)] * 2
    assert model.seen["test"] == ["test-00000", "test-00001"]


def test_training_goes_on_in_the_middle_of_an_epoch(root):
    uninterrupted = order(ready(root), 1)
    first, second = ready(root).train_dataloader(), ready(root).train_dataloader()
    first.sampler.set_epoch(1)
    taken = next(iter(first))["uid"]
    second.load_state_dict(first.state_dict())
    second.sampler.set_epoch(1)
    assert taken + [uid for batch in second for uid in batch["uid"]] == uninterrupted


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_evaluation_without_repeats(root, world, monkeypatch):
    data = ready(root)
    shares = []
    for rank in range(world):
        monkeypatch.setattr(data, "_ranks", lambda rank=rank: (world, rank))
        shares.append([uid for batch in data.val_dataloader() for uid in batch["uid"]])
    assert sorted(uid for share in shares for uid in share) == ["val-00000", "val-00001", "val-00002"]
    assert shares[0][0] == "val-00000"


def record(time, text):
    return {"timestamp_sec": time, "narration_text": text}


@pytest.fixture
def ego4d(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (24, 48, 64, 3), dtype=np.uint8)
    videos = {}
    for number, uid in enumerate(("one", "two", "cut")):
        write_video(tmp_path / "videos" / f"{uid}.mp4", noise[: 24 - number], fps=4)
        records = [
            record(1.1, "#C C opens the door"),
            record(3.0, "#C C looks around #unsure"),
            record(99, "#C C late"),
        ]
        videos[uid] = {"narration_pass_1": {"narrations": records}, "status": "complete"}
    videos["gone"] = videos["one"]
    path = tmp_path / "videos" / "cut.mp4"
    path.write_bytes(path.read_bytes()[:2000])
    (tmp_path / "train.json").write_text(json.dumps({"videos": videos}))
    (tmp_path / "val.json").write_text(json.dumps({"two": videos["two"]}))
    return {
        "annotations": {"train": str(tmp_path / "train.json"), "val": str(tmp_path / "val.json")},
        "video_dir": str(tmp_path / "videos"),
    }


def test_ego4d_folder_with_faults_runs_and_counts_them(ego4d, tmp_path):
    data = make(tmp_path / "out", **ego4d)
    with pytest.warns(UserWarning, match=r"1 of 3 videos left out: .*cut\.mp4"):
        data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert sorted(batch["uid"]) == ["one", "two"]
    assert [span.narration for span in batch["turns"][0]] == ["C opens the door", "C looks around"]
    assert [span.frames for span in batch["turns"][0]] == [(1, 4), (4, 7)]
    counts = data.counts["train"]
    assert (counts["corrupt video"], counts["video missing"], counts["past the end"]) == (1, 1, 2)
    with pytest.raises(ValueError, match="no annotations for split 'test'"):
        data.test_dataloader()


def test_a_tower_that_cannot_be_made_fails_before_videos_are_written(tmp_path):
    with pytest.raises(ValueError, match="grid=9 is finer"):
        make(tmp_path, grid=9).prepare_data()
    assert not list(tmp_path.rglob("*.mp4"))


def test_other_annotations_in_the_same_folder_get_their_own_words(ego4d, tmp_path):
    with pytest.warns(UserWarning, match="left out"):
        make(tmp_path / "out", **ego4d).prepare_data()
    path = Path(ego4d["annotations"]["train"])
    content = json.loads(path.read_text())
    content["videos"]["one"]["narration_pass_1"]["narrations"].append(record(5.0, "#C C juggles"))
    path.write_text(json.dumps(content))
    data = make(tmp_path / "out", **ego4d)
    assert "juggles" in data.tokenizer.get_vocab()
    with pytest.warns(UserWarning, match="left out"):
        data.prepare_data()
    assert "juggles" in make(tmp_path / "out", **ego4d).tokenizer.get_vocab()


def test_sources_are_checked_before_any_work(ego4d, tmp_path):
    for change, message in [
        ({"annotations": {"train": "nowhere.json"}}, r"annotations\['train'\]: no such file: nowhere.json"),
        ({"video_dir": "nowhere"}, "no such folder: 'nowhere'"),
        ({"video_dir": None}, "no such folder"),
        ({"annotations": {"training": "x"}}, r"unknown splits \['training'\]"),
        ({"annotations": None}, "needs annotations"),
        ({"tower": "timm/no_such_model"}, "timm has no model"),
        ({"tower": None}, "need a tower"),
        ({"padding_side": "middle"}, "padding_side"),
        ({"fps": 0}, "fps must be > 0"),
        ({"batch_size": 0}, "batch_size >= 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(tmp_path / "out", **(ego4d | change))
    assert not (tmp_path / "out").exists()


def test_hugging_face_tokenizers_by_folder_and_missing_ones(root, tmp_path):
    make(root).tokenizer.save_pretrained(tmp_path / "mine")
    assert make(root, tokenizer=str(tmp_path / "mine")).vocab_size == make(root).vocab_size
    with pytest.raises(ValueError, match="not a local folder with files of transformers"):
        _ = make(root, tokenizer=str(tmp_path / "nothing")).tokenizer


def test_without_features_setup_says_what_to_do(root, tmp_path):
    shutil.copytree(root, tmp_path / "copy", ignore=shutil.ignore_patterns("features"))
    with pytest.raises(ValueError, match="run prepare_data first"):
        make(tmp_path / "copy").setup("fit")


def test_settings_come_from_yaml():
    parser = ArgumentParser()
    parser.add_class_arguments(NarrationData, "data")
    config = parser.parse_string("data:\n  batch_size: 3\n  generated:\n    train: 7\n    scene:\n      ticks: 20\n")
    data = parser.instantiate(config).data
    assert (data.batch_size, data.generated.train, data.generated.scene.ticks) == (3, 7, 20)
    assert data.generated.val == GeneratedConfig().val
    with pytest.raises(SystemExit):
        parser.parse_string("data:\n  generated:\n    trian: 7\n")


def test_annotations_without_training_words_need_a_tokenizer(ego4d, tmp_path):
    test_only = ego4d | {"annotations": {"test": ego4d["annotations"]["val"]}}
    with pytest.raises(ValueError, match=r"annotations has \['test'\] and no 'train'.*give tokenizer=FOLDER"):
        make(tmp_path / "out", **test_only)
    make(tmp_path / "out", **ego4d).tokenizer.save_pretrained(tmp_path / "mine")
    data = make(tmp_path / "out", tokenizer=str(tmp_path / "mine"), **test_only)
    data.prepare_data()
    assert next(iter(data.test_dataloader()))["uid"] == ["two"]


def test_one_name_for_different_videos_of_two_splits(ego4d, tmp_path):
    """Each split gets the features of its file."""
    other = tmp_path / "other"
    write_video(other / "two.mp4", np.zeros((20, 48, 64, 3), np.uint8), fps=4)
    shutil.copytree(tmp_path / "videos", tmp_path / "first", ignore=shutil.ignore_patterns("cut.mp4"))
    folders = {"train": str(tmp_path / "first"), "val": str(other)}
    data = ready(tmp_path / "out", **(ego4d | {"video_dir": folders}))
    train = {sample["uid"]: sample["features"] for sample in data.dataset("train")}
    (val,) = list(data.dataset("val"))
    assert train["two"].shape == val["features"].shape and not torch.equal(train["two"], val["features"])
    again = ready(tmp_path / "out", **(ego4d | {"video_dir": folders}))
    assert torch.equal(again.dataset("val")[0]["features"], val["features"])


def test_another_format_is_chosen_by_yaml(ego4d, tmp_path):
    steps = [
        {"start_time": 1.0, "end_time": 2.0, "step_description": "open the door", "segments": []},
        {"start_time": 2.0, "end_time": 4.0, "step_description": "look around", "segments": []},
    ]
    content = {"videos": [{"video_uid": "one", "segments": steps}, {"video_uid": "unknown", "segments": steps}]}
    (tmp_path / "goalstep.json").write_text(json.dumps(content))
    text = f"""
data:
  root: {tmp_path / "out"}
  annotations: {{train: {tmp_path / "goalstep.json"}}}
  video_dir: {ego4d["video_dir"]}
  format: goalstep
  narrate_at: start
  tower: {TINY_TOWER["tower"]}
  image_size: 32
  grid: 2
  tower_kwargs: {json.dumps(TINY_TOWER["tower_kwargs"])}
"""
    parser = ArgumentParser()
    parser.add_class_arguments(NarrationData, "data")
    data = parser.instantiate(parser.parse_string(text)).data
    data.prepare_data()
    (sample,) = list(data.dataset("train"))
    assert [(span.narration, span.time_s) for span in sample["turns"]] == [("open the door", 1.0), ("look around", 2.0)]
    assert data.reports["train"].examples == {"video without narration": ["cut", "two"], "video missing": ["unknown"]}
