"""Token reduction: what is dropped or merged once stays out of all later blocks, however the model is called."""

import copy

import contract
import pytest
import torch
from naive_mod import _kept
from naive_reduction import attention_scores, naive_reduced_logits
from tiny_decoders import DECODERS, VOCAB, pad_rows, stream_layout, tiny_decoder
from torch import nn
from transformers import DynamicCache

import mmskip
from mmskip import families
from mmskip.hf.streaming.cache import StreamCache
from mmskip.ops.similarity import match_similar_naive
from mmskip.tokens.controls import norm_scores, random_scores, uniform_scores
from mmskip.tokens.groups import token_groups

NAMES = (
    "llama",
    "qwen3",
    "mistral_window",
    "qwen3_mixed_window",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "mixtral",
    "opt",
)
STATEFUL = ("qwen3_next", "qwen3_5_text", "lfm2", "nemotron_h")
# the naive reference embeds and normalises by itself, which these do differently
REFERENCE = tuple(n for n in NAMES if not n.startswith("gemma") and n != "opt")
SETTINGS = {
    "next": {"score": "attention", "after_layer": 2},
    "last": {"score": "attention", "after_layer": 2, "query": "last"},
    "norm": {"score": "norm", "after_layer": 1},
    "random": {"score": "random", "after_layer": 2},
    "uniform": {"score": "uniform", "after_layer": 1},
    "similarity": {"score": "similarity", "after_layer": 0},
    "similarity-inside": {"score": "similarity", "after_layer": 2},
}
CAUSAL = tuple(s for s in SETTINGS if s != "last")


def reduced(name: str, setting: str, keep: float = 0.3, **config):
    model = tiny_decoder(name, num_hidden_layers=4)
    base = copy.deepcopy(model)
    return mmskip.apply_(model, mmskip.TokenReductionConfig(keep=keep, **SETTINGS[setting], **config)), base


def example(frames: int = 4, seed: int = 0, **layout):
    row = stream_layout(frames, **layout)
    return torch.randint(3, VOCAB, row.shape, generator=torch.Generator().manual_seed(seed))[None], row[None]


def padded_batch(side: str):
    rows = [stream_layout(4), stream_layout(2), torch.full((5,), -1)]
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, VOCAB, row.shape, generator=generator) for row in rows]
    mask = pad_rows([torch.ones_like(row) for row in rows], 0, side)
    return (
        ids,
        rows,
        {
            "input_ids": pad_rows(ids, 0, side),
            "attention_mask": mask,
            "layout": pad_rows(rows, -1, side),
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        },
    )


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", NAMES)
def test_keeping_everything_is_the_base_model_bit_for_bit(name, setting):
    model, base = reduced(name, setting, keep=1.0)
    ids, layout = example()
    with torch.no_grad(), mmskip.trace(model) as trace:
        assert torch.equal(model(ids, layout=layout).logits, base(ids).logits)
    ran = [layer.kept is not None for layer in trace.forwards[0].layers]
    assert ran == [i >= SETTINGS[setting]["after_layer"] for i in range(4)], "bypassed the routing path"


@pytest.mark.parametrize("name", DECODERS)
def test_text_ranks_by_the_attention_of_the_model_itself_in_every_decoder(name):
    base = tiny_decoder(name)
    ids, layout = example()
    model = copy.deepcopy(base)
    config = mmskip.TokenReductionConfig(keep=0.3, after_layer=2)
    if name in STATEFUL:
        with pytest.raises(ValueError, match=r"block\.2 .* must see every token"):
            mmskip.apply_(model, config)
        return
    mmskip.apply_(model, config)
    with torch.no_grad(), mmskip.trace(model) as trace:
        model(ids, layout=layout)
        scores = attention_scores(base, ids[0], layout[0], 1, "next")
    kept = trace.forwards[0].layers[2].kept[0].nonzero().flatten().tolist()
    assert kept == _kept(scores, layout[0], 0.3, False)
    assert kept != _kept(-scores, layout[0], 0.3, False)


