"""Ragged attention: the padded path and the xFormers biases against the naive loop."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mmskip.ops import attention
from mmskip.ops.attention import (
    last_queries_mask,
    pad_segments,
    ragged_attention,
    ragged_attention_naive,
    unpad_segments,
    xformers_bias,
)
from mmskip.ops.backend import import_xformers, operation_path

LENGTHS = [
    ([5], [5]),
    ([3, 3], [3, 3]),
    ([5, 1, 3], [5, 1, 3]),
    ([1, 1], [7, 4]),
    ([2, 5, 0, 1], [9, 5, 3, 4]),
    ([0, 3], [0, 8]),
]


def make_case(q_lens, kv_lens, H=4, G=2, K=8, V=8, dtype=torch.float64, device="cpu"):
    """Random packed queries, keys and values that require gradients."""
    generator = torch.Generator().manual_seed(sum(q_lens) * 100 + sum(kv_lens))
    shapes = [(sum(q_lens), H, K), (sum(kv_lens), G, K), (sum(kv_lens), G, V)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_() for s in shapes]


def gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Gradients of a fixed random projection of `out`."""
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return list(torch.autograd.grad(out, inputs, weight.to(out.device, out.dtype), materialize_grads=True))


def assert_parity(fast: Tensor, naive: Tensor, inputs: list[Tensor], atol: float) -> None:
    assert torch.allclose(fast, naive, atol=atol)
    for got, want in zip(gradients(fast, inputs), gradients(naive, inputs), strict=True):
        assert torch.allclose(got, want, atol=atol)


@pytest.fixture(params=["padded", "one by one"])
def both_ways(request, monkeypatch):
    """Short and long segments take different ways; run the small cases of the tests through both."""
    monkeypatch.setattr(attention, "LONG_PAIRS", 2**14 if request.param == "padded" else 0)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("window", [None, 1, 3])
@pytest.mark.parametrize(("H", "G"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize(("q_lens", "kv_lens"), LENGTHS)
def test_matches_the_loop(q_lens, kv_lens, H, G, window):
    inputs = make_case(q_lens, kv_lens, H, G)
    fast = ragged_attention(*inputs, q_lens, kv_lens, window=window)
    naive = ragged_attention_naive(*inputs, q_lens, kv_lens, window=window)
    assert_parity(fast, naive, inputs, 1e-12)


@pytest.mark.usefixtures("both_ways")
@pytest.mark.parametrize("window", [None, 4])
def test_positions_decide_what_a_query_sees(window):
    q_lens, kv_lens = [2, 3, 1, 1], [4, 2, 3, 0]
    q_positions = torch.tensor([7, 9, 0, 5, 20, 3, 8])
    kv_positions = torch.tensor([0, 4, 7, 9, 5, 6, 30, 31, 32])
    inputs = make_case(q_lens, kv_lens)
    args = (q_lens, kv_lens, q_positions, kv_positions, window)
    fast, naive = ragged_attention(*inputs, *args), ragged_attention_naive(*inputs, *args)
    assert_parity(fast, naive, inputs, 1e-12)
    assert (fast[[2, 5, 6]] == 0).all(), "a query that sees no key gets zeros"


def test_scale_and_a_value_width_of_its_own():
    q_lens, kv_lens = [3, 2], [3, 5]
    inputs = make_case(q_lens, kv_lens, V=5)
    fast = ragged_attention(*inputs, q_lens, kv_lens, scale=0.7)
    naive = ragged_attention_naive(*inputs, q_lens, kv_lens, scale=0.7)
    assert fast.shape == (5, 4, 5)
    assert_parity(fast, naive, inputs, 1e-12)


def test_segments_do_not_see_each_other():
    q_lens, kv_lens = [3, 4], [6, 4]
    q, k, v = make_case(q_lens, kv_lens)
    together = ragged_attention(q, k, v, q_lens, kv_lens)
    assert torch.allclose(together[:3], ragged_attention(q[:3], k[:6], v[:6], [3], [6]), atol=1e-12)
    poisoned = torch.cat([k[:6], torch.full_like(k[6:], torch.nan)])
    assert torch.allclose(ragged_attention(q, poisoned, v, q_lens, kv_lens)[:3], together[:3], atol=1e-12)


def test_chunked_queries_equal_the_whole_sequence():
    q, k, v = make_case([11], [11])
    whole = ragged_attention(q, k, v, [11], [11], window=5)
    start = 0
    for size in (1, 4, 3, 3):
        stop = start + size
        chunk = ragged_attention(q[start:stop], k[:stop], v[:stop], [size], [stop], window=5)
        assert torch.allclose(chunk, whole[start:stop], atol=1e-12)
        start = stop


def test_bfloat16():
    q_lens, kv_lens = [5, 2], [5, 9]
    inputs = make_case(q_lens, kv_lens, dtype=torch.bfloat16)
    fast = ragged_attention(*inputs, q_lens, kv_lens)
    naive = ragged_attention_naive(*(x.float() for x in inputs), q_lens, kv_lens)
    assert fast.dtype == torch.bfloat16
    assert torch.allclose(fast.float(), naive, atol=0.05)


def test_no_queries_at_all():
    q, k, v = make_case([0, 0], [3, 2])
    assert ragged_attention(q, k, v, [0, 0], [3, 2]).shape == (0, 4, 8)
    assert ragged_attention(q, k, v, [0, 0], [3, 2], window=2).shape == (0, 4, 8)
    assert ragged_attention(q, k[:0], v[:0], [], []).shape == (0, 4, 8)


def test_padding_round_trip():
    packed = torch.arange(12.0).view(6, 2)
    padded = pad_segments(packed, [1, 0, 5])
    assert padded.shape == (3, 5, 2)
    assert (padded[1] == 0).all()
    assert torch.equal(unpad_segments(padded, [1, 0, 5]), packed)


def naive_mask(q_lens, kv_lens, window) -> Tensor:
    """Bool [N, M]: which packed key each packed query sees."""
    mask = torch.zeros(sum(q_lens), sum(kv_lens), dtype=torch.bool)
    row = column = 0
    for n, m in zip(q_lens, kv_lens, strict=True):
        for i in range(n):
            for j in range(i + m - n + 1):
                mask[row + i, column + j] = window is None or i + m - n - j < window
        row, column = row + n, column + m
    return mask


@pytest.mark.parametrize("window", [None, 1, 3, 8, 50])
@pytest.mark.parametrize(
    ("q_lens", "kv_lens"),
    [
        ([5], [5]),
        ([9, 2, 13, 1], [9, 2, 13, 1]),
        ([2, 5, 1], [9, 5, 4]),
        ([1, 1, 1], [7, 4, 33]),
        ([16, 17], [16, 40]),
    ],
)
def test_biases_and_masks_say_what_the_loop_says(q_lens, kv_lens, window):
    wanted = naive_mask(q_lens, kv_lens, window)
    mask = last_queries_mask(q_lens, kv_lens, window, torch.device("cpu"))
    blocks = [m[:n, :s] for m, n, s in zip(mask, q_lens, kv_lens, strict=True)]
    assert torch.equal(torch.block_diag(*blocks).bool(), wanted)
    if import_xformers("ops.fmha.attn_bias") is None:
        pytest.skip("xFormers is not installed")
    bias = xformers_bias(q_lens, kv_lens, window, torch.device("cpu"))
    assert torch.equal(bias.materialize(tuple(wanted.shape)) == 0, wanted)


def materialized_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias, scale: float | None) -> Tensor:
    """What xFormers' memory_efficient_attention computes on `[1, M, H, K]`, from the materialised bias."""
    assert q.shape[2:] == k.shape[2:] == v.shape[2:]
    bias = attn_bias.materialize((q.shape[1], k.shape[1])).to(q.dtype)
    scores = torch.einsum("bqhk,bshk->bhqs", q, k) * (scale or q.shape[-1] ** -0.5) + bias
    return torch.einsum("bhqs,bshk->bqhk", scores.softmax(-1), v)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("q_lens", "kv_lens"), LENGTHS)
