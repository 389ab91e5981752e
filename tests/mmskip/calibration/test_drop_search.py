"""Greedy drops: what is left out is what costs least beside what is gone, and the model is left as it was."""

import sys

import pytest
import torch
from tiny_decoders import VOCAB, blocks_of, sharpen, tiny_decoder

import mmskip
from mmskip import LayerPlanConfig
from mmskip.calibration import drop_order, greedy_drops

IDS = torch.randint(3, VOCAB, (3, 12), generator=torch.Generator().manual_seed(0))


def loud(name, **overrides):
    """A model whose parts each change its loss."""
    model = tiny_decoder(name, **overrides)
    sharpen(model)
    with torch.no_grad():
        for block in blocks_of(model):
            for parameter in block.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4)
    return model


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "olmo2", "opt"])
def test_blocks_are_those_of_a_search_by_hand(name):
    model = loud(name)
    blocks, gone, losses = blocks_of(model), [], []
    owner = next(m for m in model.modules() if isinstance(getattr(m, "layers", None), torch.nn.ModuleList))
    for _ in range(2):
        tried = {}
        for index in set(range(4)) - set(gone):
            owner.layers = torch.nn.ModuleList([b for i, b in enumerate(blocks) if i not in (*gone, index)])
            model.config.num_hidden_layers = len(owner.layers)
            with torch.no_grad():
                tried[index] = float(model(IDS, labels=IDS, use_cache=False).loss)
        gone.append(min(tried, key=tried.get))
        losses.append(tried[gone[-1]])
    owner.layers, model.config.num_hidden_layers = torch.nn.ModuleList(blocks), 4
    found = drop_order(model, [IDS[:1], IDS[1:]], 2)
    assert [drop.index for drop in found] == gone
    assert [drop.loss for drop in found] == pytest.approx(losses, rel=1e-4)
    plan = greedy_drops(model, [IDS], 2, phase="prefill", cache_policy="recompute")
    assert (plan.drop, plan.phase, plan.cache_policy, plan.layers) == (tuple(sorted(gone)), "prefill", "recompute", 4)
    assert LayerPlanConfig.from_dict(plan.to_dict()) == plan


def test_of_two_blocks_that_do_one_job_one_stays():
    model = tiny_decoder("gpt2")
    sharpen(model, 10)
    first, second = model.lm_head.weight.detach()[[5, 9]]
    ids = torch.tensor([[5, 5, 9, 5, 5] * 4])
    with torch.no_grad():
        for block in blocks_of(model):
            for part in (block.attn, block.mlp):
                part.c_proj.weight.zero_()
        blocks_of(model)[1].mlp.c_proj.bias.copy_(2 * second)
        for index in (2, 3):  # either makes token 5 likely
            blocks_of(model)[index].mlp.c_proj.bias.copy_(4 * first)
    alone = {}
    for index in range(4):
        mmskip.apply_(model, LayerPlanConfig(drop=(index,)))
        with torch.no_grad():
            alone[index] = float(model(ids, labels=ids).loss)
        mmskip.remove_(model)
    assert sorted(sorted(alone, key=alone.get)[:3]) == [0, 2, 3]
    assert [drop.index for drop in drop_order(model, [ids], 3)] in ([0, 3, 1], [3, 0, 1])
    joint = drop_order(model, [ids], 2, "joint")  # attentions do nothing: the last of them first
    assert [(drop.part, drop.index) for drop in joint] == [("mlp", 3), ("attn", 3)]


def test_padding_is_not_predicted_and_labels_choose_tokens():
    model = loud("llama")
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), IDS[:1]], 1)
    mask = (padded != 0).long()
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    alone = drop_order(model, [IDS[:1]], 1)[0]
    beside = drop_order(model, [{"input_ids": padded, "attention_mask": mask, "position_ids": places}], 1)[0]
    assert beside.index == alone.index and beside.loss == pytest.approx(alone.loss, rel=1e-4)
    labels = IDS[:1].clone()
    labels[:, :8] = -100
    last = drop_order(model, [{"input_ids": IDS[:1], "labels": labels}], 1)[0]
    mmskip.apply_(model, LayerPlanConfig(drop=(last.index,)))
    with torch.no_grad():
        assert last.loss == pytest.approx(float(model(IDS[:1], labels=labels).loss), rel=1e-4)