def naive_choice(base, ids, layout, setting, keep):
    config = mmskip.TokenReductionConfig(keep=keep, **SETTINGS[setting])
    groups = token_groups(layout[None])

    def choose(x):
        if config.score == "similarity":
            return merge(x, layout, keep)
        scores = {
            "attention": lambda: attention_scores(base, ids, layout, config.after_layer - 1, config.query),
            "norm": lambda: norm_scores(x),
            "random": lambda: random_scores(groups, 0, False)[0],
            "uniform": lambda: uniform_scores(groups, keep)[0],
        }[config.score]()
        kept = _kept(scores, layout, keep, False)
        return kept, x[kept]

    return config.after_layer, choose


def merge(x, layout, keep):
    rows, kept = list(x.unbind(0)), [t for t in range(len(layout)) if layout[t] < 0]
    for frame in sorted({int(f) for f in layout if f >= 0}):
        members = [t for t in range(len(layout)) if int(layout[t]) == frame]
        owners = match_similar_naive(x[members].detach(), max(1, round(keep * len(members))))
        for owner in set(owners):
            kept.append(members[owner])
            rows[members[owner]] = x[[m for m, o in zip(members, owners, strict=True) if o == owner]].mean(0)
    return sorted(kept), torch.stack(rows)[sorted(kept)]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", REFERENCE)
def test_equals_taking_the_tokens_out(name, setting):
    model, base = reduced(name, setting)
    ids, layout = example()
    with torch.no_grad():
        out = model(ids, layout=layout).logits[0]
        after, choose = naive_choice(base, ids[0], layout[0], setting, 0.3)
        expected, kept = naive_reduced_logits(base, ids[0], layout[0], after, choose)
    torch.testing.assert_close(out[kept], expected, atol=1e-5, rtol=1e-5)
    assert len(kept) == (layout < 0).sum() + 4 * 3
    assert not torch.allclose(out[-1], base(ids).logits[0, -1], atol=1e-4), "dropping changed nothing"


@pytest.mark.parametrize("setting", CAUSAL)
@pytest.mark.parametrize("name", ["llama", "mistral_window"])
def test_gradients_equal_the_naive_reference(name, setting):
    model, base = reduced(name, setting)
    ids, layout = example(3)
    after, choose = naive_choice(base, ids[0], layout[0], setting, 0.3)
    expected, kept = naive_reduced_logits(base, ids[0], layout[0], after, choose)
    target = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5))
    (expected * target).sum().backward()
    (model(ids, layout=layout).logits[0][kept] * target).sum().backward()
    ours = dict(model.named_parameters())
    for key, parameter in base.named_parameters():
        torch.testing.assert_close(ours[key].grad, parameter.grad, atol=1e-4, rtol=1e-4, msg=key)


@pytest.mark.parametrize("setting", ["next", "similarity"])
def test_checkpointing_gives_the_same_gradients(setting):
    model, _ = reduced("llama", setting)
    model.train()
    ids, layout = example(3)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, layout=layout, labels=ids).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["llama", "mistral_window", "gemma2"])
def test_rows_of_a_batch_equal_each_row_alone(name, setting, side):
    model, _ = reduced(name, setting)
    ids, rows, batch = padded_batch(side)
    with torch.no_grad():
        together = model(**batch).logits
        for i, (one, layout) in enumerate(zip(ids, rows, strict=True)):
            real = batch["attention_mask"][i].bool()
            alone = model(one[None], layout=layout[None]).logits[0]
            torch.testing.assert_close(together[i][real], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["llama", "mistral_window", "qwen3_mixed_window", "gemma3_text", "opt"])
def test_generation_with_and_without_a_cache_agree(name, setting):
    model, _ = reduced(name, setting)
    _, _, batch = padded_batch("left")
    batch.pop("position_ids")
    call = {**batch, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(**call), model.generate(**call, use_cache=False))


