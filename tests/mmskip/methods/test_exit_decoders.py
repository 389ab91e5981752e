"""Early exit of causal decoders, token by token: exact against the base model, without a cache, sample by sample."""

import copy
import functools
from pathlib import Path
from typing import Any

import contract
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_decoders import VOCAB, tiny_decoder
from tiny_vlms import tiny_vlm
from torch import Tensor
from transformers import DynamicCache

import mmskip
from mmskip import EarlyExitConfig
from mmskip.exits.runs import layers_run
from mmskip.exits.settings import ExitAt, FixedExit

NAMES = ("llama", "mixtral", "gpt2", "gpt_neox", "opt", "cohere")
MORE = [pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "mistral", "gemma", "phi", "qwen2", "olmo2")]
IDS = torch.randint(3, VOCAB, (3, 9), generator=torch.Generator().manual_seed(4))
MASK = torch.ones_like(IDS)
MASK[1, :4] = 0
LAYERS = 4
SETTINGS: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}


@functools.cache
def _built(name: str) -> Any:
    model = tiny_decoder(name).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return model


def build(name: str) -> Any:
    return copy.deepcopy(_built(name))


@functools.cache
def mixing(name: str) -> float:
    """A threshold under which tokens leave at several layers, some of them before the last."""
    best = (0, 0.0)
    for threshold in torch.linspace(-0.3, 0.95, 26).tolist():
        model = mmskip.apply_(build(name), EarlyExitConfig(decoder=threshold))
        logits(model)
        kinds = layers_run(model)["decoder"].unique()
        best = max(best, (len(kinds) if kinds[0] < LAYERS else 0, threshold))
    assert best[0] > 1
    return best[1]


@torch.no_grad()
def logits(model: Any, ids: Tensor = IDS, mask: Tensor = MASK, **settings: Any) -> Tensor:
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    given = {} if model.config.model_type == "opt" else {"position_ids": positions}
    found: Tensor = model(input_ids=ids, attention_mask=mask, **given, **settings).logits
    return found


def stepwise(model: Any) -> Tensor:
    """Logits in three parts over the cache."""
    cache, found = DynamicCache(), []
    for start, end in ((0, 6), (6, 7), (7, 9)):
        found.append(logits(model, IDS[:, start:end], MASK[:, :end], past_key_values=cache, use_cache=True))
    return torch.cat(found, 1)


@pytest.mark.parametrize("name", [*NAMES, *MORE])
def test_never_firing_thresholds_are_the_base_model_and_exits_agree_everywhere(name: str) -> None:
    model = build(name)
    plain, said = logits(model, use_cache=False), model.generate(IDS, attention_mask=MASK, **SETTINGS)
    scored = {"decoder": ExitAt(0.99999)}
    for kv, never in (("recompute", {"decoder": 1.0}), ("recompute", scored), ("copy", scored), ("mask", scored)):
        mmskip.apply_(model, EarlyExitConfig(**never, cache_policy=kv))
        assert torch.equal(logits(model, use_cache=False), plain)
        assert torch.equal(model.generate(IDS, attention_mask=MASK, **SETTINGS), said)
        mmskip.remove_(model)
    real = MASK.bool()
    for kv in ("recompute", "copy", "mask"):
        mmskip.apply_(model, EarlyExitConfig(decoder=mixing(name), cache_policy=kv, compact="never"))
        whole = logits(model, use_cache=False)
        exits = layers_run(model)["decoder"]
        torch.testing.assert_close(stepwise(model)[real], whole[real], atol=3e-5, rtol=1e-5)
        for beams in (1, 2):
            call = {"attention_mask": MASK, "num_beams": beams, **SETTINGS}
            tokens = model.generate(IDS, **call)
            assert torch.equal(model.generate(IDS, use_cache=False, **call), tokens)
        alone = logits(model, IDS[1:2, 4:], MASK[1:2, 4:])
        torch.testing.assert_close(alone, whole[1:2, 4:], atol=3e-5, rtol=1e-5)
        assert torch.equal(layers_run(model)["decoder"], exits[1:2, 4:])
        mmskip.remove_(model)
        mmskip.apply_(model, EarlyExitConfig(decoder=mixing(name), cache_policy=kv, compact="always"))
        torch.testing.assert_close(stepwise(model)[real], whole[real], atol=3e-5, rtol=1e-5)
        assert torch.equal(model.generate(IDS, **call), tokens)
        mmskip.remove_(model)
    assert torch.equal(logits(model, use_cache=False), plain) and mmskip.applied(model) == []


