"""The groups of vision-language models: each is what one frame, image or tile fills, by the models' own account."""

import copy

import pytest
import torch
from tiny_processors import PROCESSORS, multi_image, processed
from tiny_vlms import as_groups, collate, example_rows, tiny_vlm
from vlm_configs import ANYRES, GRIDS, IMAGE, VLMS

from mmskip import families
from mmskip.hf.routing.vlm_layout import layout_of_call

CASES = [(name, True) for name in PROCESSORS] + [("smolvlm", False), ("llava_onevision", False), ("internvl", False)]


def layout_of(model, call):
    return layout_of_call(families.find(model).outer, call)


def embeds_of(model, call):
    """What the language model is given, [B, T, D]."""
    seen = []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**{key: value for key, value in call.items() if key != "labels"})
    handle.remove()
    return seen[0]


def pictures_of(name, call):
    """(key, slice) of the pixels of every frame, image or tile."""
    for kind, key in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if key not in call:
            continue
        if name in GRIDS:
            start = 0
            for frames, height, width in call[f"{kind}_grid_thw"].tolist():
                for _ in range(frames):
                    yield key, slice(start, start + height * width)
                    start += height * width
        elif call[key].dim() == 5 and not (name in ANYRES and kind == "image"):
            yield from ((key, (i, j)) for i in range(call[key].shape[0]) for j in range(call[key].shape[1]))
        else:
            yield from ((key, i) for i in range(len(call[key])))


def groups_by_experiment(model, name, call):
    """Per row, the positions that change when the pixels of one picture change."""
    before = embeds_of(model, call)
    groups = [[] for _ in before]
    for key, where in pictures_of(name, call):
        changed = {**call, key: call[key].clone()}
        pixels = changed[key][where]
        if not pixels.any():
            continue  # a filling picture, which the model leaves out
        pixels.copy_(torch.randn(pixels.shape, generator=torch.Generator().manual_seed(1)))
        moved = (embeds_of(model, changed) - before).abs().amax(-1) > 1e-6
        for row, positions in enumerate(moved):
            if positions.any():
                groups[row].append(tuple(positions.nonzero()[:, 0].tolist()))
    return [sorted(row) for row in groups]


@pytest.mark.parametrize(("name", "videos"), CASES)
def test_groups_are_what_each_picture_of_the_real_processor_fills(name, videos):
    model, call = tiny_vlm(name), processed(name, "left" if videos else "right", videos)
    found = as_groups(layout_of(model, call))
    assert found == groups_by_experiment(model, name, call)
    assert sum(map(len, found)) >= 4, "too few pictures to show anything"


def test_several_images_of_a_row_are_not_cut_into_tiles_by_llava_onevision():
    model, call = tiny_vlm("llava_onevision"), multi_image("llava_onevision")
    found = as_groups(layout_of(model, call))
    assert [[len(group) for group in row] for row in found] == [[64], [16, 16]]
    assert found == groups_by_experiment(model, "llava_onevision", call)


@pytest.mark.parametrize(("name", "sizes"), [("qwen2_5_vl", [4, 8]), ("qwen3_vl", [4, 8]), ("video_llama_3", [16, 32])])
def test_adjacent_images_and_frames_of_one_run_are_told_apart_by_their_grids(name, sizes):
    rows = example_rows(name)
    call, _ = collate(name, rows)
    row = layout_of(tiny_vlm(name), call)[1]
    assert [len(group) for group in as_groups(row[None])[0]] == sizes
    if name == "qwen2_5_vl":
        frames = as_groups(layout_of(tiny_vlm(name), call)[3:])[0]
        assert [len(frame) for frame in frames] == [4, 4, 4]
        assert frames[0][-1] + 1 == frames[1][0] and frames[1][-1] + 1 == frames[2][0], "one run of equal ids"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", VLMS)
def test_hand_built_batches_have_the_groups_they_were_built_of(name, side):
    call, layout = collate(name, example_rows(name), side)
    assert as_groups(layout_of(tiny_vlm(name), call)) == as_groups(layout)


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl", "smolvlm"])
def test_ids_do_not_depend_on_padding_or_on_the_other_rows(name):
    model, rows = tiny_vlm(name), example_rows(name)
    call, _ = collate(name, rows, "left")
    together = layout_of(model, call)
    for i, row in enumerate(rows):
        alone = layout_of(model, collate(name, [row])[0])[0]
        assert torch.equal(together[i][call["attention_mask"][i].bool()], alone)


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl", "internvl"])
def test_embeddings_in_the_place_of_ids_give_the_same_groups(name):
    model = tiny_vlm(name)
    call, layout = collate(name, example_rows(name))
    ids = call.pop("input_ids")
    call["inputs_embeds"] = model.get_input_embeddings()(ids)
    assert as_groups(layout_of(model, call)) == as_groups(layout)
    assert layout_of(model, {"inputs_embeds": call["inputs_embeds"]}) is None


def test_placeholders_without_pictures_are_text():
    ids = torch.tensor([[1, IMAGE, IMAGE, 5]])
    assert (layout_of(tiny_vlm("qwen2_5_vl"), {"input_ids": ids}) == -1).all()


def broken(name, change):
    call, _ = collate(name, example_rows(name))
    call = copy.deepcopy(call)
    change(call)
    return call


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen2_5_vl", lambda c: c.pop("image_grid_thw"), "image_grid_thw is missing"),
        ("qwen2_5_vl", lambda c: c["video_grid_thw"].mul_(2), "video tokens"),
        ("qwen2_5_vl", lambda c: c.update(image_grid_thw=c["image_grid_thw"].flip(0)), "would be split"),
        ("qwen3_vl", lambda c: c["video_grid_thw"].copy_(torch.tensor([[2, 4, 6]] * 2)), "would be split"),
        ("llava_onevision", lambda c: c.pop("image_sizes"), "image_sizes is missing"),
        ("llava_onevision", lambda c: c.update(image_sizes=c["image_sizes"].flip(0)), "would be split|image tokens"),
        ("llava_onevision", lambda c: c.update(pixel_values_videos=c["pixel_values_videos"][:, :2]), "video tokens"),
        ("internvl", lambda c: c.update(pixel_values=c["pixel_values"][1:]), "equal size"),
        ("smolvlm", lambda c: c["pixel_values"][1].zero_(), "rows hold|equal size"),
        ("mistral3", lambda c: c.update(image_sizes=c["image_sizes"].flip(1)), "would be split"),
        ("video_llama_3", lambda c: c.update(video_compression_mask=torch.ones(3)), "video_compression_mask has 3"),
    ],
)
def test_calls_that_do_not_agree_are_refused(name, change, message):
    with pytest.raises(ValueError, match=message) as error:
        layout_of(tiny_vlm(name), broken(name, change))
    assert "layout=" in str(error.value)
