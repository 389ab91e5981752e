"""The ragged backend of transformers against its own sdpa backend."""

import copy
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, StaticCache
from transformers.masking_utils import sliding_window_causal_mask_function

import mmskip
from mmskip.ops.attention import ragged_attention
from mmskip.ops.hf_attention import pack_mask, ragged_mask, register_attention

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS = {"llama": LlamaConfig(**SIZES), "mistral-window": MistralConfig(**SIZES, sliding_window=4)}


@pytest.fixture(params=CONFIGS)
def pair(request):
    """The same weights under sdpa and under the ragged backend."""
    name = register_attention()
    torch.manual_seed(0)
    models = []
    for implementation in ("sdpa", name):
        # from_config keeps the very config it is given, and the model asks it for the implementation to use.
        config = copy.deepcopy(CONFIGS[request.param])
        model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).double().eval()
        models.append(model)
    base, ragged = models
    ragged.load_state_dict(base.state_dict())
    assert base.config._attn_implementation == "sdpa"
    assert ragged.config._attn_implementation == name
    return base, ragged


def make_batch(side: str) -> dict[str, torch.Tensor]:
    """Rows of 9, 4 and 6 tokens, padded on one side."""
    ids = torch.randint(3, 61, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(3, 9, dtype=torch.long)
    for row, length in enumerate((9, 4, 6)):
        mask[row, length:] = 0
    mask = mask.flip(1) if side == "left" else mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids * mask, "attention_mask": mask, "position_ids": positions}


@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_batch_equals_sdpa_with_gradients(pair, side):
    base, ragged = pair
    batch = make_batch(side)
    real = batch["attention_mask"].bool()
    outputs = []
    for model in (base, ragged):
        logits = model(**batch).logits[real]
        loss = (logits * torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view_as(logits)).sum()
        outputs.append((logits, torch.autograd.grad(loss, list(model.parameters()))))
    (want, want_grads), (got, got_grads) = outputs
    assert torch.allclose(got, want, atol=1e-10)
    for a, b in zip(got_grads, want_grads, strict=True):
        assert torch.allclose(a, b, atol=1e-9)


def test_no_padding_mask_equals_sdpa(pair):
    base, ragged = pair
    ids = make_batch("right")["input_ids"]
    assert torch.allclose(ragged(ids).logits, base(ids).logits, atol=1e-10)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_cached_generation_equals_sdpa(pair, cache):
    batch = make_batch("left")
    batch.pop("position_ids")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    options |= {"return_dict_in_generate": True, "eos_token_id": None, "disable_compile": True}
    if cache == "static":
        options["cache_implementation"] = "static"
    want, got = (model.generate(**batch, **options) for model in pair)
    assert torch.equal(got.sequences, want.sequences)
    assert torch.allclose(torch.stack(got.logits), torch.stack(want.logits), atol=1e-10)


def test_chunks_through_a_cache_equal_one_forward(pair):
    _, ragged = pair
    ids = make_batch("right")["input_ids"]
    whole = ragged(ids).logits
    cache, parts = None, []
    for chunk in ids.split([4, 1, 4], dim=1):
        out = ragged(chunk, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-10)


def test_static_cache_prefill_ignores_empty_slots(pair):
    base, ragged = pair
    ids = make_batch("right")["input_ids"]
    want, got = (
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=20)).logits
        for model in (base, ragged)
    )
    assert torch.allclose(got, want, atol=1e-10)


def test_packed_sequences_by_position_ids_equal_sdpa(pair):
    base, ragged = pair
    ids = make_batch("right")["input_ids"][:1]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]])
    want, got = (model(ids, position_ids=positions, use_cache=False).logits for model in (base, ragged))
    assert torch.allclose(got, want, atol=1e-10)
    assert not torch.allclose(got, ragged(ids).logits, atol=1e-3)