def test_parts_that_cannot_go_are_no_candidates_and_the_model_is_left_as_it_was():
    model = loud("llama").train()
    classes = [type(m) for m in model.modules()]
    # in decoding alone the first block holds the lengths
    assert {drop.index for drop in drop_order(model, [IDS], 3, phase="decode")} == {1, 2, 3}
    with pytest.raises(ValueError, match=r"n is 4, but only 3 of kind 'block' can be left out: .*nothing to run"):
        greedy_drops(model, [IDS], 4)
    assert [type(m) for m in model.modules()] == classes and model.training
    with pytest.raises(ValueError, match=r"n is 1, but only 0 of kind 'mlp'.*drop the entire block"):
        greedy_drops(tiny_decoder("opt"), [IDS], 1, "mlp")
    for data, message in (([], "data is empty"), ([IDS[:, :1]], "no token to predict")):
        with pytest.raises(ValueError, match=message):
            greedy_drops(model, data, 1)
    with pytest.raises(ValueError, match="kind is 'head'"):
        greedy_drops(model, [IDS], 1, "head")
    with pytest.raises(ValueError, match="untouched model"):
        greedy_drops(mmskip.apply_(model, LayerPlanConfig(drop=(1,))), [IDS], 1)


def test_losses_are_those_of_the_plan_that_was_asked_for():
    model = loud("llama")
    with pytest.raises(ValueError, match="can be left out"):
        drop_order(model, [IDS], 4, "attn")
    chosen = drop_order(model, [IDS], 4, "attn", cache_policy="recompute")
    assert sorted(drop.index for drop in chosen) == [0, 1, 2, 3]
    mmskip.apply_(model, LayerPlanConfig(drop_attn=(0, 1, 2, 3), cache_policy="recompute"))
    with torch.no_grad():
        assert chosen[-1].loss == pytest.approx(float(model(IDS, labels=IDS).loss), rel=1e-4)


def test_modes_of_single_modules_come_back_and_ids_that_do_not_tell_are_refused():
    model = loud("llama").train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    embeds = model.get_input_embeddings()(IDS).detach()
    drop_order(model, [{"inputs_embeds": embeds, "labels": IDS}], 1)
    for batch in ({"inputs_embeds": embeds}, {"input_ids": IDS, "pixel_values": torch.zeros(1)}):
        with pytest.raises(ValueError, match="expected labels"):
            drop_order(model, [batch], 1)
    assert [module.training for module in model.modules()] == before


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (IDS, "data is one Tensor"),
        (["a text"], "data holds 'a text'"),
        ([IDS[0]], r"data holds a tensor of shape \[\d+\]"),
        (None, "data is one NoneType"),
    ],
)
def test_data_that_are_no_batches_are_named(data, message):
    model = loud("llama")
    for measured in (mmskip.importance, lambda model, data: drop_order(model, data, 1)):
        with pytest.raises(ValueError, match=message):
            measured(model, data)
    with pytest.raises(ValueError, match="drop is 2; expected a list of block indices"):
        LayerPlanConfig(drop=2)


def test_the_names_of_version_0_1_still_work():
    from mmskip.calibration.deprecated import greedy_drops as old_drops

    model = loud("llama")
    with pytest.warns(FutureWarning, match="mmskip.calibration.greedy_drops"):
        assert LayerPlanConfig.greedy(model, [IDS], 1) == greedy_drops(model, [IDS], 1)
    with pytest.warns(FutureWarning, match="mmskip.calibration.drop_order"):
        assert old_drops(model, [IDS], 1, kv="fill") == drop_order(model, [IDS], 1, cache_policy="recompute")
    sys.modules.pop("mmskip.methods.greedy_drops", None)  # the warning comes with the first import of a process
    with pytest.warns(FutureWarning, match=r"calibration\.deprecated"):
        from mmskip.methods.greedy_drops import greedy_drops as moved  # noqa: F401
