"""Learning rates, the groups of weight decay, and the ranges of settings."""

import math

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from mmskip.models.common.optim import adamw, check_ranges, decay_groups, warmup_schedule


@pytest.mark.parametrize(
    ("name", "middle", "end"), [("cosine", 0.5, 0.0), ("linear", 0.5, 0.0), ("constant", 1.0, 1.0)]
)
def test_learning_rate_rises_and_falls(name, middle, end):
    factor = warmup_schedule(name, warmup=0.2, total_steps=100)
    assert factor(0) == pytest.approx(1 / 20)
    assert factor(19) == 1.0
    assert factor(60) == pytest.approx(middle)
    assert factor(100) == pytest.approx(end)


def test_a_run_without_end_needs_a_constant_rate():
    assert warmup_schedule("constant", 0, math.inf)(10**6) == 1.0
    with pytest.raises(ValueError, match="max_epochs"):
        warmup_schedule("cosine", 0.05, math.inf)


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_equal_to_transformers_but_for_the_first_steps_rate_of_zero(name, warmup):
    """Why ours stays: theirs spends the first step of a warm-up at a rate of 0."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    other = "constant_with_warmup" if name == "constant" else name
    scheduler = get_scheduler(other, optimizer, num_warmup_steps=warmup, num_training_steps=40)
    theirs = []
    for _ in range(41):
        theirs.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    ours = [warmup_schedule(name, warmup / 40, 40)(step) for step in range(41)]
    assert ours[warmup:] == pytest.approx(theirs[warmup:])
    assert ours[:warmup] == pytest.approx(theirs[1 : warmup + 1])
    assert theirs[0] == 0 or not warmup


def test_weight_decay_acts_on_matrices_other_than_embeddings():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    model[3].requires_grad_(False)
    decayed, plain = decay_groups(model.parameters(), 0.1, [model[0].weight])
    assert [id(p) for p in decayed["params"]] == [id(model[1].weight)]
    assert len(plain["params"]) == 4
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    made = adamw([decayed, plain], 1.0, "linear", 0.5, 4)
    rates = []
    for _ in range(4):
        rates.append(made["optimizer"].param_groups[0]["lr"])
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    assert rates == [0.5, 1.0, 1.0, 0.5]
    assert made["lr_scheduler"]["interval"] == "step"


@pytest.mark.parametrize(
    ("interval", "good", "bad"),
    [("(0, inf)", [1e-9, 5], [0, -1, math.inf, math.nan]), ("[0, 1)", [0, 0.999], [1, -0.1]), ("[0, 1]", [0, 1], [2])],
)
def test_ranges(interval, good, bad):
    for value in [*good, None]:
        check_ranges({"rate": value}, {"rate": interval})
    for value in bad:
        with pytest.raises(ValueError, match=r"rate is .*; expected a number in "):
            check_ranges({"rate": value}, {"rate": interval})
