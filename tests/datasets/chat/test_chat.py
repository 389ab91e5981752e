"""Chat data: both file formats, labels on the assistant's words alone, packing, broken files, order."""

import json
from pathlib import Path

import pytest
import torch
from chat_data import SMALL, chat_data
from PIL import Image

from mmskip.datasets.chat.batches import ChatLoader, last_answer
from mmskip.datasets.chat.format import Medium, parse_chat, read_records
from mmskip.datasets.chat.index import ChatIndex, pack_rows
from mmskip.datasets.chat.labels import ChatLabels
from mmskip.datasets.chat.module import ChatData
from mmskip.datasets.synthetic.chat import (
    TEMPLATE,
    SceneChatConfig,
    generate_chat,
    scene_of,
    scene_processor,
)
from mmskip.train.metrics.majority import blind_baseline

UNMARKED = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("chat")
    chat_data(root)
    return root


@pytest.fixture(scope="module")
def processor_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("processor")
    scene_processor(SMALL).save_pretrained(folder)
    return folder


def learned(data: ChatData, batch: dict) -> list[str]:
    """The labelled words of each row."""
    return [data.processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]


def own_files(folder: Path, records: list[dict], name: str = "own.jsonl") -> dict[str, str]:
    (folder / name).write_text("\n".join(json.dumps(record) for record in records))
    return {"train": str(folder / name)}


def record(image: str = "a.png", answer: str = "red", **extra) -> dict:
    question = [{"type": "image", "path": image}, {"type": "text", "text": "what colour is the ring?"}]
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **extra}


def picture(path: Path, size: int = 48) -> None:
    Image.new("RGB", (size, size), (200, 10, 10)).save(path)


# --- the embedded set -------------------------------------------------------------------------------------------------


def test_the_embedded_set_is_the_same_on_every_run_and_its_answers_are_true(made, tmp_path):
    folder = made / f"chat-{SMALL.id}"
    again = generate_chat(tmp_path / "again", SMALL, progress=False)
    for path in sorted(again.rglob("*.*")):
        assert path.read_bytes() == (folder / path.relative_to(again)).read_bytes()
    for index in range(SMALL.train):
        scene, _ = scene_of(SMALL, "train", index)
        answers = dict(scene.turns)
        if not scene.is_clip:
            # what enters in the first moment still stands outside
            present = [t for t in scene.world.things if 0 in t.path and all(0 <= at < 3 for at in t.path[0])]
            assert answers["how many objects are there?"] == ["one", "two", "three", "four"][len(present) - 1]
            for question, answer in scene.turns:
                if question.startswith("what colour"):
                    shape = question.split()[-1].rstrip("?")
                    assert [thing.colour for thing in present if thing.shape == shape] == [answer]


def test_no_answer_can_be_read_off_another_turn_and_guessing_fails(made):
    for index in range(200):
        scene, _ = scene_of(SceneChatConfig(), "train", index)
        if not scene.is_clip:
            place = next(answer for question, answer in scene.turns if "at the" in question)
            asked = [
                question.split()[-1].rstrip("?") for question, _ in scene.turns if question.startswith("what colour")
            ]
            assert place.split()[1] not in asked
    assert blind_baseline(made / f"chat-{SMALL.id}") < 0.5


def test_another_set_in_the_folder_is_refused(made):
    with pytest.raises(ValueError, match="other settings"):
        generate_chat(made / f"chat-{SMALL.id}", SceneChatConfig(train=3))


