"""The three changes that `swap` knows: code around a module, another module in its place, more children."""

import copy

import pytest
import torch
from torch import nn

from mmskip import composition, swap
from mmskip.families.base import Site
from mmskip.saving import added_weights
from mmskip.swap import around, children, replace, swap_all, unswap


class Net(nn.Module):
    """A layer used twice, under two names, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.again = self.first
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.again(torch.relu(self.first(x))))


class Doubled(nn.Module):
    """Doubles what the module returns."""

    def forward(self, *args, **kwargs):
        return 2 * super().forward(*args, **kwargs)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), 0.5))

    def forward(self, x):
        return x * self.weight


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


def site(net: Net, name: str) -> Site:
    return Site(f"layer.{name}", "block", getattr(net, name), 0)


def state(net: nn.Module):
    return [(name, type(m), set(m.__dict__)) for name, m in net.named_modules(remove_duplicate=False)], list(
        net.state_dict()
    )


def test_a_replacement_stands_wherever_the_module_stood():
    net = Net()
    before, expected, original = state(net), net(X), net.first
    swap_all([replace(site(net, "first"), Scale(), net)])
    assert net.first is net.again and net.first is not original
    assert torch.allclose(net(X), net.head(torch.relu(0.5 * X) * 0.5))
    assert {name for name, _ in net.named_parameters()} == {"first.weight", "head.weight", "head.bias"}
    assert not {id(p) for p in original.parameters()} & {id(p) for p in net.parameters()}
    unswap(net.first)
    assert net.first is net.again is original and state(net) == before and torch.equal(net(X), expected)


def test_what_was_replaced_moves_trains_and_is_copied_along():
    net = Net()
    expected = copy.deepcopy(net).double()(X.double())
    swap_all([replace(site(net, "first"), Scale(), net)])
    net.double().train()
    twin = copy.deepcopy(net)
    unswap(net.first)
    assert net.first.weight.dtype == torch.float64 and net.first.training
    assert torch.allclose(net(X.double()), expected)
    with torch.no_grad():
        net.first.weight.zero_()
    unswap(twin.first)
    assert twin.first is twin.again is not net.first and torch.allclose(twin(X.double()), expected)


def test_changes_before_and_after_a_replacement_come_off_in_turn():
    net = Net()
    before, expected = state(net), net(X)
    swap_all([around(site(net, "first"), Doubled, None)])
    doubled = net(X)
    swap_all([replace(site(net, "first"), Scale(), net)])
    plain = net(X)
    swap_all([around(site(net, "first"), Doubled, None), children(site(net, "first"), {"mmskip_extra": Scale()})])
    assert torch.allclose(net(X), net.head(2 * 0.5 * torch.relu(2 * 0.5 * X)))
    assert "first.mmskip_extra.weight" in net.state_dict()
    unswap(net.first)
    assert "first.mmskip_extra.weight" not in net.state_dict()
    unswap(net.first)
    assert torch.equal(net(X), plain)
    unswap(net.first)
    assert torch.equal(net(X), doubled)
    unswap(net.first)
    assert state(net) == before and torch.equal(net(X), expected)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_an_error_half_way_puts_everything_back(monkeypatch, step):
    net = Net()
    before, expected, original, calls = state(net), net(X), swap.swap, []

    def failing(change):
        if len(calls) == step:
            raise RuntimeError("half-way")
        calls.append(change)
        original(change)

    changes = [
        replace(site(net, "first"), Scale(), net),
        around(site(net, "head"), Doubled, None),
        children(site(net, "head"), {"mmskip_extra": Scale()}),
    ]
    monkeypatch.setattr(swap, "swap", failing)
    with pytest.raises(RuntimeError, match="half-way"):
        swap_all(changes)
    assert state(net) == before and torch.equal(net(X), expected)


def test_an_optimizer_sees_the_new_parameters_and_no_dead_ones():
    net = Net()
    swap_all([replace(site(net, "first"), Scale(), net), children(site(net, "head"), {"mmskip_extra": Scale()})])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(X).square().mean().backward()
    given = {name: p.grad is not None for name, p in net.named_parameters()}
    assert given == {"first.weight": True, "head.weight": True, "head.bias": True, "head.mmskip_extra.weight": False}
    optimizer.step()
    assert not torch.equal(net.first.weight, torch.full((4,), 0.5))


def test_the_hidden_states_of_a_call_are_found_by_name_or_place():
    net = Net()
    swap_all([around(site(net, "head"), Doubled, None)])
    for args, kwargs in (((X,), {}), ((), {"input": X})):
        assert swap.hidden_states(net.head, "input", args, kwargs) is X
        assert swap.hidden_states(net.head, "", args, kwargs) is X


def test_a_replacement_and_another_method_on_its_module_exclude_each_other_in_both_orders():
    net = Net()
    changes = {
        "around": [around(site(net, "first"), Doubled, None, "mlp")],
        "replace": [replace(site(net, "first"), Scale(), net)],
    }
    messages = set()
    for first, second in (("around", "replace"), ("replace", "around"), ("replace", "replace")):
        held = composition.claims_of(changes[first])
        with pytest.raises(ValueError, match=r"both claim layer\.first") as refused:
            composition.check(second, composition.claims_of(changes[second]), [(first, held)])
        messages.add(str(refused.value))
    assert len(messages) == 2  # one message for both orders, one for two replacements


def test_weights_of_a_replacement_are_those_that_are_saved():
    net = Net()
    swap_all([replace(site(net, "first"), Scale(), net)])
    assert list(added_weights(net)) == ["layer.first.weight"]
