"""The cache of running streams: several at their own pace, bounded by a window, equal to a naive full forward."""

import copy

import numpy as np
import pytest
import torch
from naive_stream import naive_stream_logits
from tiny_decoders import VOCAB, randomize_routers, routers_of, tiny_decoder

import mmskip
from mmskip import families
from mmskip.hf.streaming.cache import StreamCache
from mmskip.hf.streaming.slot_ledger import bound_entries
from mmskip.ops.hf_attention import register_attention

FRAME = 5
NAIVE = ("llama", "qwen3", "mistral_window", "qwen3_mixed_window", "phi3", "smollm3", "cohere", "stablelm", "olmo2")
# per call and stream: tokens of text and whether a frame follows; a stream may rest, or bring a long text
PLAN = [
    ((3, True), (6, True)),
    ((1, True), (1, True)),
    ((1, True), (4, False)),
    ((1, True), (0, False)),
    ((9, False), (1, True)),
    ((1, True), (1, True)),
    ((1, False), (1, True)),
    ((1, True), (0, False)),
    ((1, True), (1, True)),
]


def build(name: str, routed: bool, keep: float = 0.4, **overrides):
    model = tiny_decoder(name, **overrides)
    base = copy.deepcopy(model)
    if routed:
        mmskip.apply_(model, mmskip.MoDConfig(keep=keep, gate="sigmoid"))
        randomize_routers(model)
    return model, base


