"""The DataModule of captions and pairs: embedded, COCO, SNLI-VE; batches, words, what is left out, what is refused."""

import json
import shutil

import pytest
import torch

from mmskip.datasets.captioning.batch import ANSWERS, CaptionCollate
from mmskip.datasets.captioning.module import CaptionData
from mmskip.datasets.captioning.snli_ve import LABELS
from mmskip.datasets.common.labels import IGNORE
from mmskip.datasets.common.tokenizer import word_tokenizer
from mmskip.datasets.synthetic.captions import SceneCaptionsConfig, generate_captions

SMALL = SceneCaptionsConfig(train=30, val=3, test=2, pairs=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return generate_captions(tmp_path_factory.mktemp("set"), SMALL, progress=False)


def files(folder, splits=("train", "val")):
    return {
        "captions": {split: str(folder / split / "captions.json") for split in splits},
        "caption_images": {split: str(folder / split / "images") for split in splits},
        "pairs": {split: str(folder / split / "pairs.jsonl") for split in splits},
        "pair_images": {split: str(folder / split / "images") for split in splits},
        "image_size": 48,
    }


def prepared(**settings) -> CaptionData:
    data = CaptionData(**settings)
    data.prepare_data()
    return data


def test_embedded_and_the_same_from_files_give_the_same_batches(folder, tmp_path):
    own = prepared(root=str(tmp_path), generated=SMALL, batch_size=2)
    given = prepared(**files(folder), batch_size=2, tokenizer=None)
    one, two = next(iter(own.train_dataloader())), next(iter(given.train_dataloader()))
    assert one["images"].shape == (2, 3, 48, 48)
    assert torch.equal(one["images"], two["images"])
    for task in ("caption", "entailment"):
        assert one[task].uids == two[task].uids
        said = [
            [data.tokenizer.decode(row[row != IGNORE]) for row in batch[task].labels]
            for data, batch in ((own, one), (given, two))
        ]
        assert said[0] == said[1]
    assert "<unk>" not in "".join(own.tokenizer.batch_decode(one["entailment"].prompt))


def test_a_batch_tells_which_image_each_text_is_about(folder):
    data = prepared(**files(folder), batch_size=3)
    batch = next(iter(data.val_dataloader()))
    entries = {entry.uid: entry for entry in data.entries("val")}
    for task in ("caption", "entailment"):
        texts = batch[task]
        assert texts.image.tolist() == sorted(texts.image.tolist())
        assert texts.prompt_mask.sum() == (texts.prompt != data.tokenizer.pad_token_id).sum()
        for row, (uid, place) in enumerate(zip(texts.uids, texts.image.tolist(), strict=True)):
            entry = entries[batch["image_ids"][place]]
            ids = texts.labels[row][texts.labels[row] != IGNORE]
            assert ids[-1] == data.tokenizer.eos_token_id
            answer = data.tokenizer.decode(ids, skip_special_tokens=True)
            if task == "caption":
                assert uid == entry.uid
                assert answer in entry.captions
            else:
                pair = next(pair for pair in entry.pairs if pair.uid == uid)
                assert answer == ANSWERS[pair.label] == ANSWERS[LABELS[texts.label[row]]]
                assert pair.hypothesis in data.tokenizer.decode(texts.prompt[row])
    captions = batch["caption"].rows([2, 0])
    assert captions.uids == [batch["caption"].uids[2], batch["caption"].uids[0]]


def test_blanked_images_are_zero_and_texts_stay(folder):
    seen, blank = (next(iter(prepared(**files(folder), blank=blank).val_dataloader())) for blank in (False, True))
    assert not blank["images"].any()
    assert torch.equal(seen["caption"].labels, blank["caption"].labels)


def test_karpathys_file_is_split_by_its_own_word(folder, tmp_path):
    official = json.loads((folder / "val" / "captions.json").read_text())
    texts = {row["image_id"]: row["caption"] for row in official["annotations"]}
    images = [
        {"cocoid": i["id"], "filename": i["file_name"], "split": s, "sentences": [{"raw": texts[i["id"]]}]}
        for i, s in zip(official["images"], ("train", "restval", "val"), strict=True)
    ]
    path = tmp_path / "dataset_coco.json"
    path.write_text(json.dumps({"images": images}))
    data = CaptionData(
        captions=dict.fromkeys(("train", "val"), str(path)), caption_images=str(folder / "val/images"), image_size=32
    )
    assert [len(data.entries(split)) for split in ("train", "val")] == [2, 1]


def test_missing_and_broken_images_are_counted(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    images = sorted((copy / "train" / "images").iterdir())
    images[0].unlink()
    images[1].write_bytes(images[1].read_bytes()[:200])
    data = prepared(**files(copy))
    assert len(data.entries("train")) == 28
    assert data.reports["train"].counts == {"image missing": 1 + 2, "image not readable": 1 + 2}


def test_indistinguishable_answers_are_refused():
    with pytest.raises(ValueError, match="does not distinguish yes, maybe, no"):
        CaptionCollate(word_tokenizer(["a cat"]))
    with pytest.raises(ValueError, match="must hold"):
        CaptionCollate(word_tokenizer(["yes maybe no"]), entailment_prompt="is it so?")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"captions": {"dev": "x.json"}}, "some of train, val, test"),
        ({"captions": {"train": "absent.json"}}, "there is no file absent.json"),
        ({"caption_images": "absent"}, "there is no folder 'absent'"),
        ({"captions": None}, "needs captions as well"),
        ({"image_size": None}, "image_size"),
        ({"tasks": ["vqa"]}, "expected some of caption, entailment"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"tokenizer": "no/such_tokenizer"}, "not a local folder with files of transformers"),
    ],
)
def test_bad_settings_are_refused(folder, changed, message):
    with pytest.raises(ValueError, match=message):
        CaptionData(**(files(folder) | changed)).tokenizer  # noqa: B018