@pytest.mark.parametrize("setting", CAUSAL)
@pytest.mark.parametrize("name", ["llama", "mistral_window", "qwen3_mixed_window", "gemma2", "opt"])
def test_a_stream_in_chunks_equals_one_forward(name, setting):
    model, _ = reduced(name, setting)
    ids, layout = example(5, lead=0)
    cache, parts = DynamicCache(config=model.config), []
    with torch.no_grad():
        full = model(ids, layout=layout).logits
        for start in range(0, ids.shape[1], 22):
            part = slice(start, start + 22)
            parts.append(model(ids[:, part], layout=layout[:, part], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=1e-5, rtol=1e-5)


def test_the_last_token_ranks_per_call_so_a_stream_decides_by_chunk():
    model, _ = reduced("llama", "last", keep=0.2)
    ids, layout = example(4, lead=0, text=2)
    cache, kept = DynamicCache(config=model.config), []
    with torch.no_grad(), mmskip.trace(model) as trace:
        for part in (slice(0, 12), slice(12, 48)):
            model(ids[:, part], layout=layout[:, part], past_key_values=cache)
        model(ids[:, :12], layout=layout[:, :12])
    kept = [forward.layers[3].kept[0] for forward in trace.forwards]
    assert torch.equal(kept[0], kept[2]), "a chunk decides by itself"
    assert cache.layers[3].keys.shape[-2] == 4 * (2 + 2) and cache.layers[1].keys.shape[-2] == 48


def test_a_frame_without_text_after_it_is_refused():
    model, _ = reduced("llama", "next")
    ids, layout = example(3, lead=0, text=0)
    with pytest.raises(ValueError, match="frame 0 of row 0 is followed by no text in this call"):
        model(ids, layout=layout)
    # text that generate adds must not rank: with a cache it would come too late
    with pytest.raises(ValueError, match="followed by no text"):
        model.generate(ids, layout=layout, max_new_tokens=3, use_cache=False)


def test_packed_sequences_equal_each_alone_and_never_rank_across():
    model, _ = reduced("llama", "next")
    pieces = [example(2, seed=1), example(1, seed=2)]
    pieces[1][1][pieces[1][1] >= 0] += 2
    ids, layout = (torch.cat(parts, 1) for parts in zip(*pieces, strict=True))
    positions = torch.cat([torch.arange(p.shape[1]) for p, _ in pieces])[None]
    with torch.no_grad():
        out = model(ids, layout=layout, position_ids=positions, use_cache=False).logits
        alone = torch.cat([model(i, layout=row, use_cache=False).logits for i, row in pieces], 1)
    torch.testing.assert_close(out, alone, atol=1e-5, rtol=1e-5)
    model, _ = reduced("llama", "last")
    with pytest.raises(ValueError, match="ranked by text of another one"):
        model(ids, layout=layout, position_ids=positions, use_cache=False)


def test_training_by_the_last_token_is_refused():
    model, _ = reduced("llama", "last")
    ids, layout = example(2)
    with pytest.raises(ValueError, match=r"train with query='next'"):
        model.train()(ids, layout=layout)


@pytest.mark.parametrize("setting", ["norm", "similarity"])
def test_running_streams_equal_one_forward(setting):
    model, _ = reduced("llama", setting)
    cache = StreamCache(families.find(model), 2, unit_tokens=12)
    rows = [stream_layout(3, lead=1)] * 2
    ids = torch.randint(3, VOCAB, (2, len(rows[0])), generator=torch.Generator().manual_seed(4))
    layout, parts = torch.stack(rows), []
    embeds = model.get_input_embeddings()(ids)
    with torch.no_grad():
        expected = model(inputs_embeds=embeds, layout=layout).logits
        for part in (slice(0, 12), slice(12, 34)):
            announced = cache.begin(layout[:, part].numpy(), [embeds[:, part].shape[1]] * 2, torch.float32)
            parts.append(model(inputs_embeds=embeds[:, part], **announced, layout=layout[:, part]).logits)
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-5, rtol=1e-5)


