"""Routed models train: with LoRA in every order, gradient checkpointing, accelerate's hooks, and without vision."""

import copy

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, get_peft_model
from tiny_decoders import VOCAB, randomize_routers, stream_layout, tiny_decoder

import mmskip

NAMES = ("llama", "qwen3", "mistral_window")


def batch(rows: int = 2, frames: int = 3):
    layout = stream_layout(frames).expand(rows, -1)
    ids = torch.randint(3, VOCAB, layout.shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "layout": layout, "labels": ids}


def router_gradients(model):
    return {n: p.grad for n, p in model.named_parameters() if "mmskip_router" in n and "original_module" not in n}


def lora(**settings):
    return LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, **settings)


@pytest.mark.parametrize("name", NAMES)
def test_lora_before_mmskip_leaves_the_router_learning(name):
    model = get_peft_model(tiny_decoder(name), lora()).train()
    mmskip.apply_(model, mmskip.MoDConfig(gate="sigmoid"))
    model(**batch()).loss.backward()
    gradients = router_gradients(model)
    assert len(gradients) == 2 and all(g is not None and g.abs().sum() > 0 for g in gradients.values())
    assert all(p.grad is not None for n, p in model.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("name", NAMES)
def test_lora_after_mmskip_is_refused_while_it_freezes_the_router(name):
    model = mmskip.apply_(tiny_decoder(name), mmskip.MoDConfig())
    peft_model = get_peft_model(model, lora()).train()
    assert not any("mmskip" in n for n, _ in peft_model.named_parameters() if "lora_" in n), "all-linear wrapped it"
    with pytest.raises(RuntimeError, match="modules_to_save"):
        peft_model(**batch())
    peft_model.eval()(**batch())


@pytest.mark.parametrize("name", NAMES)
def test_lora_after_mmskip_trains_the_router_as_a_module_to_save(name, tmp_path):
    base = tiny_decoder(name)
    model = mmskip.apply_(copy.deepcopy(base), mmskip.MoDConfig(gate="sigmoid"))
    model = get_peft_model(model, lora(modules_to_save=["mmskip_router"])).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    before = copy.deepcopy(router_gradients(model))
    model(**batch()).loss.backward()
    optimizer.step()
    gradients = router_gradients(model)
    assert before.keys() == gradients.keys()
    assert all(g is not None and g.abs().sum() > 0 for g in gradients.values())
    mmskip.save(model, tmp_path)
    fresh = mmskip.load_(copy.deepcopy(base), tmp_path)
    trained = [p for n, p in model.named_parameters() if "mmskip_router" in n and "modules_to_save" in n]
    loaded = [p for n, p in fresh.named_parameters() if "mmskip_router" in n]
    assert all(torch.equal(a, b) for a, b in zip(trained, loaded, strict=True))


def test_lora_keys_are_the_same_with_and_without_mmskip():
    plain = get_peft_model(tiny_decoder("llama"), lora())
    routed = mmskip.apply_(get_peft_model(tiny_decoder("llama"), lora()), mmskip.MoDConfig())
    added = set(routed.state_dict()) - set(plain.state_dict())
    assert set(plain.state_dict()) <= set(routed.state_dict())
    assert all(".mmskip_router." in key for key in added)


def test_freezing_everything_in_a_block_on_purpose_is_allowed():
    model = mmskip.apply_(tiny_decoder("llama"), mmskip.MoDConfig()).train()
    model.model.requires_grad_(False)
    model(**batch()).loss.backward()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("router", ["linear", "mlp", "random"])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_gives_the_same_gradients(name, reentrant, router):
    model = mmskip.apply_(tiny_decoder(name), mmskip.MoDConfig(gate="sigmoid", router=router)).train()
    randomize_routers(model)
    example = batch()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        torch.manual_seed(3)
        embeds = model.get_input_embeddings()(example["input_ids"])
        model(inputs_embeds=embeds, layout=example["layout"], labels=example["labels"], use_cache=False).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, atol=1e-6, rtol=1e-5, msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_without_vision_gives_the_router_a_zero_gradient(name):
    model = mmskip.apply_(tiny_decoder(name), mmskip.MoDConfig(gate="linear")).train()
    ids = torch.randint(3, VOCAB, (2, 9))
    model(input_ids=ids, labels=ids, layout=torch.full_like(ids, -1)).loss.backward()
    gradients = router_gradients(model)
    assert len(gradients) == 2 and all(g is not None and g.abs().sum() == 0 for g in gradients.values())


@pytest.mark.parametrize(
    ("gate", "router"), [("linear", "linear"), ("sigmoid", "linear"), ("tanh", "linear"), ("tanh", "mlp")]
)
def test_training_lowers_the_loss_and_moves_the_router(gate, router):
    model = mmskip.apply_(tiny_decoder("llama"), mmskip.MoDConfig(gate=gate, router=router)).train()
    before = copy.deepcopy({n: p.detach() for n, p in model.named_parameters() if "mmskip" in n})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss = model(**batch()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)


@pytest.mark.parametrize("router", ["norm", "random", "uniform"])
def test_routers_without_weights_add_none(router):
    model = tiny_decoder("llama")
    keys = list(model.state_dict())
    mmskip.apply_(model, mmskip.MoDConfig(router=router))
    assert list(model.state_dict()) == keys
    model.train()(**batch()).loss.backward()


@pytest.mark.parametrize("hooked_first", [True, False])
def test_accelerate_hooks_are_served(hooked_first):
    model = tiny_decoder("llama")
    example = batch()
    expected = mmskip.apply_(copy.deepcopy(model), mmskip.MoDConfig(keep=0.3))(**example).logits
    plain = model(input_ids=example["input_ids"]).logits

    def hook():
        for block in model.model.layers:
            add_hook_to_module(block, AlignDevicesHook(execution_device="cpu", io_same_device=True))

    if hooked_first:
        hook()
    mmskip.apply_(model, mmskip.MoDConfig(keep=0.3))
    if not hooked_first:
        hook()
    assert torch.equal(model(**example).logits, expected)
    mmskip.remove_(model)
    assert torch.equal(model(input_ids=example["input_ids"]).logits, plain)


def test_accelerate_hooks_can_be_taken_off_while_mmskip_is_on():
    model = tiny_decoder("llama")
    example = batch()
    add_hook_to_module(model.model.layers[1], ModelHook())
    mmskip.apply_(model, mmskip.MoDConfig(keep=0.3))
    routed = model(**example).logits
    remove_hook_from_module(model.model.layers[1])
    assert torch.equal(model(**example).logits, routed)
    mmskip.remove_(model)
    assert torch.equal(model(input_ids=example["input_ids"]).logits, tiny_decoder("llama")(example["input_ids"]).logits)


def test_a_patched_forward_is_refused():
    model = tiny_decoder("llama")
    block = model.model.layers[1]
    block.forward = lambda *args, **kwargs: type(block).forward(block, *args, **kwargs)
    with pytest.raises(ValueError, match=r"block\.1.*instance-level `forward`"):
        mmskip.apply_(model, mmskip.MoDConfig())
    assert mmskip.applied(model) == []


def test_noise_explores_in_training_only_and_prefers_high_scores():
    model = mmskip.apply_(tiny_decoder("llama"), mmskip.MoDConfig(layers=(1,), noise=1.0))
    # hidden states of a tiny random model are small: scores of order 1 need large weights
    model.model.layers[1].mmskip_router.weight.data.normal_(std=20.0, generator=torch.Generator().manual_seed(0))
    example = batch(rows=1, frames=40)
    del example["labels"]

    def kept():
        with torch.no_grad(), mmskip.trace(model) as trace:
            model(**example)
        return trace.forwards[0].layers[1].kept

    best = kept()
    assert torch.equal(best, kept())
    model.train()
    first, second = kept(), kept()
    assert not torch.equal(first, second) and first.sum() == best.sum()
    vision = example["layout"] >= 0
    agreement = ((first & best)[vision].sum() / best[vision].sum()).item()
    assert 0.3 < agreement < 1, f"{agreement:.2f} of the best tokens were kept; chance is 0.2"
