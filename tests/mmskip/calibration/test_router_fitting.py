"""Routers fitted to the attention that tokens receive, and gates with separate weights."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from mod_cases import example, routed
from tiny_decoders import VOCAB, pad_rows, stream_layout, tiny_decoder

import mmskip
from mmskip.calibration.router_fitting import _Frames, fit_routers
from mmskip.methods.mixture_of_depths import find_policies
from mmskip.ops.hf_attention import register_attention
from mmskip.tokens.groups import token_groups

NAMES = ("llama", "mistral_window", "gemma2", "gpt_oss")


def batches():
    """Two padded calls with the queries whose attention counts: the text after the first frame."""
    calls = []
    for seed in range(2):
        layouts = [stream_layout(3), stream_layout(2, tokens=6)]
        side = ("left", "right")[seed]
        generator = torch.Generator().manual_seed(seed)
        layout = pad_rows(layouts, -1, side)
        mask = pad_rows([torch.ones_like(row) for row in layouts], 0, side)
        ids = torch.randint(3, VOCAB, layout.shape, generator=generator)
        queries = (layout < 0) & mask.bool() & (mask.cumsum(1) > 9)
        calls.append(({"input_ids": ids, "attention_mask": mask, "layout": layout}, queries))
    return calls


def naive_weights(base, calls, index, ridge):
    """One token at a time, from the attention maps of the untouched model."""
    xs, ys = [], []
    for inputs, queries in calls:
        out = base(inputs["input_ids"], attention_mask=inputs["attention_mask"], output_attentions=True,
                   output_hidden_states=True, use_cache=False)  # fmt: skip
        for row, layout in enumerate(inputs["layout"]):
            received = sum(out.attentions[index][row].mean(0)[place] for place in queries[row].nonzero()[:, 0])
            for frame in layout[layout >= 0].unique():
                places = (layout == frame).nonzero()[:, 0]
                x, y = out.hidden_states[index][row, places].double(), received[places].double()
                xs.append(x - x.mean(0))
                ys.append(y - y.mean())
    x, y = torch.cat(xs), torch.cat(ys)
    moments = x.T @ x
    w = torch.linalg.inv(moments + ridge * torch.diag(moments.diagonal())) @ x.T @ y
    share = 1 - ((y - x @ w) ** 2).sum() / (y**2).sum()
    return w / (x @ w).pow(2).mean().sqrt(), float(share)


@pytest.mark.parametrize("name", NAMES)
def test_fitted_weights_equal_a_naive_regression_of_the_attention_maps(name):
    base = tiny_decoder(name)
    model = mmskip.apply_(copy.deepcopy(base), mmskip.MoDConfig(keep=0.3, gate="separate"))
    base.set_attn_implementation("eager")
    shares = fit_routers(model, batches(), ridge=0.1)
    assert list(shares) == [p.index for p in find_policies(model)]
    with torch.no_grad():
        for index, share in shares.items():
            expected, naive_share = naive_weights(base, batches(), index, 0.1)
            found = model.get_decoder().layers[index].mmskip_router.weight
            torch.testing.assert_close(found.double(), expected, atol=2e-3, rtol=2e-3)
            assert share == pytest.approx(naive_share, abs=1e-3) and 0 < share <= 1


def test_fitting_leaves_nothing_behind_even_after_an_error():
    base = tiny_decoder("llama")
    model = mmskip.apply_(copy.deepcopy(base), mmskip.MoDConfig(keep=0.3, gate="separate")).train()
    classes, weights = [type(m) for m in model.modules()], copy.deepcopy(model.state_dict())

    def broken():
        yield batches()[0]
        raise KeyError("of the user")

    with pytest.raises(KeyError, match="of the user"):
        fit_routers(model, broken())
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    fit_routers(model, batches())
    assert [type(m) for m in model.modules()] == classes
    assert model.training and all(policy.progress == 1 for policy in find_policies(model))
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, weights[key])}
    assert changed == {f"model.layers.{i}.mmskip_router.weight" for i in (1, 3)}


@pytest.mark.parametrize("name", NAMES)
def test_mlp_routers_learn_the_attention_and_nothing_else_changes(name):
    base = tiny_decoder(name)
    model = mmskip.apply_(copy.deepcopy(base), mmskip.MoDConfig(keep=0.3, router="mlp", gate="separate")).train()
    weights = copy.deepcopy(model.state_dict())
    few = fit_routers(model, batches(), epochs=1)
    many = fit_routers(model, batches(), epochs=50)
    assert list(many) == [p.index for p in find_policies(model)] and all(0 <= few[i] < many[i] <= 1 for i in many)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, weights[key])}
    ranking = ("weight", "hidden_weight", "hidden_bias")
    assert changed == {f"model.layers.{i}.mmskip_router.{part}" for i in many for part in ranking}


def test_the_frames_held_for_an_mlp_are_a_fair_sample_within_their_bound():
    groups = token_groups(torch.arange(40).repeat_interleave(3)[None])
    x = groups.layout_BT[..., None].float()
    times = torch.zeros(40)
    for seed in range(200):
        frames = _Frames(31, torch.Generator().manual_seed(seed))
        frames.add(x, torch.ones(1, 120), groups)
        assert len(frames.kept) == 10 and frames.held == 30
        times += torch.bincount(torch.stack([x[0, 0] for _, _, x, _ in frames.kept]).long(), minlength=40)
    assert times.min() > 25 and times.max() < 80, "50 times each, save for chance"


@pytest.mark.parametrize("order", [1, -1])
def test_frames_of_any_size_stay_within_the_bound_and_are_kept_alike(order):
    sizes = [2, 30][::order]
    layouts = [torch.arange(60).repeat_interleave(size)[None] for size in sizes]
    kept = torch.zeros(2)
    for seed in range(100):
        frames = _Frames(200, torch.Generator().manual_seed(seed))
        for layout in layouts:
            frames.add(torch.zeros(1, layout.shape[1], 1), torch.ones(1, layout.shape[1]), token_groups(layout))
            assert frames.held == sum(len(x) for _, _, x, _ in frames.kept) <= 200
        for place, size in enumerate(sizes):
            kept[place] += sum(len(x) == size for _, _, x, _ in frames.kept)
    assert kept.min() > 0.7 * kept.max(), "one size or the later frames are favoured"


def test_ranks_agree_on_an_mlp_also_where_one_has_no_frames():
    ids, layout = example(4)
    queries = layout < 0
    calls = [[({"input_ids": ids, "layout": given}, queries)] for given in (layout, torch.full_like(layout, -1))]
    barrier, sums = threading.Barrier(2), {}

    def rank(number):
        def reduce(value):
            sums[number] = value
            barrier.wait()
            total = sums[0] + sums[1]
            barrier.wait()
            return total

        torch.manual_seed(number)
        fit_routers(models[number], calls[number], reduce=reduce, epochs=5)

    models = [mmskip.apply_(tiny_decoder("llama"), mmskip.MoDConfig(router="mlp", gate="separate")) for _ in calls]
    before = copy.deepcopy(models[1].state_dict())
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(rank, range(2)))
    for key, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[key]), key
    assert not torch.equal(
        before["model.layers.1.mmskip_router.weight"], models[1].model.layers[1].mmskip_router.weight
    )


@pytest.mark.parametrize("router", ["linear", "mlp"])
def test_a_fitted_router_keeps_more_attention_than_one_that_was_not(router):
    ids, layout = example(6)
    queries = layout < 0
    shares = []
    for fit in (False, True):
        model, base = routed("llama", gate="separate", keep=0.3, router=router)
        if fit:
            fit_routers(model, [({"input_ids": ids, "layout": layout}, queries)], epochs=150)
        base.set_attn_implementation("eager")
        with torch.no_grad(), mmskip.trace(model) as trace:
            model(ids, layout=layout)
            attention = base(ids, output_attentions=True).attentions[1].mean(1)[0, queries[0]].sum(0)
        kept = trace.forwards[0].layers[1].kept[0] & (layout[0] >= 0)
        shares.append(float(attention[kept].sum() / attention[layout[0] >= 0].sum()))
    assert shares[1] > shares[0]


@pytest.mark.parametrize("router", ["linear", "mlp", "random", "norm", "uniform"])
def test_a_gate_of_its_own_starts_at_one_and_alone_is_trained_beside_any_router(router, tmp_path):
    base = tiny_decoder("llama")
    ids, layout = example()
    plain = mmskip.apply_(copy.deepcopy(base), mmskip.MoDConfig(keep=0.3, router=router, gate="none"))
    model = mmskip.apply_(copy.deepcopy(base), mmskip.MoDConfig(keep=0.3, router=router, gate="separate"))
    model.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(model(ids, layout=layout).logits, plain(ids, layout=layout).logits)
    model(ids, layout=layout).logits.square().sum().backward()
    trained = {n for n, p in model.named_parameters() if "mmskip" in n and p.requires_grad}
    assert trained == {f"model.layers.{i}.mmskip_router.gate_weight" for i in (1, 3)}
    # nothing reads a vision token after the last block, so only its text, which has no gate, has a gradient there
    assert model.model.layers[1].mmskip_router.gate_weight.grad.abs().sum() > 0
    with torch.no_grad():
        for i in (1, 3):
            model.model.layers[i].mmskip_router.gate_weight.normal_()
    out = model(ids, layout=layout).logits
    assert not torch.allclose(out, plain(ids, layout=layout).logits, atol=1e-3)
    mmskip.save(model, tmp_path)
    assert torch.equal(mmskip.load_(copy.deepcopy(base), tmp_path)(ids, layout=layout).logits, out)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"gate": "tanh"}, "has no router to fit"),
        ({"router": "random", "gate": "separate"}, "has no router to fit"),
        ({"gate": "separate", "attention": "mmskip_ragged"}, "fit under the model's own attention"),
    ],
)
def test_what_cannot_be_fitted_is_refused(config, message):
    register_attention()
    model = mmskip.apply_(tiny_decoder("llama"), mmskip.MoDConfig(**config))
    with pytest.raises(ValueError, match=message):
        fit_routers(model, batches())


def test_calls_without_frames_are_refused():
    model = mmskip.apply_(tiny_decoder("llama"), mmskip.MoDConfig(gate="separate"))
    ids = torch.randint(3, VOCAB, (1, 5))
    with pytest.raises(ValueError, match="no vision token receives attention"):
        fit_routers(model, [({"input_ids": ids, "layout": torch.full_like(ids, -1)}, torch.ones_like(ids).bool())])
