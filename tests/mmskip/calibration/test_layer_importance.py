"""The importance table: what its columns say, that plans read it, and that it belongs to one model."""

import pytest
import torch
from tiny_decoders import HYBRIDS, VOCAB, tiny_decoder
from torch.nn.functional import cosine_similarity

import mmskip
from mmskip import ImportanceTable, LayerPlanConfig
from mmskip.exits.voids import lac_voids
from mmskip.importance_table import COLUMNS

IDS = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))


def idle(model, index, part):
    """The named part of a block adds (almost) nothing."""
    block = model.model.layers[index]
    projection = block.self_attn.o_proj if part == "attn" else block.mlp.down_proj
    with torch.no_grad():
        projection.weight.mul_(1e-3)


def test_columns_are_what_the_papers_define():
    model = tiny_decoder("llama")
    table = mmskip.importance(model, [IDS])
    with torch.no_grad():
        h = model(IDS, output_hidden_states=True, use_cache=False).hidden_states
        layer, decoder = model.model.layers[1], model.model
        rotary = decoder.rotary_emb(h[1], torch.arange(12)[None])
        mask = torch.full((12, 12), -torch.inf).triu(1)[None, None]
        mid = h[1] + layer.self_attn(layer.input_layernorm(h[1]), position_embeddings=rotary, attention_mask=mask)[0]
    column = {name: values[1] for name, values in table.columns.items()}
    cos = cosine_similarity(h[1], h[2], dim=-1).mean().item()
    assert column["drop_block"] == pytest.approx(cos, abs=1e-5) and column["lim"] == pytest.approx(-cos, abs=1e-5)
    assert column["bi"] == pytest.approx(1 - cos, abs=1e-5)
    assert column["drop_attn"] == pytest.approx(cosine_similarity(h[1], mid, dim=-1).mean().item(), abs=1e-5)
    assert column["drop_mlp"] == pytest.approx(cosine_similarity(mid, h[2], dim=-1).mean().item(), abs=1e-5)
    weights = torch.cat([p.flatten() for p in layer.parameters() if p.dim() > 1])
    assert column["zd"] == pytest.approx(((weights - weights.mean()) / weights.std() > 1).float().mean().item())
    assert table.columns["activity"][0] == 1 and table.tokens == 24 and tuple(table.columns) == COLUMNS


def test_voids_of_lac():
    growth = torch.tensor([[1.0, 1.0], [3.0, 0.5], [1.5, 0.6], [2.0, 0.1]]).T  # two tokens, four blocks
    found, seen = [], None
    for d_BT in growth.T[:, None]:
        void_BT, seen = lac_voids(d_BT, seen)
        found.append(void_BT[0].tolist())
    # thresholds 0.8 * range so far: -, 0, 1.6, 1.6 and -, 0, 0.4, 0.4
    assert found == [[False, False], [False, False], [True, False], [False, True]]


def test_padding_does_not_count():
    model = tiny_decoder("llama")
    padded, mask = torch.zeros(2, 15, dtype=torch.long), torch.zeros(2, 15, dtype=torch.long)
    padded[:, 3:], mask[:, 3:] = IDS, 1
    one = mmskip.importance(model, [IDS])
    other = mmskip.importance(model, [{"input_ids": padded, "attention_mask": mask}])
    assert one.tokens == other.tokens == 24
    for name in COLUMNS:
        assert one.columns[name] == pytest.approx(other.columns[name], abs=1e-4)


@pytest.mark.parametrize("kind", ["block", "attn", "mlp", "joint"])
def test_plans_leave_out_what_does_least(kind):
    model = tiny_decoder("llama", num_hidden_layers=6)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.mul_(20)
            block.mlp.down_proj.weight.mul_(20)
    idle(model, 4, "attn")
    idle(model, 4, "mlp")
    idle(model, 2, "attn" if kind != "mlp" else "mlp")
    table = mmskip.importance(model, [IDS])
    n = {"block": 1, "attn": 2, "mlp": 2, "joint": 3}[kind]
    plan = LayerPlanConfig.llm_drop(table, n, kind)
    expected = {"block": ((4,), (), ()), "attn": ((), (2, 4), ()), "mlp": ((), (), (2, 4)), "joint": ((), (2, 4), (4,))}
    assert (plan.drop, plan.drop_attn, plan.drop_mlp) == expected[kind]
    with torch.no_grad():
        dense = model(IDS).logits
        near = mmskip.apply_(model, plan)(IDS).logits
        mmskip.remove_(model)
        far = mmskip.apply_(model, LayerPlanConfig(drop_attn=(0,), drop_mlp=(0,)))(IDS).logits
    assert (near - dense).abs().mean() < 0.1 * (far - dense).abs().mean()
    with pytest.raises(ValueError, match="n is 50"):
        LayerPlanConfig.llm_drop(table, 50, kind)


def test_file_text_and_picture(tmp_path):
    table = mmskip.importance(tiny_decoder("opt"), [IDS])
    assert table.columns["drop_attn"] == (None,) * 4  # attention and MLP of OPT's blocks cannot be told apart
    assert ImportanceTable.load(table.save(tmp_path / "table.json")) == table
    assert "opt, 4 blocks, width 32" in str(table) and len(str(table).splitlines()) == 6
    assert table.picture(tmp_path / "table.png").read_bytes()[1:4] == b"PNG"
    (tmp_path / "other.json").write_text('{"format": 1}')
    with pytest.raises(ValueError, match="not an importance table"):
        ImportanceTable.load(tmp_path / "other.json")


def test_a_table_belongs_to_its_model():
    plan = LayerPlanConfig.llm_drop(mmskip.importance(tiny_decoder("llama"), [IDS]), 1)
    with pytest.raises(ValueError, match=r"importance of another model \(llama, 4 blocks.*this one is qwen3"):
        mmskip.apply_(tiny_decoder("qwen3"), plan)
    planned = mmskip.apply_(tiny_decoder("llama"), plan)
    with pytest.raises(ValueError, match="untouched model"):
        mmskip.importance(planned, [IDS])
    with pytest.raises(ValueError, match="data is empty"):
        mmskip.importance(tiny_decoder("llama"), [])


@pytest.mark.parametrize("name", ["gemma2", "gpt2", "gpt_neox", "qwen3_moe", "gpt_oss", *HYBRIDS])
def test_other_families_are_left_as_they_were(name):
    model = tiny_decoder(name)
    with torch.no_grad():
        before = model(IDS).logits
        table = mmskip.importance(model, [IDS])
        assert torch.equal(model(IDS).logits, before)
    if name in HYBRIDS:
        assert table.columns["drop_block"][0] is None and table.columns["drop_block"][1] is not None
    assert all(-1.001 <= value <= 1.001 for column in table.columns.values() for value in column if value is not None)
    assert not any(m._forward_hooks for m in model.modules())