def test_xformers_branch_matches_the_loop(monkeypatch, q_lens, kv_lens, window):
    real = import_xformers("ops.fmha.attn_bias")
    if real is None:
        pytest.skip("xFormers is not installed")
    fmha = SimpleNamespace(memory_efficient_attention=materialized_attention)
    monkeypatch.setattr(attention, "_xformers_takes", lambda q, v: True)
    monkeypatch.setattr(attention, "import_xformers", {"ops.fmha": fmha, "ops.fmha.attn_bias": real}.get)
    inputs = make_case(q_lens, kv_lens)
    fast = ragged_attention(*inputs, q_lens, kv_lens, window=window)
    naive = ragged_attention_naive(*inputs, q_lens, kv_lens, window=window)
    assert_parity(fast, naive, inputs, 1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_lens": [3, 3]}, "sum to 6"),
        ({"q_lens": [5]}, "expected as many"),
        ({"q_lens": [6, -1]}, "at least 0"),
        ({"q_lens": [4, 1], "kv_lens": [3, 6]}, r"segments \[0\] have fewer keys than queries"),
        ({"window": 0}, "at least 1"),
        ({"q_positions": torch.arange(5)}, "give both or none"),
        ({"q_positions": torch.arange(5), "kv_positions": torch.arange(5)}, "positions are"),
    ],
)
def test_bad_arguments_are_named(change, message):
    q, k, v = make_case([2, 3], [4, 5])
    with pytest.raises(ValueError, match=message):
        ragged_attention(q, k, v, **({"q_lens": [2, 3], "kv_lens": [4, 5]} | change))


def test_head_counts_must_fit():
    q, k, v = make_case([2], [2], H=3, G=2)
    with pytest.raises(ValueError, match="multiple of 2 query heads"):
        ragged_attention(q, k, v, [2], [2])


def needs_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.mark.gpu
def test_xformers_runs_on_cuda():
    needs_cuda()
    path = operation_path("ragged_attention", torch.device("cuda"))
    assert path.name == "xformers", path.reason


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 3, 40])
@pytest.mark.parametrize(("heads", "width"), [((4, 2), 64), ((8, 2), 128), ((3, 1), 80)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("q_lens", "kv_lens"), [*LENGTHS, ([61, 1, 33], [61, 77, 95])])
def test_cuda_path_matches_the_loop(q_lens, kv_lens, dtype, heads, width, window):
    needs_cuda()
    inputs = make_case(q_lens, kv_lens, *heads, K=width, V=width, dtype=dtype, device="cuda")
    fast = ragged_attention(*inputs, q_lens, kv_lens, window=window)
    naive = ragged_attention_naive(*(x.double() for x in inputs), q_lens, kv_lens, window=window)
    assert_parity(fast.double(), naive, inputs, 1e-3 if dtype is torch.float32 else 0.1)