def test_padding_in_the_middle_and_an_empty_row(pair):
    base, ragged = pair
    batch = make_batch("right")
    batch["attention_mask"][0, 3:5] = 0
    real = batch["attention_mask"].bool()
    want, got = (model(**batch).logits[real] for model in (base, ragged))
    assert torch.allclose(got, want, atol=1e-10)
    batch["attention_mask"][1] = 0
    got = ragged(**batch).logits
    assert got.isfinite().all()
    assert torch.allclose(got[real & batch["attention_mask"].bool()][:7], want[:7], atol=1e-10)


def test_causal_and_window_masks_take_the_fast_kernels():
    padding = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]).bool()
    plain = ragged_mask(2, 5, 5, attention_mask=padding).mmskip_packing
    assert plain.mask_BQS is None
    assert (plain.q_lens, plain.kv_lens, plain.window) == ((5, 3), (5, 3), None)
    window = sliding_window_causal_mask_function(2)
    windowed = ragged_mask(2, 5, 5, mask_function=window, attention_mask=padding, local_size=2).mmskip_packing
    assert windowed.mask_BQS is None
    assert windowed.window == 2
    prefix = ragged_mask(1, 3, 3, mask_function=lambda b, h, q, k: (k <= q) | (k < 2))
    assert pack_mask(prefix).mask_BQS is not None


def test_a_mask_of_the_user_is_honoured(pair):
    base, ragged = pair
    ids = make_batch("right")["input_ids"]
    mask = torch.rand(3, 1, 9, 9, generator=torch.Generator().manual_seed(3)) < 0.5
    mask |= torch.eye(9, dtype=torch.bool)
    want, got = (model(ids, attention_mask=mask).logits for model in (base, ragged))
    assert torch.allclose(got, want, atol=1e-10)
    with pytest.raises(ValueError, match="expected the bool mask"):
        ragged(ids, attention_mask=mask.double())


def test_attention_dropout_is_refused():
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, attention_dropout=0.1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=register_attention()).train()
    with pytest.raises(ValueError, match="no attention dropout, which LlamaAttention needs"):
        model(torch.tensor([[1, 2, 3]]))


def test_nothing_is_registered_at_import():
    code = (
        "import mmskip, mmskip.ops.hf_attention\n"
        "from transformers import AttentionInterface\n"
        "print('mmskip_ragged' in AttentionInterface())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "False", run.stderr


def test_fast_kernel_receives_packed_tokens_only(pair, monkeypatch):
    """Padding must not reach the kernel: the packed lists are as long as the real tokens."""
    seen = []

    def spy(q, k, v, q_lens, kv_lens, **kwargs):
        seen.append((len(q), len(k), tuple(q_lens)))
        return ragged_attention(q, k, v, q_lens, kv_lens, **kwargs)

    monkeypatch.setattr("mmskip.ops.hf_attention.ragged_attention", spy)
    _, ragged = pair
    ragged(**make_batch("left"))
    assert seen == [(19, 19, (9, 4, 6))] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("name", CONFIGS)
def test_backend_on_cuda_equals_sdpa_on_a_cpu(name, dtype, tolerance, side):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])
    config.head_dim = 64
    base = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    ragged = copy.deepcopy(base).to("cuda", dtype)
    ragged.set_attn_implementation(register_attention())
    batch = make_batch(side)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        want = base(**batch).logits[real]
        got = ragged(**{key: value.cuda() for key, value in batch.items()}).logits.float().cpu()[real]
        methods = [copy.deepcopy(base), copy.deepcopy(base).to("cuda", dtype)]
        for model, attention in zip(methods, (None, "mmskip_ragged"), strict=True):
            mmskip.apply_(model, mmskip.MoDConfig(keep=0.4, router="uniform", layers=[1], attention=attention))
        layout = torch.where(batch["attention_mask"] > 0, torch.tensor([-1, 0, 0, 0, 0, -1, 1, 1, -1]), -1)
        routed = methods[0](**batch, layout=layout).logits[real]
        ours = methods[1](**{k: v.cuda() for k, v in {**batch, "layout": layout}.items()}).logits
    assert torch.allclose(got, want, atol=tolerance)
    assert torch.allclose(ours.float().cpu()[real], routed, atol=tolerance)
