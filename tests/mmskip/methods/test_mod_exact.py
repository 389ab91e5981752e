"""Mixture-of-depths routing gives what its definition says, in one forward."""

import copy

import contract
import pytest
import torch
from masked_reference import masked_logits
from mod_cases import CORE, example, families, routed
from naive_mod import naive_logits
from tiny_decoders import DECODERS, PLACED, VOCAB, mlp_scores, pad_rows, routers_of, stream_layout, tiny_decoder

import mmskip

# the naive reference embeds and normalises by itself, which most families do in ways of their own
REFERENCE = ("llama", "qwen3", "mistral_window", "qwen3_mixed_window", "mixtral", "granite", "cohere", "stablelm")


@pytest.mark.parametrize(("name", "gate"), families(("tanh", "none"), "tanh"))
def test_keep_everything_with_unit_gate_is_the_base_model_bit_for_bit(name, gate):
    model = tiny_decoder(name)
    base = copy.deepcopy(model)
    mmskip.apply_(model, mmskip.MoDConfig(keep=1.0, gate=gate))
    ids, layout = example()
    with torch.no_grad(), mmskip.trace(model) as trace:
        assert torch.equal(model(ids, layout=layout).logits, base(ids).logits)
    assert any(layer.kept is not None for layer in trace.forwards[0].layers), "went round the routing path"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CORE)
def test_keep_everything_is_bit_for_bit_in_a_padded_batch_too(name, side):
    model = tiny_decoder(name)
    base = copy.deepcopy(model)
    mmskip.apply_(model, mmskip.MoDConfig(keep=1.0))
    layouts = [stream_layout(4), stream_layout(2)]
    ids = pad_rows([torch.randint(3, VOCAB, row.shape) for row in layouts], 0, side)
    mask = pad_rows([torch.ones_like(row) for row in layouts], 0, side)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, layout=pad_rows(layouts, -1, side)).logits
        assert torch.equal(out[mask.bool()], base(ids, attention_mask=mask).logits[mask.bool()])


@pytest.mark.parametrize("name", REFERENCE)
@pytest.mark.parametrize(("keep", "gate", "always"), [(0.3, "sigmoid", "none"), (0.2, "linear", "last")])
def test_routing_equals_the_naive_reference(name, keep, gate, always):
    model, base = routed(name, keep, gate, always_keep=always)
    ids, layout = example()
    with torch.no_grad():
        out = model(ids, layout=layout).logits[0]
        expected = naive_logits(base, routers_of(model), ids[0], layout[0], keep, gate, always == "last")
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(out, base(ids).logits[0], atol=1e-3), "routing changed nothing: the test shows nothing"


@pytest.mark.parametrize("gate", ["tanh", "none"])
@pytest.mark.parametrize("name", ["llama", "mistral_window"])
def test_routing_by_an_mlp_equals_the_naive_reference_with_and_without_a_cache(name, gate):
    model, base = routed(name, 0.3, gate, router="mlp", router_hidden=5)
    ids, layout = example()
    routers = {i: mlp_scores(model.model.layers[i].mmskip_router) for i in routers_of(model)}
    start = int((layout[0] == 3).nonzero()[0])  # a frame stays whole
    with torch.no_grad():
        out = model(ids, layout=layout).logits[0]
        expected = naive_logits(base, routers, ids[0], layout[0], 0.3, gate)
        first = model(ids[:, :start], layout=layout[:, :start], use_cache=True)
        rest = model(ids[:, start:], layout=layout[:, start:], past_key_values=first.past_key_values).logits[0]
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rest, out[start:], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(out, base(ids).logits[0], atol=1e-3), "routing changed nothing: the test shows nothing"


@pytest.mark.parametrize("name", DECODERS)
def test_routing_equals_dense_blocks_that_cannot_see_the_tokens_left_out(name):
    model, base = routed(name)
    ids, layout = example()
    with torch.no_grad():
        out = model(ids, layout=layout).logits
        dense = base(ids).logits
        expected = masked_logits(base, routers_of(model), ids, layout, 0.3, "sigmoid")
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(out, dense, atol=1e-3), "routing changed nothing: the test shows nothing"


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral_window"])
def test_gradients_equal_the_naive_reference(name):
    model, base = routed(name, gate="linear")
    ids, layout = example(3)
    weights = {i: w.detach().clone().requires_grad_() for i, w in routers_of(model).items()}
    target = torch.randn(ids.shape[1], VOCAB, generator=torch.Generator().manual_seed(5))
    (model(ids, layout=layout).logits[0] * target).sum().backward()
    (naive_logits(base, weights, ids[0], layout[0], 0.3, "linear") * target).sum().backward()
    ours, theirs = dict(model.named_parameters()), dict(base.named_parameters())
    for key, parameter in theirs.items():
        torch.testing.assert_close(ours[key].grad, parameter.grad, atol=1e-4, rtol=1e-4, msg=key)
    for i, weight in weights.items():
        torch.testing.assert_close(
            ours[f"model.layers.{i}.mmskip_router.weight"].grad, weight.grad, atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_rows_of_a_batch_equal_each_row_alone(name, side):
    check_rows(name, side, "linear")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CORE)