class Feeder:
    """Feeds two streams of random tokens by a plan, and remembers what it fed."""

    def __init__(self, model, **settings):
        self.model = model
        self.cache = StreamCache(families.find(model), 2, unit_tokens=FRAME + 9, **settings)
        self.ids, self.layouts = ([[], []] for _ in range(2))
        self.bases, self.logits = ([[], []] for _ in range(2))
        self.frames = [0, 0]
        self.draw = np.random.default_rng(0)

    def call(self, step) -> None:
        lines, layouts = [], []
        for row, (text, frame) in enumerate(step):
            count = text + FRAME * frame
            lines.append(self.draw.integers(3, VOCAB, count).tolist())
            layouts.append([-1] * text + [self.frames[row]] * FRAME * frame)
            self.frames[row] += frame
        lengths = [len(line) for line in lines]
        ids = torch.tensor([line + [0] * (max(lengths) - len(line)) for line in lines])
        layout = np.array([line + [-1] * (max(lengths) - len(line)) for line in layouts])
        announced = self.cache.begin(layout, lengths, self.model.dtype)
        extra = {"layout": torch.from_numpy(layout)} if mmskip.applied(self.model) else {}
        with torch.no_grad():
            out = self.model(inputs_embeds=self.model.get_input_embeddings()(ids), **announced, **extra)
        for row, length in enumerate(lengths):
            self.ids[row] += lines[row]
            self.layouts[row] += layouts[row]
            self.bases[row] += [self.cache.bases[row]] * length
            self.logits[row].append(out.logits[row, :length])

    def expect(self, base, row: int, keep: float = 0.4, bases: bool = False) -> torch.Tensor:
        embeds = base.get_input_embeddings()(torch.tensor(self.ids[row]))
        with torch.no_grad():
            return naive_stream_logits(
                base,
                routers_of(self.model),
                embeds,
                torch.tensor(self.layouts[row]),
                keep,
                "sigmoid",
                self.cache.window,
                self.cache.sinks,
                self.bases[row] if bases else None,
            )


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("window", [None, 13])
@pytest.mark.parametrize("name", NAIVE)
def test_streams_at_their_own_pace_equal_the_full_forward_under_the_window(name, routed, window):
    model, base = build(name, routed)
    feeder = Feeder(model, window=window, sinks=2 if window else 0)
    for step in PLAN:
        feeder.call(step)
    for row in range(2):
        got = torch.cat(feeder.logits[row])
        torch.testing.assert_close(got, feeder.expect(base, row), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("name", NAIVE)
def test_rolling_positions_equal_a_reference_that_turns_keys_back(name, routed):
    model, base = build(name, routed)
    feeder = Feeder(model, window=13, sinks=2, positions="rolling", position_range=35)
    for step in PLAN * 2:
        feeder.call(step)
    for row in range(2):
        assert len(set(feeder.bases[row])) > 2, "positions never began again: the test shows nothing"
        assert max(place - base for place, base in enumerate(feeder.bases[row])) < 35
        got = torch.cat(feeder.logits[row])
        torch.testing.assert_close(got, feeder.expect(base, row, bases=True), atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("name", ["gemma2", "gemma3_text", "opt", "granite", "qwen3_moe"])
@pytest.mark.parametrize("routed", [False, True])
def test_other_decoders_stream_as_they_compute_at_once(name, routed):
    model, _ = build(name, routed)
    feeder = Feeder(model)
    for step in PLAN:
        feeder.call(step)
    for row in range(2):
        layout = {"layout": torch.tensor([feeder.layouts[row]])} if routed else {}
        with torch.no_grad():
            expected = model(torch.tensor([feeder.ids[row]]), **layout).logits[0]
        torch.testing.assert_close(torch.cat(feeder.logits[row]), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("attention", ["eager", "mmskip_ragged"])
@pytest.mark.parametrize("name", ["llama", "qwen3_mixed_window"])
def test_every_backend_gives_the_same(name, attention):
    register_attention()
    model, base = build(name, True)
    model.set_attn_implementation(attention)
    feeder = Feeder(model, window=13, sinks=2)
    for step in PLAN:
        feeder.call(step)
    torch.testing.assert_close(torch.cat(feeder.logits[0]), feeder.expect(base, 0), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("routed", [False, True])
def test_a_call_that_is_cropped_and_fed_again_leaves_no_trace(routed):
    model, base = build("llama", routed)
    feeder = Feeder(model, window=15, sinks=2)
    for step in PLAN[:5]:
        feeder.call(step)
    kept = [len(row) for row in feeder.ids]
    feeder.call(((2, True), (1, True)))
    assert feeder.cache.totals == [kept[0] + 2 + FRAME, kept[1] + 1 + FRAME]
    feeder.cache.crop_stream(0, kept[0])
    feeder.cache.crop_stream(1, kept[1] + 1)
    for row, end in ((0, kept[0]), (1, kept[1] + 1)):
        feeder.ids[row], feeder.layouts[row] = feeder.ids[row][:end], feeder.layouts[row][:end]
        feeder.logits[row] = [torch.cat(feeder.logits[row])[:end]]
        feeder.frames[row] -= 1
    for step in PLAN[5:]:
        feeder.call(step)
    for row in range(2):
        torch.testing.assert_close(torch.cat(feeder.logits[row]), feeder.expect(base, row), atol=2e-5, rtol=2e-5)


def test_only_the_last_call_can_be_undone():
    model, _ = build("llama", True)
    feeder = Feeder(model)
    for step in PLAN[:2]:
        feeder.call(step)
    with pytest.raises(ValueError, match="only its last call"):
        feeder.cache.crop_stream(0, 2)


def test_a_routed_layer_stores_what_it_processed_and_no_padding():
    model, _ = build("llama", True, keep=0.4)
    feeder = Feeder(model)
    feeder.call(((3, True), (6, False)))
    feeder.call(((1, True), (0, False)))
    dense, routed = feeder.cache.layers[0], feeder.cache.layers[1]
    assert dense.ledger.counts == [4 + 2 * FRAME, 6]
    assert routed.ledger.counts == [4 + 2 * 2, 6]
    entry = 2 * model.config.num_key_value_heads * model.config.head_dim * 4
    assert routed.stored_bytes == 14 * entry
    assert feeder.cache.stored_bytes == 2 * (20 + 14) * entry
    assert routed.reserved_bytes >= routed.stored_bytes


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("routed", [False, True])
def test_a_window_bounds_the_buffers_of_a_long_stream(routed, sinks):
    model, _ = build("llama", routed, num_hidden_layers=2, max_position_embeddings=64)
    feeder = Feeder(model, window=20, sinks=sinks, positions="rolling")
    # keys and values, heads, width, fp32, streams
    limit = bound_entries(20, sinks, FRAME, 2 + FRAME) * 2 * 2 * 8 * 4 * 2 * 2
    sizes = []
    for index in range(120):
        feeder.call(((1, True), (index % 3, index % 3 == 0)))
        sizes.append(feeder.cache.reserved_bytes)
    assert feeder.cache.totals[0] == 120 * (1 + FRAME) > 10 * 64
    assert max(sizes) <= limit
    assert max(sizes[20:]) <= max(sizes[60:]) * 1.2


def test_a_stream_beyond_the_range_is_refused_before_anything_changes():
    model, _ = build("llama", True, max_position_embeddings=20)
    feeder = Feeder(model)
    for step in PLAN[:2]:
        feeder.call(step)
    totals, stored = list(feeder.cache.totals), feeder.cache.stored_bytes
    with pytest.raises(ValueError, match=r"stream 1 would be 21 tokens long, the model has 20.*rolling"):
        feeder.call(((1, False), (4, False)))
    assert (feeder.cache.totals, feeder.cache.stored_bytes) == (totals, stored)
    feeder.call(((1, False), (1, False)))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("llama", {"positions": "rolling"}, "needs a window"),
        ("llama", {"positions": "rolling", "window": 500}, "does not fit into the 512 positions"),
        ("llama", {"positions": "relative"}, "'relative'; expected one of absolute, rolling"),
        ("opt", {"positions": "rolling", "window": 20}, "no rotary position embeddings"),
    ],
)
def test_impossible_settings_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        Feeder(tiny_decoder(name), **settings)


def test_frequencies_that_change_with_the_length_cannot_roll():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(ValueError, match="change with the length"):
        Feeder(tiny_decoder("llama", rope_parameters=rope), positions="rolling", window=20)


def test_a_cache_that_was_not_announced_to_is_refused():
    model, _ = build("llama", False)
    feeder = Feeder(model)
    feeder.call(PLAN[0])
    with pytest.raises(RuntimeError, match="not announced"):
        model(torch.ones(2, 1, dtype=torch.long), past_key_values=feeder.cache)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "mmskip_ragged"])
@pytest.mark.parametrize("routed", [False, True])
def test_a_first_call_without_padding_is_causal_under_every_backend(attention, routed):
    """Models with windowed and full blocks take the masks they are given, and no mask at all shows them the future."""
    register_attention()
    model, base = build("qwen3_mixed_window", routed)
    model.set_attn_implementation(attention)
    feeder = Feeder(model)
    for step in [((3, True), (3, True)), *PLAN[1:4]]:
        feeder.call(step)
    torch.testing.assert_close(torch.cat(feeder.logits[0]), feeder.expect(base, 0), atol=2e-5, rtol=2e-5)