@pytest.mark.parametrize("criterion", ["confidence", "patience"])
def test_the_tied_head_is_the_models_own(criterion: str) -> None:
    model = build("llama")
    shallow = build("llama")
    del shallow.model.layers[2:]
    expected = logits(shallow, use_cache=False)
    mmskip.apply_(model, EarlyExitConfig(decoder=ExitAt(0.0, criterion, exit_layers=(2,))))
    torch.testing.assert_close(logits(model, use_cache=False), expected)
    if criterion == "confidence":
        top = expected.softmax(-1).amax(-1)
        mmskip.remove_(model)
        mmskip.apply_(model, EarlyExitConfig(decoder=ExitAt(top[0].median().item(), criterion, exit_layers=(2,))))
        logits(model)
        assert torch.equal(layers_run(model)["decoder"] == 2, top > top[0].median().item())


def test_adapters_copies_training_and_saving(tmp_path: Path) -> None:
    config = EarlyExitConfig(decoder=mixing("llama"))
    model = mmskip.apply_(build("llama"), config)
    early = logits(model)
    twin = copy.deepcopy(model)
    mmskip.save(model, tmp_path)
    assert torch.equal(logits(mmskip.load_(build("llama"), tmp_path)), early)
    mmskip.remove_(model)
    assert torch.equal(logits(twin), early) and not torch.equal(logits(model), early)
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    found = []
    for first in (True, False):
        torch.manual_seed(0)
        base = build("llama")
        if first:
            tuned = get_peft_model(mmskip.apply_(base, config), lora)
        else:
            tuned = mmskip.apply_(get_peft_model(base, lora), config)
        found.append(logits(tuned.eval()))
        tuned.train().gradient_checkpointing_enable()
        loss = tuned(input_ids=IDS, labels=IDS).loss
        loss.backward()
        assert all(p.grad is not None for n, p in tuned.named_parameters() if "lora" in n)
    torch.testing.assert_close(*found)
    half = mmskip.apply_(build("llama").to(torch.bfloat16), config)
    assert half.generate(IDS, attention_mask=MASK, **SETTINGS).shape == (3, 14) and logits(half).isfinite().all()


def test_the_decoder_of_a_vision_language_model_is_left_early() -> None:
    model = tiny_vlm("llava").eval()
    ids = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(1))
    plain = model(input_ids=ids).logits
    mmskip.apply_(model, EarlyExitConfig(decoder=1.0))
    assert torch.equal(model(input_ids=ids).logits, plain)
    mmskip.remove_(model)
    mmskip.apply_(model, EarlyExitConfig(decoder=FixedExit(1)))
    model(input_ids=ids)
    assert (layers_run(model)["decoder"] == 1).all()
    tokens = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, use_cache=False), tokens)


def test_what_cannot_exit_early_is_refused() -> None:
    for name, config, message in (
        ("mistral_window", EarlyExitConfig(decoder=0.9), "sliding attention"),
        ("llama", EarlyExitConfig(encoder=0.9), "has a decoder only"),
        ("gemma2", EarlyExitConfig(decoder=0.9), "sliding"),
        ("granite", EarlyExitConfig(decoder=ExitAt(0.9, "margin")), "logits_scaling"),
        ("llama", EarlyExitConfig(decoder=ExitAt(0.9, decide_once=True)), "decide_once is True; the first tokens"),
        ("llama", EarlyExitConfig(decoder=ExitAt(0.9, decay=0.5)), "decay is 0.5; the first tokens"),
    ):
        model = tiny_decoder(name, **({"logits_scaling": 2.0} if name == "granite" else {}))
        with pytest.raises(ValueError, match=message):
            mmskip.apply_(model, config)
        assert mmskip.applied(model) == []
    model = mmskip.apply_(build("llama"), mmskip.LayerPlanConfig(drop=(1,)))
    with pytest.raises(
        ValueError, match=r"EarlyExit.* and LayerPlan.* do not compose on one stack: both claim block\.1\."
    ):
        mmskip.apply_(model, EarlyExitConfig(decoder=0.9))


def test_exits_and_bits_compose_exactly_in_both_orders() -> None:
    bits = mmskip.LayerBitsConfig((8,) * LAYERS)
    expected = mmskip.apply_(build("llama"), bits)
    exits = EarlyExitConfig(decoder=FixedExit(LAYERS - 1))
    found = []
    for order in ((bits, exits), (exits, bits)):
        model = build("llama")
        for config in order:
            mmskip.apply_(model, config)
        found.append(logits(model, use_cache=False))
        torch.testing.assert_close(stepwise(model)[MASK.bool()], found[-1][MASK.bool()], atol=3e-5, rtol=1e-5)
    assert torch.equal(*found) and not torch.equal(found[0], logits(expected, use_cache=False))
    del expected.model.layers[LAYERS - 1 :]
    torch.testing.assert_close(found[0], logits(expected, use_cache=False))


CONTRACT = [
    contract.Case(
        base,
        EarlyExitConfig(decoder=FixedExit(2)),
        EarlyExitConfig(decoder=1.0),
        {"cache_policy": "none"},
    )
    for base in (contract.DECODER, contract.VLM)
]