def test_running_streams_refuse_ranking_by_text_to_come():
    model, _ = reduced("llama", "next")
    cache = StreamCache(families.find(model), 1, unit_tokens=12)
    ids, layout = example(1)
    announced = cache.begin(layout.numpy(), [ids.shape[1]], torch.float32)
    with pytest.raises(ValueError, match="does not serve running streams"):
        model(inputs_embeds=model.get_input_embeddings()(ids), **announced, layout=layout)


@pytest.mark.parametrize("attention", ["eager", "mmskip_ragged"])
@pytest.mark.parametrize("name", ["llama", "mistral_window"])
def test_scores_are_read_under_every_attention_backend(name, attention):
    from mmskip.ops.hf_attention import register_attention

    register_attention()
    model, _ = reduced(name, "next")
    _, _, batch = padded_batch("left")
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**batch).logits[real]
        model.set_attn_implementation(attention)
        torch.testing.assert_close(model(**batch).logits[real], expected, atol=1e-5, rtol=1e-5)


def test_flex_masks_are_read_too():
    from torch.nn.attention.flex_attention import create_block_mask

    from mmskip.hf.probes.attention import _mask_rows

    mask = create_block_mask(lambda b, h, q, k: (k <= q) & (k >= b), 2, None, 6, 6, device="cpu")
    seen = _mask_rows(mask, 1, torch.tensor([2, 5]), 6, 6) == 0
    assert seen.int().tolist() == [[0, 1, 1, 0, 0, 0], [0, 1, 1, 1, 1, 1]]


def fingerprint(model: nn.Module):
    return {name: (type(m), set(m.__dict__), list(m._modules)) for name, m in model.named_modules()}


@pytest.mark.parametrize("setting", ["next", "similarity"])
def test_remove_deepcopy_and_save_round_trip(setting, tmp_path):
    model, base = reduced("llama", setting)
    ids, layout = example()
    with torch.no_grad():
        expected = model(ids, layout=layout).logits
        assert list(model.state_dict()) == list(base.state_dict())
        twin = copy.deepcopy(model)
        mmskip.save(model, tmp_path)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(twin(ids, layout=layout).logits, expected)
        loaded = mmskip.load_(copy.deepcopy(base), tmp_path)
        assert mmskip.applied(loaded) == mmskip.applied(model)
        assert torch.equal(loaded(ids, layout=layout).logits, expected)
        mmskip.remove_(twin)
    assert fingerprint(twin) == fingerprint(base)
    assert torch.equal(twin(ids).logits, base(ids).logits)


@pytest.mark.parametrize("order", ["before", "after"])
def test_lora_trains_in_both_orders(order):
    import peft

    lora = peft.LoraConfig(r=2, target_modules="all-linear")
    config = mmskip.TokenReductionConfig(keep=0.3, after_layer=2)
    model = tiny_decoder("llama")
    if order == "before":
        model = mmskip.apply_(peft.get_peft_model(model, lora), config)
    else:
        model = peft.get_peft_model(mmskip.apply_(model, config), lora)
    ids, layout = example(2)
    model.train()(input_ids=ids, layout=layout, labels=ids).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_B" in n)


def test_cost_falls_with_what_is_kept():
    ids, layout = example(6)
    saved = []
    for keep in (1.0, 0.5, 0.1):
        model, _ = reduced("llama", "next", keep=keep)
        with torch.no_grad(), mmskip.trace(model) as trace:
            model(ids, layout=layout)
        saved.append(mmskip.cost(model, trace).ideal_speedup)
    assert saved[0] == 1 and saved[0] < saved[1] < saved[2] < 2


