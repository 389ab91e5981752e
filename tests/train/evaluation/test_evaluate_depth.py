"""`evaluate.py depth`: each measure against its definition on tiny decoders, and the command on a trained model."""

import json

import pytest
import torch
from locations import SHARED_DATA as DATA
from tiny_decoders import VOCAB, sharpen, tiny_decoder

import mmskip
from mmskip import LayerPlanConfig
from mmskip.train.cli.evaluate import main
from mmskip.train.metrics import depth

MODEL, TEXT = DATA / "stories260K", DATA / "text" / "tinystories_valid_5stories.txt"
NEEDS_DATA = pytest.mark.skipif(not MODEL.is_dir(), reason="needs ../shared/data/stories260K beside the repository")
FAMILIES = ("llama", "gpt2", "gemma2", "gpt_neox", "qwen3_mixed_window")
IDS = torch.randint(3, VOCAB, (4, 10), generator=torch.Generator().manual_seed(0))
BATCHES = list(IDS.split(3))


def decoder(name="llama"):
    model = tiny_decoder(name)
    sharpen(model, 10.0)
    return model.eval()


@torch.no_grad()
def probabilities(model, ids=IDS):
    return model(ids).logits.softmax(-1)


def test_contributions_are_those_of_the_parts():
    model = decoder()
    found = depth.contributions(model, BATCHES)
    with torch.no_grad():
        x = model.model.embed_tokens(IDS)
        rotary = model.model.rotary_emb(x, torch.arange(10)[None])
        causal = torch.full((10, 10), -torch.inf).triu(1)[None, None]
        for index, block in enumerate(model.model.layers):
            a = block.self_attn(block.input_layernorm(x), position_embeddings=rotary, attention_mask=causal)[0]
            m = block.mlp(block.post_attention_layernorm(x + a))
            for point, added, base in (("attn", a, x), ("mlp", m, x + a), ("block", a + m, x)):
                ratio = (added.norm(dim=-1) / base.norm(dim=-1)).mean()
                cosine = torch.cosine_similarity(added, base, dim=-1).mean()
                assert found["norm"][point][index] == pytest.approx(float(ratio), rel=1e-4)
                assert found["cosine"][point][index] == pytest.approx(float(cosine), abs=1e-4)
            x = x + a + m


@pytest.mark.parametrize("name", FAMILIES)
def test_skip_effects_equal_a_plan_without_the_block(name):
    model, dense = decoder(name), probabilities(decoder(name))
    found = depth.skip_effects(model, BATCHES)
    layers = torch.tensor(found["layers"])
    assert torch.equal(layers, layers.triu(1)) and (layers[0, 1:] > 0).all()
    for index in range(1, 4):
        mmskip.apply_(model, LayerPlanConfig(drop=(index,)))
        apart = (probabilities(model) - dense).norm(dim=-1)
        mmskip.remove_(model)
        assert found["output"][index] == pytest.approx(float(apart.max()), rel=1e-3)
        assert found["output_mean"][index] == pytest.approx(float(apart.mean()), rel=1e-3)


def test_effects_on_later_tokens_pass_through_attention_alone():
    model = decoder()
    found = depth.skip_effects(model, BATCHES, future=True)
    assert found["output"][-1] == 0 and found["layers"][0][1] > 0
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
    silent = depth.skip_effects(model, BATCHES, future=True)
    assert not torch.tensor(silent["layers"]).any() and not any(silent["output"])


@pytest.mark.parametrize("name", FAMILIES)
def test_logit_lens_is_a_model_that_stops_there(name):
    model, final = decoder(name), probabilities(decoder(name))
    found = depth.logit_lens(model, BATCHES)
    assert found["kl"][-1] == pytest.approx(0, abs=1e-5) and found["overlap"][-1] == pytest.approx(1)
    mmskip.apply_(model, LayerPlanConfig(drop=(2, 3)))
    early = probabilities(model)
    assert found["kl"][1] == pytest.approx(float((final * (final / early).log()).sum(-1).mean()), rel=1e-3)
    both = [
        len(set(a) & set(b))
        for a, b in zip(*(p.topk(5).indices.flatten(0, 1).tolist() for p in (early, final)), strict=True)
    ]
    assert found["overlap"][1] == pytest.approx(sum(both) / len(both) / 5)


