"""The pictures show what the trace says."""

import matplotlib.image
import numpy as np
import pytest
import torch

from mmskip import viz
from mmskip.tracing import ForwardRecord, LayerRecord

FRAMES, TOKENS = 3, 5


def forward(kept: torch.Tensor) -> ForwardRecord:
    """Two blocks, the second routed; a text token before each frame. `kept` [FRAMES, TOKENS]."""
    layout = torch.cat([torch.tensor([-1, *[frame] * TOKENS]) for frame in range(FRAMES)])[None]
    ran = torch.ones_like(layout, dtype=torch.bool)
    ran[layout >= 0] = kept.flatten()
    slots = layout.numel()
    layers = [
        LayerRecord("block.0", slots, slots, slots, slots),
        LayerRecord("block.1", slots, int(ran.sum()), slots, slots, kept=ran),
    ]
    return ForwardRecord(1, slots, layers, layout=layout)


@pytest.fixture
def kept() -> torch.Tensor:
    return torch.rand(FRAMES, TOKENS, generator=torch.Generator().manual_seed(0)) < 0.4


def test_kept_tokens_are_those_of_the_trace_without_text(kept):
    found = viz.kept_tokens(forward(kept))
    assert np.isnan(found[0]).all()
    assert np.array_equal(found[1], kept.numpy())


def test_a_trace_without_routing_is_refused(kept):
    record = forward(kept)
    record.layout = None
    with pytest.raises(ValueError, match="no layout"):
        viz.keep_map(record)


def test_frames_of_different_sizes_are_refused(kept):
    record = forward(kept)
    record.layout[0, 1] = -1
    with pytest.raises(ValueError, match="frames of one size"):
        viz.keep_map(record)


def test_keep_map_draws_every_block_frame_and_token(kept):
    (axes,) = viz.keep_map(forward(kept)).axes
    (image,) = axes.images
    cells = np.asarray(image.get_array())
    assert cells.shape == (2, FRAMES * TOKENS)
    assert np.array_equal(cells[1].astype(bool), kept.flatten().numpy())
    assert [label.get_text() for label in axes.get_yticklabels()] == ["block.0", "block.1"]
    assert "1 of 2 blocks" in axes.get_title(loc="left")
    assert viz.keep_map(forward(kept), max_frames=2).axes[0].images[0].get_array().shape == (2, 2 * TOKENS)


def test_skipped_patches_lose_their_colour_and_kept_ones_do_not():
    kept = torch.zeros(FRAMES, TOKENS, dtype=torch.bool)
    kept[:, 1] = True  # behind CLS: the upper left patch of a 2 x 2 grid
    frames = np.zeros((FRAMES, 8, 8, 3), np.uint8)
    frames[..., 0] = 250
    pictures = [axes.images[0].get_array() for axes in viz.dropped_patches(frames, forward(kept)).axes]
    assert len(pictures) == FRAMES
    for picture in pictures:
        assert np.array_equal(picture[:4, :4], frames[0, :4, :4])
        dropped = np.concatenate([picture[4:].reshape(-1, 3), picture[:4, 4:].reshape(-1, 3)])
        assert (np.ptp(dropped, axis=1) == 0).all()


def test_vision_tokens_that_are_no_grid_are_refused():
    layout = torch.tensor([[0, 0, 0]])
    record = ForwardRecord(1, 3, [LayerRecord("block.0", 3, 1, 3, 3, kept=torch.ones(1, 3).bool())], layout=layout)
    with pytest.raises(ValueError, match="no square grid"):
        viz.dropped_patches(np.zeros((1, 4, 4, 3), np.uint8), record)


def test_quality_stands_over_counted_and_measured_compute(tmp_path):
    points = [
        {"label": "dense", "value": 2.0, "counted": 1.0, "measured": 1.0},
        {"label": "routed", "value": 2.1, "counted": 0.6, "measured": 0.7, "highlight": True},
        {"label": "untimed", "value": 2.2, "counted": 0.6, "measured": None},
    ]
    figure = viz.quality_against_compute(points)
    counted, measured = ([text.get_text() for text in axes.texts] for axes in figure.axes)
    assert sorted(counted) == ["dense", "routed", "untimed"]
    assert sorted(measured) == ["dense", "routed"]
    path = viz.save_png(figure, tmp_path / "new" / "q.png")
    assert matplotlib.image.imread(path).ndim == 3
    assert [file.name for file in path.parent.iterdir()] == ["q.png"]
    with pytest.raises(ValueError, match="at least one point"):
        viz.quality_against_compute([])


def test_series_are_joined_in_the_order_of_their_budget_and_named_once():
    points = [
        {"label": f"{series}-{keep}", "value": 2 - keep, "counted": keep, "measured": 1 - keep, "series": series}
        for series in ("learned", "random")
        for keep in (0.8, 0.2, 0.4)
    ]
    figure = viz.quality_against_compute([*points, {"label": "dense", "value": 1.0, "counted": 1.0}], note="a note")
    axes = figure.axes[1]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["learned", "random"]
    assert [float(x) for x in axes.lines[0].get_xdata()] == pytest.approx([0.8, 0.6, 0.2])
    assert [text.get_text() for text in figure.axes[0].texts] == ["dense"]
    assert figure.get_suptitle() == "a note"


def test_exit_depths_are_drawn_as_shares(tmp_path):
    counts = {"image": {"right": [3, 0, 1], "wrong": [0, 0, 0]}, "decoder": {"right": [1, 1], "wrong": [0, 4]}}
    figure = viz.exit_depths(counts, note="where")
    panels = figure.axes
    assert [axes.get_title(loc="left") for axes in panels] == ["image", "decoder"]
    assert [bar.get_height() for bar in panels[0].patches] == [0.75, 0, 0.25, 0, 0, 0]
    assert [bar.get_height() for bar in panels[1].patches] == [0.5, 0.5, 0, 1]
    assert viz.save_png(figure, tmp_path / "exits.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="at least one"):
        viz.exit_depths({})