@pytest.mark.parametrize("setting", ["uniform", "similarity"])
def test_the_last_vision_token_can_be_kept(setting):
    model, _ = reduced("llama", setting, keep=0.1, always_keep="last")
    ids, layout = example(3, lead=0)
    with torch.no_grad(), mmskip.trace(model) as trace:
        model(ids, layout=layout)
    kept = trace.forwards[0].layers[2].kept[0]
    assert kept.nonzero().flatten().tolist() == [9, 10, 20, 21, 31, 32]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"keep": 0}, r"keep is 0; expected a number in \(0, 1\]"),
        ({"after_layer": -1}, "after_layer is -1; expected an integer >= 0"),
        ({"after_layer": 0}, "after_layer is 0; expected at least 1 for score='attention'"),
        ({"score": "fastv"}, "score is 'fastv'; expected one of attention, norm"),
        ({"query": "all"}, "query is 'all'; expected one of next, last"),
        ({"always_keep": "first"}, "always_keep is 'first'"),
        ({"seed": 0.5}, "seed is 0.5; expected an integer"),
        ({"attention": "xformers"}, "attention is 'xformers'; expected one of None, mmskip_ragged"),
    ],
)
def test_wrong_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        mmskip.TokenReductionConfig(**values)


def test_config_round_trip_and_unfit_models():
    config = mmskip.TokenReductionConfig(keep=0.25, score="similarity", after_layer=0)
    assert mmskip.TokenReductionConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="TokenReductionConfig has no layers"):
        mmskip.TokenReductionConfig.from_dict({"layers": "all"})
    with pytest.raises(ValueError, match="after_layer is 4; expected 0 to 3"):
        mmskip.apply_(tiny_decoder("llama"), mmskip.TokenReductionConfig(after_layer=4))


def test_routing_may_come_before_a_reduction_but_not_in_the_block_it_reads():
    model, _ = reduced("llama", "norm")
    with pytest.raises(ValueError, match=r"MoDConfig.* and TokenReduction.* do not compose: both claim block\.1\."):
        mmskip.apply_(model, mmskip.MoDConfig(layers=[1]))
    model, _ = reduced("llama", "next")
    with pytest.raises(ValueError, match=r"MoDConfig.* and TokenReduction.* do not compose: both claim block\.1\."):
        mmskip.apply_(model, mmskip.MoDConfig(layers=[1]))
    model = mmskip.apply_(tiny_decoder("llama"), mmskip.MoDConfig(keep=0.5, layers=[1]))
    with pytest.raises(ValueError, match=r"MoDConfig.* and TokenReduction.* do not compose: both claim block\.1\."):
        mmskip.apply_(model, mmskip.TokenReductionConfig(after_layer=2))
    mmskip.apply_(model, mmskip.TokenReductionConfig(keep=0.2, after_layer=2, score="uniform"))
    ids, layout = example(2, lead=0)
    with torch.no_grad(), mmskip.trace(model) as trace:
        model(ids, layout=layout)
    assert [layer.ran for layer in trace.forwards[0].layers] == [22, 12, 6, 6]


def test_reduced_blocks_compile_without_a_graph_break():
    model, _ = reduced("llama", "norm")
    ids, layout = example(2)
    model.config.use_cache = False
    with torch.no_grad():
        expected = model(ids, layout=layout).logits
        for block in model.model.layers:
            block.compile(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(model(ids, layout=layout).logits, expected, atol=1e-5, rtol=1e-5)


CONTRACT = [
    contract.Case(
        base,
        mmskip.TokenReductionConfig(keep=0.3, after_layer=2, score="norm"),
        mmskip.TokenReductionConfig(keep=1.0, after_layer=2, score="norm"),
        {"keep": 0, "after_layer": -1, "score": "best", "seed": -1},
        call=call,
    )
    for base, call in ((contract.DECODER, contract.ROUTED), (contract.VLM, {}))
]
