"""Traces say what ran, and counted costs agree with torch's own counter."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_decoders import VOCAB, stream_layout, tiny_decoder
from transformers import DynamicCache

import mmskip
from mmskip.costs import torch_flops

LAYOUT = stream_layout(6, lead=0).expand(2, -1)
IDS = torch.randint(3, VOCAB, LAYOUT.shape, generator=torch.Generator().manual_seed(0))


def counted(call):
    with torch_flops() as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral_window", "phi3", "olmo2", "opt"])
@pytest.mark.parametrize("keep", [0.2, 1.0])
def test_counted_flops_agree_with_torch(name, keep):
    wide = {"hidden_size": 128, "intermediate_size": 256, "ffn_dim": 256, "word_embed_proj_dim": 128}
    model = tiny_decoder(name, **wide)
    dense = counted(lambda: model(IDS))
    mmskip.apply_(model, mmskip.MoDConfig(keep=keep))
    with torch.no_grad(), mmskip.trace(model) as trace:
        ran = counted(lambda: model(IDS, layout=LAYOUT))
    cost = mmskip.cost(model, trace)
    assert cost.dense_flops == pytest.approx(dense, rel=1e-3)
    assert cost.flops == pytest.approx(ran, rel=3e-3)
    assert cost.ideal_speedup == pytest.approx(dense / ran, rel=3e-3)


def test_counted_flops_of_a_training_step_and_of_lora():
    model = get_peft_model(tiny_decoder("llama", hidden_size=128), LoraConfig(r=4, target_modules="all-linear"))
    mmskip.apply_(model, mmskip.MoDConfig())
    with torch.no_grad(), mmskip.trace(model) as trace:
        ran = counted(lambda: model(input_ids=IDS, layout=LAYOUT))
    assert mmskip.cost(model, trace).flops == pytest.approx(ran, rel=5e-3)
    model.train()
    with mmskip.trace(model) as step:
        model(input_ids=IDS, layout=LAYOUT)
    assert mmskip.cost(model, step).flops == pytest.approx(3 * mmskip.cost(model, trace).flops)


def test_trace_counts_tokens_and_stored_bytes():
    model = mmskip.apply_(tiny_decoder("llama"), mmskip.MoDConfig(keep=0.2))
    cache = DynamicCache(config=model.config)
    with torch.no_grad(), mmskip.trace(model) as trace:
        model(IDS, layout=LAYOUT, past_key_values=cache)
        model(torch.tensor([[4], [5]]), past_key_values=cache)
    first, second = trace.forwards
    assert [layer.ran for layer in first.layers] == [132, 36, 132, 36]
    assert [layer.tokens for layer in second.layers] == [2] * 4 and second.layers[1].keys == 19
    stored = [sum(t.numel() * t.element_size() for t in (layer.keys, layer.values)) for layer in cache.layers]
    assert [layer.kv_bytes for layer in second.layers] == stored
    cost = mmskip.cost(model, trace)
    assert cost.kv_bytes == sum(stored) and cost.dense_kv_bytes == 4 * stored[0]
    assert cost.kv_bytes / cost.dense_kv_bytes == pytest.approx((67 + 19) / (2 * 67))
    assert "ideal speed-up" in str(cost)
    assert torch.equal(first.layout, LAYOUT)


def test_a_window_bounds_the_dense_bytes_it_is_compared_with():
    model = tiny_decoder("mistral_window")
    with torch.no_grad(), mmskip.trace(model) as trace:
        model(IDS, use_cache=True)
    assert trace.forwards[0].layers[0].kv_bytes == trace.forwards[0].layers[0].dense_kv_bytes


def test_nothing_of_a_trace_remains_also_after_an_error():
    model = tiny_decoder("llama")
    hooks = lambda: [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]  # noqa: E731
    before = hooks()
    with pytest.raises(RuntimeError, match="stop"), mmskip.trace(model):
        raise RuntimeError("stop")
    assert hooks() == before


def test_a_trace_inside_a_trace_is_refused():
    model = tiny_decoder("llama")
    with mmskip.trace(model), pytest.raises(RuntimeError, match="already"), mmskip.trace(model):
        pass


def test_an_empty_trace_is_refused():
    model = tiny_decoder("llama")
    with mmskip.trace(model) as trace:
        pass
    with pytest.raises(ValueError, match="empty"):
        mmskip.cost(model, trace)
    with pytest.raises(TypeError, match=r"got Trace and LlamaForCausalLM; expected.*mmskip.cost\(model, trace\)"):
        mmskip.cost(trace, model)