@pytest.mark.parametrize("router", ["norm", "random", "uniform"])
def test_rows_equal_each_row_alone_under_routers_without_weights(name, side, router):
    check_rows(name, side, router)


def check_rows(name, side, router):
    model, _ = routed(name, router=router, gate="sigmoid")
    layouts = [stream_layout(4), stream_layout(2, tokens=7, text=3), torch.full((9,), -1), stream_layout(1, lead=20)]
    rows = [torch.randint(3, VOCAB, row.shape) for row in layouts]
    mask = pad_rows([torch.ones_like(row) for row in layouts], 0, side)
    places = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if name in PLACED else {}
    with torch.no_grad():
        batch = model(pad_rows(rows, 0, side), attention_mask=mask, layout=pad_rows(layouts, -1, side), **places).logits
        for i, (row, layout) in enumerate(zip(rows, layouts, strict=True)):
            alone = model(row[None], layout=layout[None]).logits[0]
            torch.testing.assert_close(batch[i][mask[i].bool()], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_packed_sequences_do_not_see_each_other(name):
    model, _ = routed(name)
    model.config.use_cache = False
    layouts = [stream_layout(2), stream_layout(3)]
    rows = [torch.randint(3, VOCAB, row.shape) for row in layouts]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    packed_layout = torch.cat([layouts[0], layouts[1] + 10 * (layouts[1] >= 0)])[None]
    with torch.no_grad():
        packed = model(torch.cat(rows)[None], position_ids=positions, layout=packed_layout).logits[0]
        alone = [model(row[None], layout=layout[None]).logits[0] for row, layout in zip(rows, layouts, strict=True)]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_rotary_positions_are_the_original_ones():
    model, base = routed("llama")
    ids, layout = example(3)
    with torch.no_grad():
        shifted = model(ids, layout=layout, position_ids=torch.arange(ids.shape[1])[None] * 3).logits[0]
        expected = naive_logits(
            base, routers_of(model), ids[0], layout[0], 0.3, "sigmoid", positions=torch.arange(ids.shape[1]) * 3
        )
    torch.testing.assert_close(shifted, expected, atol=1e-5, rtol=1e-5)


def test_selection_is_per_frame():
    model, _ = routed("llama", keep=0.3)
    ids, layout = example(5)
    with mmskip.trace(model) as trace:
        model(ids, layout=layout)
    kept = trace.forwards[0].layers[1].kept[0]
    assert [int(kept[layout[0] == frame].sum()) for frame in range(5)] == [3] * 5
    assert kept[layout[0] < 0].all()


def test_bfloat16_follows_the_selections_of_its_own_scores():
    model, _ = routed("llama")
    ids, layout = example(4)
    with torch.no_grad(), mmskip.trace(model) as exact:
        expected = model(ids, layout=layout).logits
    model.to(torch.bfloat16)
    with torch.no_grad(), mmskip.trace(model) as rounded:
        out = model(ids, layout=layout).logits
    assert out.dtype == torch.bfloat16
    pairs = zip(exact.forwards[0].layers, rounded.forwards[0].layers, strict=True)
    flipped = [(a.kept != b.kept).float().mean().item() for a, b in pairs if a.kept is not None]
    assert max(flipped) < 0.1, f"share of flipped selections per layer: {flipped}"
    if not any(flipped):
        torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("name", ["llama", "mistral_window"])
def test_routed_blocks_compile_without_a_graph_break(name):
    model, _ = routed(name)
    ids, layout = example(2)
    model.config.use_cache = False
    with torch.no_grad():
        expected = model(ids, layout=layout).logits
        for block in model.model.layers:
            block.compile(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(model(ids, layout=layout).logits, expected, atol=1e-5, rtol=1e-5)


CONTRACT = [
    contract.Case(
        contract.DECODER,
        mmskip.MoDConfig(layers=(1, 3), keep=0.3, gate="sigmoid"),
        mmskip.MoDConfig(keep=1.0),
        {"keep": 0, "noise": -1, "seed": -1, "router": "best", "keep_floor": 2, "router_hidden": 0, "layers": "odd"},
        call=contract.ROUTED,
        trains=True,
    ),
    contract.Case(
        contract.VLM,
        mmskip.MoDConfig(layers=(1, 3), keep=0.3, gate="sigmoid"),
        mmskip.MoDConfig(keep=1.0),
        {"keep": 1.5, "gate": "relu"},
    ),
]
