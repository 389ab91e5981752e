"""Logits of half precision: one definition for every path, computed in fp32."""

import pytest
import torch
from narration_data import batch
from streams import MOD, tiny_narrator
from torch.nn import functional as F

import mmskip
from mmskip.models.common.fp32_head import SLICE, fp32_linear, head_only_at
from mmskip.models.common.positions import Positions


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_products_are_not_rounded_and_have_the_gradients_of_a_linear_layer(dtype, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)
    x, weight, bias = (
        torch.randn(shape).to(device, dtype).requires_grad_()
        for shape in ((7, 33), (2 * SLICE + 5, 33), (2 * SLICE + 5,))
    )
    assert fp32_linear(x[:0], weight).shape == (0, len(weight))
    logits = fp32_linear(x, weight, bias)
    exact = x.double() @ weight.double().t() + bias.double()
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, atol=1e-5, rtol=1e-5)
    rounded = F.linear(x, weight, bias).float()
    assert (rounded - exact).abs().max() > 100 * (logits - exact).abs().max()
    inputs, grads = (x, weight, bias), torch.randn_like(logits)
    expected = torch.autograd.grad(exact, inputs, grads.double())
    for got, wanted in zip(torch.autograd.grad(logits, inputs, grads), expected, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, wanted, atol=0.2, rtol=0.02)


def test_products_under_autocast_are_of_what_autocast_makes_of_their_inputs():
    torch.manual_seed(0)
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.linear(x, weight).dtype == torch.bfloat16
        logits = fp32_linear(x, weight)
    torch.testing.assert_close(logits, x.bfloat16().float() @ weight.bfloat16().float().t())


@pytest.mark.parametrize("methods", [(), (MOD,)])
def test_a_half_models_logits_are_the_products_of_its_last_hidden_states(methods):
    model, seen = tiny_narrator(methods, seed=4, llm_dtype="bfloat16"), []
    head = model.llm.get_output_embeddings()
    given = batch([2, 3], [4])
    at = Positions.of(given["labels"], given["layout"])
    # registered before `head_only_at`: it sees the hidden states of all tokens
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        logits = model(given, at.rows, at.cols)
        handle.remove()
        exact = seen[0][at.rows, at.cols].double() @ head.weight.double().t()
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, atol=1e-5, rtol=1e-5)
    assert not torch.equal(logits, logits.bfloat16().float())
    # nothing of it stays on the model
    assert not head._forward_hooks and not head._forward_pre_hooks


def test_words_that_tie_when_rounded_are_told_apart():
    model = tiny_narrator(llm_dtype="bfloat16")
    head = model.llm.get_output_embeddings()
    hidden = torch.ones(1, 1, head.in_features, dtype=torch.bfloat16)
    with torch.no_grad():
        head.weight.zero_()
        head.weight[3:5, 0] = 8.0
        head.weight[4, 1] = 0.01
    zero = torch.zeros(1, dtype=torch.long)
    assert int(head(hidden)[0, 0].argmax()) == 3
    with head_only_at(model.llm, zero, zero):
        assert int(head(hidden)[0].argmax()) == 4


def test_a_trace_counts_the_rows_of_a_half_head():
    given, counts = batch([2, 3], [4]), []
    for dtype in ("float32", "bfloat16"):
        model = tiny_narrator((MOD,), llm_dtype=dtype)
        at = Positions.of(given["labels"], given["layout"])
        with torch.no_grad(), mmskip.trace(model.llm) as trace:
            model(given, at.rows, at.cols)
        counts.append((trace.forwards[0].head_rows, mmskip.cost(model.llm, trace).flops))
    assert counts[0] == counts[1]
    assert counts[0][0] == len(at.rows)


def test_a_head_that_is_more_than_a_linear_layer_keeps_its_output():
    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = tiny_narrator(llm_dtype="bfloat16")
    head = model.llm.get_output_embeddings()
    head.__class__ = Scaled
    hidden = torch.randn(1, 2, head.in_features).bfloat16()
    zero = torch.zeros(1, dtype=torch.long)
    with torch.no_grad(), head_only_at(model.llm, zero, zero):
        assert torch.equal(head(hidden)[0], 2 * F.linear(hidden[0, 0], head.weight))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_reaches_the_head_in_any_precision(dtype):
    model = tiny_narrator((MOD,), llm_dtype=dtype).train()
    head = model.llm.get_output_embeddings().weight
    losses = []
    for _ in range(3):
        sums = model.loss_sums(batch([2, 3], [4]))
        loss = sums[0] / sums[3:].sum()
        losses.append(float(loss.detach()))
        (grad,) = torch.autograd.grad(loss, head)
        assert grad.dtype == head.dtype and grad.abs().sum() > 0
        with torch.no_grad():
            head -= 0.5 * grad
    assert losses[-1] < losses[0] - 0.05
