"""Token selection and merging: the fast path against the naive loop, forward and backward."""

import pytest
import torch
from torch import Tensor

from mmskip.ops import tokens
from mmskip.ops.tokens import merge_tokens, merge_tokens_naive, select_tokens, select_tokens_naive

SHAPES = [(1, 1, 1, 1), (1, 7, 5, 3), (3, 11, 4, 5), (2, 6, 8, 0), (2, 5, 3, 5)]


def make_case(B: int, T: int, D: int, S: int, dtype: torch.dtype = torch.float64, device: str = "cpu"):
    """Random x, y, distinct indices, gate, and a validity mask with at least one padding slot where S > 0."""
    generator = torch.Generator().manual_seed(B * 1000 + T * 100 + D * 10 + S)
    x = torch.randn(B, T, D, generator=generator, dtype=torch.float64)
    y = torch.randn(B, S, D, generator=generator, dtype=torch.float64)
    gate = torch.rand(B, S, generator=generator, dtype=torch.float64)
    index = torch.stack([torch.randperm(T, generator=generator)[:S] for _ in range(B)])
    valid = torch.rand(B, S, generator=generator) < 0.6
    valid[:, -1:] = False
    # The index of a padding slot is free: let it name a position that a valid slot writes.
    index = torch.where(valid, index, index[:, :1])
    floats = [t.to(device, dtype).requires_grad_() for t in (x, y, gate)]
    return *floats, index.to(device), valid.to(device)


def gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Gradients of a fixed random projection of `out`."""
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return list(torch.autograd.grad(out, inputs, weight.to(out.device, out.dtype), materialize_grads=True))


@pytest.mark.parametrize("use_valid", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_select_matches_the_loop(shape, use_valid):
    x, _, _, index, valid = make_case(*shape)
    if not use_valid:
        index, valid = torch.argsort(torch.rand(shape[0], shape[1]), dim=1)[:, : shape[3]], None
    fast, naive = select_tokens(x, index, valid), select_tokens_naive(x, index, valid)
    assert torch.equal(fast, naive)
    assert torch.allclose(gradients(fast, [x])[0], gradients(naive, [x])[0])


@pytest.mark.parametrize("use_gate", [False, True])
@pytest.mark.parametrize("use_valid", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_merge_matches_the_loop(shape, use_valid, use_gate):
    x, y, gate, index, valid = make_case(*shape)
    if not use_valid:
        index, valid = torch.argsort(torch.rand(shape[0], shape[1]), dim=1)[:, : shape[3]], None
    gate = gate if use_gate else None
    inputs = [x, y] + ([gate] if use_gate else [])
    before = x.detach().clone()
    fast, naive = merge_tokens(x, y, index, gate, valid), merge_tokens_naive(x, y, index, gate, valid)
    assert torch.allclose(fast, naive, atol=1e-14)
    for got, want in zip(gradients(fast, inputs), gradients(naive, inputs), strict=True):
        assert torch.allclose(got, want, atol=1e-14)
    assert torch.equal(x, before)


def test_gradcheck_of_the_routed_path():
    x, y, gate, index, valid = make_case(2, 5, 3, 3)
    assert torch.autograd.gradcheck(lambda x: select_tokens(x, index, valid), (x,))
    assert torch.autograd.gradcheck(lambda x, y, g: merge_tokens(x, y, index, g, valid), (x, y, gate))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_unit_gate_returns_the_processed_token_bit_for_bit(dtype):
    x, y, _, _, _ = make_case(3, 11, 64, 5, dtype)
    index = torch.stack([torch.randperm(11)[:5] for _ in range(3)])
    plain = merge_tokens(x, y, index)
    assert torch.equal(merge_tokens(x, y, index, torch.ones(3, 5)), plain)
    assert torch.equal(select_tokens(plain, index), y)
    assert torch.equal(merge_tokens(x, y, index, torch.zeros(3, 5)), x)


def test_bfloat16_gradients_keep_the_dtypes_of_their_inputs():
    x, y, _, index, valid = make_case(2, 9, 32, 4, torch.bfloat16)
    gate = torch.rand(2, 4, requires_grad=True)
    got = gradients(merge_tokens(x, y, index, gate, valid), [x, y, gate])
    want = gradients(merge_tokens_naive(x, y, index, gate, valid), [x, y, gate])
    assert [g.dtype for g in got] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a.float(), b.float(), atol=0.1)


def test_poisoned_padding_slots_neither_write_nor_receive_gradient():
    x, y, gate, index, valid = make_case(3, 11, 4, 5)
    with torch.no_grad():
        y[~valid] = torch.nan
        gate[~valid] = torch.nan
    out = merge_tokens(x, y, index, gate, valid)
    assert out.isfinite().all()
    grad_x, grad_y, grad_gate = gradients(out, [x, y, gate])
    assert grad_x.isfinite().all()
    assert (grad_y[~valid] == 0).all() and (grad_gate[~valid] == 0).all()
    assert (grad_y[valid] != 0).all() and (grad_gate[valid] != 0).all()


def test_selecting_padding_hides_poison_in_x():
    x = torch.full((1, 3, 2), torch.nan, dtype=torch.float64)
    x[0, 1] = 1.0
    x.requires_grad_()
    out = select_tokens(x, torch.tensor([[1, 0]]), torch.tensor([[True, False]]))
    assert out.tolist() == [[[1.0, 1.0], [0.0, 0.0]]]
    (grad,) = torch.autograd.grad(out, x, torch.full_like(out, torch.nan))
    assert grad[0, 0].tolist() == [0.0, 0.0] and grad[0, 2].tolist() == [0.0, 0.0]


def test_tokens_that_are_not_kept_pass_through_with_their_gradient():
    x, y, gate, index, _ = make_case(1, 4, 2, 1)
    index = torch.tensor([[2]])
    out = merge_tokens(x, y, index, gate)
    rest = [0, 1, 3]
    assert torch.equal(out[:, rest], x[:, rest])
    (grad_x,) = torch.autograd.grad(out.sum(), x)
    assert (grad_x[:, rest] == 1).all()


def test_non_contiguous_inputs():
    x, y, gate, index, valid = make_case(3, 11, 4, 5)
    turned_x = x.transpose(1, 2).contiguous().transpose(1, 2)
    turned_y = y.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(select_tokens(turned_x, index, valid), select_tokens(x, index, valid))
    assert torch.equal(merge_tokens(turned_x, turned_y, index, gate, valid), merge_tokens(x, y, index, gate, valid))


def routed_layer(x: Tensor, weight: Tensor, gate: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    y = torch.nn.functional.silu(select_tokens(x, index, valid) @ weight)
    return merge_tokens(x, y, index, gate, valid)


def test_compiles_into_one_graph_with_the_same_gradients():
    x, _, gate, index, valid = make_case(2, 9, 8, 4, torch.float32)
    weight = torch.randn(8, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    compiled = torch.compile(routed_layer, fullgraph=True, backend="aot_eager")
    want, got = (f(x, weight, gate, index, valid) for f in (routed_layer, compiled))
    assert torch.allclose(got, want, atol=1e-6)
    for a, b in zip(gradients(got, [x, weight, gate]), gradients(want, [x, weight, gate]), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients():
    x, _, gate, index, valid = make_case(2, 9, 8, 4)
    weight = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    args = (x, weight, gate, index, valid)
    want = gradients(routed_layer(*args), [x, weight, gate])
    got = gradients(torch.utils.checkpoint.checkpoint(routed_layer, *args, use_reentrant=False), [x, weight, gate])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_backward_keeps_only_the_selected_rows():
    x, y, gate, index, _ = make_case(2, 101, 16, 5)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        merge_tokens(x, y, index, gate)
        select_tokens(x, index)
    assert max(t.untyped_storage().nbytes() for t in saved) == y.untyped_storage().nbytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"index": a["index"].int()}, "expected torch.int64"),
        (lambda a: a | {"index": a["index"] + 11}, "expected positions within 0..10"),
        (lambda a: a | {"index": a["index"][:2]}, r"expected \[B, T, D\] and \[B, S\]"),
        (lambda a: a | {"y": a["y"][:, :2]}, "y is"),
        (lambda a: a | {"y": a["y"].float()}, "in the dtype of x"),
        (lambda a: a | {"gate": a["gate"][:, :2]}, "gate is"),
        (lambda a: a | {"valid": a["valid"].long()}, "torch.bool"),
    ],
)
def test_bad_arguments_are_named(change, message):
    x, y, gate, index, valid = make_case(3, 11, 4, 5)
    args = change({"y": y, "index": index, "gate": gate, "valid": valid})
    with pytest.raises(ValueError, match=message):
        merge_tokens(x, args["y"], args["index"], args["gate"], args["valid"])


class FakeIndexing:
    """The two index operations of xFormers on a CPU, with the demands its kernels make on their arguments."""

    @staticmethod
    def index_select_cat(sources: list[Tensor], indices: list[Tensor]) -> Tensor:
        (source,), (index,) = sources, indices
        assert source.ndim == 2
        assert source.is_contiguous()
        assert len(index) < len(source)
        return source[index].flatten()

    @staticmethod
    def scaled_index_add(out: Tensor, index: Tensor, source: Tensor) -> Tensor:
        assert out.ndim == source.ndim == 3
        assert out.stride() == source.stride()
        assert len(source) <= len(out)
        for row, value in zip(index.tolist(), source, strict=True):
            out[row] += value
        return out


@pytest.mark.parametrize("use_valid", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_xformers_branch_equals_the_torch_branch(monkeypatch, shape, use_valid):
    x, y, gate, index, valid = make_case(*shape)
    if not use_valid:
        index, valid = torch.argsort(torch.rand(shape[0], shape[1]), dim=1)[:, : shape[3]], None

    def route() -> tuple[Tensor, list[Tensor]]:
        out = merge_tokens(x, select_tokens(x, index, valid) * y, index, gate, valid)
        return out, gradients(out, [x, y, gate])

    want, want_grads = route()
    monkeypatch.setattr(tokens, "_use_xformers", lambda x: True)
    monkeypatch.setattr(tokens, "import_xformers", lambda module: FakeIndexing)
    got, got_grads = route()
    assert torch.equal(got, want)
    assert all(torch.equal(a, b) for a, b in zip(got_grads, want_grads, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_valid", [False, True])
def test_cuda_path_matches_the_loop(dtype, use_valid):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    x, y, gate, index, valid = make_case(2, 77, 520, 9, dtype, "cuda")
    if not use_valid:
        index, valid = torch.stack([torch.randperm(77)[:9] for _ in range(2)]).cuda(), None
    fast = merge_tokens(x, select_tokens(x, index, valid) + y, index, gate, valid)
    naive = merge_tokens_naive(x, select_tokens_naive(x, index, valid) + y, index, gate, valid)
    tolerance = 1e-5 if dtype is torch.float32 else 0.1
    assert torch.equal(fast, naive)
    for a, b in zip(gradients(fast, [x, y, gate]), gradients(naive, [x, y, gate]), strict=True):
        assert torch.allclose(a.float(), b.float(), atol=tolerance)
