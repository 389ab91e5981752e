"""LAC: voids are undone token by token, and give a static set."""

import contract
import pytest
import torch
from tiny_decoders import VOCAB, assert_same_generation, saturating, sharpen, tiny_decoder

import mmskip
from mmskip import LACConfig, LayerPlanConfig
from mmskip.calibration import lac_activity

IDS = torch.randint(3, VOCAB, (3, 12), generator=torch.Generator().manual_seed(0))


def test_activity_of_rows_does_not_leak_and_gives_a_static_set():
    model = saturating()
    whole = lac_activity(model, IDS)
    assert whole.shape == (6, 3, 12) and bool(whole[0].all()) and not bool(whole.all())
    assert torch.equal(whole[:, 1:2], lac_activity(model, IDS[1:2]))
    table = mmskip.importance(model, [IDS])
    torch.testing.assert_close(torch.tensor(table.columns["activity"]), whole.float().mean((1, 2)))
    plan = LayerPlanConfig.lac(table, least=1.0)
    assert plan.phase == "decode" and plan.drop == tuple(i for i in range(1, 6) if not bool(whole[i].all()))


@pytest.mark.parametrize("name", ["llama", "qwen3_mixed_window", "gpt2", "gpt_neox", "qwen3_next"])
def test_lac_takes_back_what_voids_did_cached_or_not(name):
    model = tiny_decoder(name)
    sharpen(model)
    mmskip.apply_(model, LACConfig())
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0
    call = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert_same_generation(model, inputs=IDS, **call)
    assert_same_generation(model, inputs=IDS, attention_mask=mask, **call)


def test_lac_equals_its_reference_and_rows_do_not_depend_on_each_other():
    base, model = saturating(), mmskip.apply_(saturating(), LACConfig(alpha=0.9))
    decoder = base.model
    with torch.no_grad():
        x, taken_back = decoder.embed_tokens(IDS), 0
        rotary, grown = decoder.rotary_emb(x, torch.arange(12)[None]), []
        for layer in decoder.layers:
            y = layer(x, position_embeddings=rotary)
            growth = y.norm(dim=-1) - x.norm(dim=-1)
            if grown:
                before = torch.stack(grown)
                void = growth < 0.9 * (before.amax(0) - before.amin(0))
                taken_back += int(void.sum())
                y = torch.where(void[..., None], x, y)
            grown.append(growth)
            x = y
        expected, found = base.lm_head(decoder.norm(x)), model(IDS).logits
        torch.testing.assert_close(found, expected)
        assert 0 < taken_back < 5 * IDS.numel()
        torch.testing.assert_close(model(IDS[1:2]).logits, found[1:2], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="alpha is -1"):
        LACConfig(alpha=-1)


def test_policies_share_no_block_with_a_plan_that_would_run_it_twice():
    messages = set()
    for first in (True, False):
        configs = (LACConfig(), LayerPlanConfig.cola((0, 1, 1, 2, 3)))
        model = mmskip.apply_(tiny_decoder("llama"), configs[not first])
        with pytest.raises(
            ValueError, match=r"do not compose( on one stack)?: both claim block\.1, block\.2, block\.3"
        ) as refused:
            mmskip.apply_(model, configs[first])
        messages.add(str(refused.value))
    assert len(messages) == 1


CONTRACT = [
    contract.Case(
        contract.DECODER,
        LACConfig(),
        None,
        {"alpha": -1},
        why="with every alpha a token whose norm shrinks is a void",
    )
]