def test_erasure_replaces_one_token_at_one_depth():
    model, ids = decoder(), IDS[0]
    means = depth.mean_states(model, BATCHES)
    found = depth.erasure(model, ids, means, rows=4)
    with torch.no_grad():
        embedded = model.model.embed_tokens(IDS)
        torch.testing.assert_close(means[0], embedded.flatten(0, 1).mean(0))
        embedded = embedded[:1].clone()
        embedded[0, 6] = means[0]
        other = model(inputs_embeds=embedded).logits[0, -1].softmax(-1)
        assert found.shape == (4, 9)
        assert found[0, 6] == pytest.approx(float((other - probabilities(model, ids[None])[0, -1]).norm()), rel=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_integrated_gradients_add_up_to_what_the_block_gives(name):
    model, ids = decoder(name), IDS[0]
    found = depth.integrated_gradients(model, ids, steps=200, rows=64)
    assert found.shape == (4, 10) and all(p.requires_grad and p.grad is None for p in model.parameters())
    with torch.no_grad():
        logs = model(ids[None]).logits[0, -1].log_softmax(-1)
    target = int(logs.argmax())
    for index in range(1, 4):
        mmskip.apply_(model, LayerPlanConfig(drop=(index,)))
        with torch.no_grad():
            without = model(ids[None]).logits[0, -1].log_softmax(-1)[target]
        mmskip.remove_(model)
        assert float(found[index].sum()) == pytest.approx(float(logs[target] - without), abs=5e-3)


def test_linear_maps_find_a_linear_relation_and_no_other():
    source = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 400, 8, generator=source), torch.randn(1, 400, 5, generator=source)
    turned = x[:1] @ torch.randn(8, 5, generator=source) + 3
    found = depth.linear_maps(x, torch.cat([turned, noise]))
    assert found[0, 0] < 1e-4 and found[1, 0] > 0.9 and found[0, 1] > 0.9
    with pytest.raises(ValueError, match="same ones"):
        depth.linear_maps(x, x[:, :10])
    with pytest.raises(ValueError, match="too few"):
        depth.linear_maps(x[:, :10], x[:, :10])
    assert depth.states(decoder(), BATCHES).shape == (5, 40, 32)


def test_a_changed_model_is_refused():
    model = mmskip.apply_(decoder(), LayerPlanConfig(drop=(1,)))
    with pytest.raises(ValueError, match="untouched model"):
        depth.logit_lens(model, BATCHES)


@NEEDS_DATA
def test_the_command_on_a_trained_model(tmp_path, capsys):
    call = ["depth", "--model", str(MODEL), "--text", str(TEXT), "--window", "48", "--windows", "2", "--steps", "4"]
    call += ["--prompt-tokens", "6", "--map-windows", "4", "--out", str(tmp_path)]
    assert main([*call, "--other", str(MODEL)]) == 0
    found = json.loads((tmp_path / "depth.json").read_text())
    assert [min(range(6), key=row.__getitem__) for row in found["maps"]] == list(range(6))
    assert len(found["prompt"]) == 6 and len(found["gradients"]) == 5
    for part in ("contributions", "effects", "lens", "erasure", "gradients", "maps"):
        assert (tmp_path / f"{part}.png").stat().st_size > 5000
    assert main([*call, "--parts", "maps"]) == 2
    assert "--other" in capsys.readouterr().err
    assert main(["depth", "--model", str(MODEL), "--text", str(TEXT), "--window", "9000"]) == 2
    assert "smaller --window" in capsys.readouterr().err
    assert main([*call, "--parts", "erasure", "--prompt", ""]) == 2
    assert "--prompt is ''" in capsys.readouterr().err