@pytest.mark.parametrize("settings", [{"train": 0}, {"clips": 2}, {"image_size": 50}, {"max_objects": 9}])
def test_settings_out_of_range_are_named(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        SceneChatConfig(**settings)


# --- formats ----------------------------------------------------------------------------------------------------------


def test_both_formats_and_all_places_of_paths_mean_the_same(tmp_path):
    llava = {
        "id": "x",
        "image": ["a.png", "b.png"],
        "video": "c.mp4",
        "conversations": [
            {"from": "system", "value": "be short"},
            {"from": "human", "value": "<image>\n<image>\nwhat differs?"},
            {"from": "gpt", "value": "the ring"},
            {"from": "human", "value": "and in the clip? <video>"},
            {"from": "gpt", "value": "nothing"},
        ],
    }

    def text(words):
        return {"type": "text", "text": words}

    def messages(a, b, c):
        return [
            {"role": "system", "content": "be short"},
            {"role": "user", "content": [a, b, text("what differs?")]},
            {"role": "assistant", "content": "the ring"},
            {"role": "user", "content": [text("and in the clip?"), c]},
            {"role": "assistant", "content": [text("nothing")]},
        ]

    image, video = {"type": "image"}, {"type": "video"}
    inside = messages(image | {"path": "a.png"}, image | {"image": "b.png"}, video | {"url": "c.mp4"})
    records = [
        llava,
        {"id": "x", "messages": inside},
        {
            "id": "x",
            "messages": messages(image, image, video),
            "images": ["a.png", {"path": "b.png"}],
            "videos": ["c.mp4"],
        },
    ]
    first, *others = [parse_chat(item, tmp_path, "?") for item in records]
    assert first.media == (
        Medium("image", tmp_path / "a.png"),
        Medium("image", tmp_path / "b.png"),
        Medium("video", tmp_path / "c.mp4"),
    )
    assert all(other == first for other in others)
    assert last_answer(first) == "nothing"


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"text": "x"}, "no 'messages'"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "no assistant turn"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "'robot'"),
        ({"messages": [{"role": "user", "text": "hi"}]}, "neither 'content'"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "type text, image or video"),
        ({"messages": record()["messages"], "image": "b.png"}, "without a place"),
        ({"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]}, "more places"),
    ],
)
def test_a_record_that_is_none_says_why(item, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        parse_chat(item, tmp_path, "file#3")


def test_a_file_that_is_no_json_names_the_line(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{broken\n')
    with pytest.raises(ValueError, match="line 2"):
        read_records(tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match="there is no file"):
        read_records(tmp_path / "y.jsonl")


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [TEMPLATE, UNMARKED], ids=["marked", "appended"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_labels_are_the_assistants_words_and_their_end(made, template, side):
    data = chat_data(made, batch_size=4, padding_side=side, chat_template=template)
    records = read_records(made / f"chat-{SMALL.id}" / "val.jsonl")
    (batch,) = list(_batches(data, "val"))
    for item, words in zip(records, learned(data, batch), strict=True):
        answers = [m["content"][0]["text"] for m in item["messages"] if m["role"] == "assistant"]
        assert words.split() == " ".join(f"{answer} <end>" for answer in answers).split()
    same = batch["labels"] == batch["input_ids"]
    assert bool((same | (batch["labels"] == -100)).all())
    assert not batch["labels"][batch["attention_mask"] == 0].ne(-100).any()


def _batches(data: ChatData, split: str):
    loader = data.train_dataloader() if split == "train" else data.val_dataloader()
    yield from loader


def test_media_in_later_turns_do_not_shift_the_labels(tmp_path, processor_folder):
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)

    def turns(first, second):
        return [
            {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": "what colour?"}]},
            {"role": "assistant", "content": first},
            {"role": "user", "content": [{"type": "text", "text": "what is"}, {"type": "image", "path": "b.png"}]},
            {"role": "assistant", "content": second},
        ]

    # the same words in both answers, and an answer that stands in a question as well
    records = [{"messages": turns("red", "red")}, {"messages": turns("what is", "red ring")}]
    for template in (None, UNMARKED):
        data = ChatData(
            str(tmp_path), files=own_files(tmp_path, records), processor=str(processor_folder), chat_template=template
        )
        data.prepare_data()
        batch = data.collate()(list(data.dataset("train")))
        assert learned(data, batch) == ["red <end> red <end>", "what is <end> red ring <end>"]


def test_a_placeholder_that_is_no_token_is_cut_out_like_one_that_is(made):
    """SmolVLM writes <video>, which its tokenizer does not know."""
    records = read_records(made / f"chat-{SMALL.id}" / "train.jsonl")
    chats = [parse_chat(item, made, str(index)) for index, item in enumerate(records)]
    assert any(chat.of("video") for chat in chats)
    usual, other = scene_processor(SMALL), scene_processor(SMALL)
    usual.chat_template, other.video_token = UNMARKED, "<clip>"
    other.chat_template = UNMARKED.replace("<{{ part['type'] }}>", "<{{ part['type'].replace('video', 'clip') }}>")
    found = []
    for processor in (usual, other):
        labels = ChatLabels(processor)
        found.append([labels.runs(chat, labels.render(chat.messages)) for chat in chats])
    assert found[0] == found[1]


def test_packing_is_refused_where_masks_follow_token_types(made):
    data = chat_data(made)
    collate = data.collate(pack=True)
    tensors = {"token_type_ids": torch.zeros(1, 2), "attention_mask": torch.ones(1, 2)}
    with pytest.raises(ValueError, match="token_type_ids"):
        collate._packed(tensors, [1])


@pytest.mark.filterwarnings("ignore:train")
def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path, processor_folder):
    picture(tmp_path / "a.png")
    twice = record()["messages"] + [{"role": "user", "content": "again"}, {"role": "assistant", "content": "red"}]
    forgets = UNMARKED.replace("{% for message in messages %}", "{% for message in messages[-2:] %}")
    files = own_files(tmp_path, [{"messages": twice}])
    data = ChatData(str(tmp_path), files=files, processor=str(processor_folder), chat_template=forgets)
    with pytest.raises(ValueError, match="generation"):
        data.prepare_data()


def test_a_processor_without_a_template_is_refused():
    processor = scene_processor(SMALL)
    processor.chat_template = processor.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        ChatLabels(processor)


# --- own files --------------------------------------------------------------------------------------------------------


def test_broken_and_long_conversations_are_left_out_counted_and_reported(tmp_path, processor_folder):
    picture(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    records = [
        record(),
        record("b.png"),
        record("missing.png"),
        record(answer="red " * 300),
        {"messages": [{"role": "user", "content": "hi"}]},
        record(),
    ]
    arguments = {"files": own_files(tmp_path, records), "processor": str(processor_folder), "max_tokens": 200}
    data = ChatData(str(tmp_path / "root"), **arguments)
    with pytest.warns(UserWarning, match="conversations are used") as caught:
        data.prepare_data()
    warned = " ".join(str(warning.message) for warning in caught)
    assert "2 of 6 conversations are used" in warned
    assert "1 bad records" in warned and "2 broken" in warned and "1 longer than max_tokens=200" in warned
    assert "b.png" in warned
    assert data.indices["train"].usable == [0, 5]
    assert len(list(data.train_dataloader())) == 1
    # what was found is kept: a second run reads no picture
    (tmp_path / "a.png").unlink()
    again = ChatData(str(tmp_path / "root"), **arguments)
    with pytest.warns(UserWarning, match="2 of 6"):
        again.prepare_data()


def test_a_file_without_any_usable_conversation_is_refused(tmp_path, processor_folder):
    data = ChatData(str(tmp_path), files=own_files(tmp_path, [record("missing.png")]), processor=str(processor_folder))
    with (
        pytest.raises(ValueError, match=r"no usable conversation.*missing\.png"),
        pytest.warns(UserWarning, match="broken"),
    ):
        data.prepare_data()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"files": {"train": "nowhere.jsonl"}, "processor": "x"}, "no file nowhere"),
        ({"files": {"training": "x"}, "processor": "x"}, "unknown splits training"),
        ({"files": {}, "processor": "x"}, "files is empty"),
        ({"media_dir": "."}, "needs files"),
        ({"pack": True}, "needs max_tokens"),
        ({"padding_side": "top"}, "padding_side"),
        ({"max_frames": 0}, "max_frames"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ChatData(**arguments)


def test_a_processor_that_is_not_here_is_named(tmp_path):
    picture(tmp_path / "a.png")
    data = ChatData(str(tmp_path), files=own_files(tmp_path, [record()]), processor=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="none"):
        data.prepare_data()


def test_long_videos_are_sampled_sparsely(made):
    records = read_records(made / f"chat-{SMALL.id}" / "train.jsonl")
    chat = next(c for i, r in enumerate(records) if (c := parse_chat(r, made / f"chat-{SMALL.id}", str(i))).of("video"))
    labels = ChatLabels(scene_processor(SMALL))
    assert [len(ChatLoader(labels, 4.0, limit)(chat).videos[0]) for limit in (16, 2, 1)] == [4, 2, 1]


def test_blank_pictures_are_black(made):
    data = chat_data(made, blank=True, batch_size=12)
    batch = next(iter(data.train_dataloader()))
    for key in ("pixel_values", "pixel_values_videos"):
        assert batch[key].unique().numel() <= 3  # one value per channel


# --- order and packing ------------------------------------------------------------------------------------------------


def test_ranks_share_the_samples_and_an_epoch_has_its_own_order(made):
    data = chat_data(made, batch_size=1)
    orders = []
    for rank in range(2):
        data._ranks = lambda rank=rank: (2, rank)
        loader = data.train_dataloader()
        epochs = []
        for epoch in range(2):
            loader.sampler.set_epoch(epoch)
            epochs.append([uid for batch in loader for uid in batch["uid"]])
        orders.append(epochs)
    for epoch in range(2):
        assert len({*orders[0][epoch], *orders[1][epoch]}) == SMALL.train
    assert orders[0][0] != orders[0][1]


def test_an_epoch_goes_on_in_its_middle(made):
    data = chat_data(made, batch_size=2)
    uids = [batch["uid"] for batch in data.train_dataloader()]
    loader = data.train_dataloader()
    loader.load_state_dict({"taken": 2})
    assert [batch["uid"] for batch in loader] == uids[2:]


def test_packed_rows_hold_every_conversation_once_and_no_row_is_too_long():
    index = ChatIndex([30, 50, 20, 70, 10, 40], [0, 1, 2, 3, 5])
    rows = pack_rows(index, 80, seed=1)
    assert sorted(n for row in rows for n in row) == [0, 1, 2, 3, 5]
    assert all(sum(index.lengths[n] for n in row) <= 80 for row in rows)
    assert len(rows) == 3
    assert rows == pack_rows(index, 80, seed=1)


def test_a_packed_row_is_its_conversations_one_behind_the_other(made):
    packed, plain = chat_data(made, pack=True, max_tokens=200, batch_size=50), chat_data(made, batch_size=1)
    batch = next(iter(packed.train_dataloader()))
    alone = {b["uid"][0]: b for b in plain.train_dataloader()}
    assert "attention_mask" not in batch
    assert any("+" in uid for uid in batch["uid"])
    pixels = iter(batch["pixel_values"])
    for row, uid in enumerate(batch["uid"]):
        parts = [alone[name] for name in uid.split("+")]
        for key in ("input_ids", "labels"):
            line = torch.cat([part[key][0] for part in parts])
            assert torch.equal(batch[key][row, : len(line)], line)
            assert not batch["labels"][row, len(line) :].ne(-100).any()
        starts = (batch["position_ids"][row] == 0).nonzero().flatten().tolist()
        lengths = torch.tensor([part["input_ids"].shape[1] for part in parts]).cumsum(0).tolist()
        assert starts[: len(parts)] == [0, *lengths[:-1]]
        for part in parts:
            for picture_of_part in part.get("pixel_values", ()):
                assert torch.equal(next(pixels), picture_of_part)
