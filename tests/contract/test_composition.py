"""Which methods compose: every pair in both orders, composed exactly or refused with one message.

Composed exactly: both orders give the same outputs, cached generation equals uncached, and where one of the two can be
carried out by hand on the weights (a last block that is cut off, quantized weights written back), the other on such a
model gives the same.
"""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import tiny_seq2seq
import torch
from tiny_decoders import VOCAB, randomize_routers, sharpen, stream_layout, tiny_decoder
from tiny_unets import inputs, output, tiny_unet
from torch import nn

import mmskip
from mmskip import (
    EarlyExitConfig,
    FFNSkipConfig,
    FreeUConfig,
    LACConfig,
    LayerBitsConfig,
    LayerPlanConfig,
    MoDConfig,
    SelfSpeculationConfig,
    SkipScaleConfig,
    StepCacheConfig,
    TokenReductionConfig,
    composition,
)
from mmskip.calibration import ffn_threshold
from mmskip.exits.settings import ExitAt

LAYOUT = stream_layout(2)[None]
IDS = torch.randint(3, VOCAB, LAYOUT.shape, generator=torch.Generator().manual_seed(0))
LAYERS = 6


def decoder() -> Any:
    model = tiny_decoder("llama", num_hidden_layers=LAYERS)
    sharpen(model, 8.0)
    return model


def ffn_skip() -> FFNSkipConfig:
    return replace(ffn_threshold(decoder(), [IDS]), cold_first=2)


DECODER = {
    "mod 1": MoDConfig(layers=(1,), keep=0.3, gate="sigmoid"),
    "mod 4": MoDConfig(layers=(4,), keep=0.3, gate="sigmoid"),
    "reduction": TokenReductionConfig(after_layer=2, keep=0.5, score="norm"),
    "exit": EarlyExitConfig(decoder=ExitAt(0.03, exit_layers=(2, 4))),
    "plan 3": LayerPlanConfig(drop_attn=(3,)),
    "plan 5": LayerPlanConfig(drop=(5,)),
    "plan 5, decoding": LayerPlanConfig(drop=(5,), phase="decode"),
    "repeat": LayerPlanConfig(order=(0, 1, 2, 3, 2, 3, 4, 5)),
    "ffn skip": ffn_skip(),
    "lac": LACConfig(),
    "bits": LayerBitsConfig(bits=(16, 8, 16, 16, 4, 4)),
    "draft": SelfSpeculationConfig(skip_attn=(2,), skip_mlp=(2,)),
}
BITS = {frozenset({"bits", other}) for other in DECODER if other != "bits"}
DECODER_COMPOSES = BITS | {
    frozenset(pair)
    for pair in (
        ("mod 1", "mod 4"),
        ("mod 1", "reduction"),
        *itertools.product(("mod 1", "mod 4"), ("plan 3", "plan 5", "plan 5, decoding")),
        ("mod 1", "ffn skip"),
        ("ffn skip", "plan 5"),
        ("ffn skip", "plan 5, decoding"),
    )
}


def cut(model: Any) -> Any:
    """`plan 5` by hand."""
    del model.model.layers[5]
    model.config.num_hidden_layers = LAYERS - 1
    return model


def quantized(model: Any) -> Any:
    """`bits` by hand."""
    mmskip.apply_(model, DECODER["bits"])
    weights = {name: p.dequantize() if hasattr(p, "dequantize") else p for name, p in model.named_parameters()}
    weights = {name: torch.Tensor(w.detach().as_subclass(torch.Tensor)) for name, w in weights.items()}
    plain = decoder()
    plain.load_state_dict(weights, strict=False)
    return plain


BY_HAND = {"plan 5": cut, "bits": quantized}


def decoded(model: Any) -> list[torch.Tensor]:
    """Logits, and tokens of cached and of uncached generation."""
    call: dict[str, Any] = {}
    if any(isinstance(config, MoDConfig | TokenReductionConfig) for config in mmskip.applied(model)):
        call = {"layout": LAYOUT}
    settings = {**call, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    found = [model(IDS, **call).logits, model.generate(IDS, **settings)]
    if not any(isinstance(config, SelfSpeculationConfig) for config in mmskip.applied(model)):
        found.append(model.generate(IDS, use_cache=False, **settings))
        assert torch.equal(found[1], found[2]), "cached generation differs from uncached"
    return found


def applied(model: Any, *configs: Any) -> Any:
    for config in configs:
        mmskip.apply_(model, config)
    randomize_routers(model)
    return model


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def refusal(model: nn.Module, first: Any, second: Any) -> str:
    """The message by which the second config is refused beside the first, which stays."""
    mmskip.apply_(model, first)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"^") as error:
        mmskip.apply_(model, second)
    assert [type(module) for module in model.modules()] == classes and mmskip.applied(model) == [first]
    return str(error.value)


def check_refusal(build: Any, first: Any, second: Any) -> None:
    message = refusal(build(), first, second)
    assert message == refusal(build(), second, first)
    assert composition.described(first) in message and composition.described(second) in message
    assert "claim" in message and "remove_" in message


@torch.no_grad()
@pytest.mark.parametrize("pair", itertools.combinations(DECODER, 2), ids=" + ".join)
def test_pairs_on_a_decoder(pair):
    first, second = (DECODER[name] for name in pair)
    if frozenset(pair) not in DECODER_COMPOSES:
        check_refusal(decoder, first, second)
        return
    found = decoded(applied(decoder(), first, second))
    assert_equal(decoded(applied(decoder(), second, first)), found)
    for name, other in (pair, pair[::-1]):
        calibrated = isinstance(DECODER[other], FFNSkipConfig)
        if name in BY_HAND and not (calibrated and name == "plan 5") and other != "bits":
            model = applied(BY_HAND[name](decoder()), DECODER[other])
            torch.testing.assert_close(decoded(model)[0], found[0], atol=1e-4, rtol=1e-4)


SEQ2SEQ = {
    "exit": EarlyExitConfig(decoder=0.9),
    "exit, encoder": EarlyExitConfig(decoder=None, encoder=0.5),
    "draft": SelfSpeculationConfig(exit_after=2),
}
SEQ2SEQ_COMPOSES = {frozenset({"exit", "exit, encoder"}), frozenset({"exit, encoder", "draft"})}


@torch.no_grad()
@pytest.mark.parametrize("pair", itertools.combinations(SEQ2SEQ, 2), ids=" + ".join)
def test_pairs_on_an_encoder_decoder(pair):
    first, second = (SEQ2SEQ[name] for name in pair)
    if frozenset(pair) not in SEQ2SEQ_COMPOSES:
        check_refusal(lambda: tiny_seq2seq.build("t5"), first, second)
        return
    given = tiny_seq2seq.inputs("t5")

    def generated(*configs: Any) -> torch.Tensor:
        return applied(tiny_seq2seq.build("t5"), *configs).generate(**given)

    found = generated(first, second)
    assert torch.equal(found, generated(second, first))
    both = EarlyExitConfig(decoder=0.9, encoder=0.5)
    expected = generated(both) if "draft" not in pair else generated(SEQ2SEQ["exit, encoder"])
    assert torch.equal(found, expected)


UNET = {
    "scale": SkipScaleConfig(scale=0.5),
    "freeu, backbone": FreeUConfig(b=(1.4, 1.6), s=(1.0, 1.0)),
    "freeu": FreeUConfig(),
    "steps": StepCacheConfig(interval=2),
}
UNET_COMPOSES = {frozenset({"scale", "freeu, backbone"})} | {
    frozenset({"steps", other}) for other in ("scale", "freeu, backbone", "freeu")
}


@torch.no_grad()
@pytest.mark.parametrize("pair", itertools.combinations(UNET, 2), ids=" + ".join)
def test_pairs_on_a_unet(pair):
    """Steps that reuse deep features run the scaled joints of the shallow stages, as the full ones do."""
    name = "unet2d_condition"
    first, second = (UNET[key] for key in pair)
    if frozenset(pair) not in UNET_COMPOSES:
        check_refusal(lambda: tiny_unet(name), first, second)
        return

    def course(*configs: Any) -> list[torch.Tensor]:
        unet = applied(tiny_unet(name), *configs)
        return [output(unet, inputs(name, timestep=t, seed=i)) for i, t in enumerate((900, 700, 500))]

    found = course(first, second)
    assert_equal(course(second, first), found)
    if "steps" in pair:
        alone = course(*(UNET[key] for key in pair if key != "steps"))
        assert torch.equal(found[0], alone[0]) and torch.equal(found[2], alone[2]), "full steps are as without reuse"
        assert not torch.equal(found[1], alone[1])


def test_the_table_names_aspects_that_exist():
    described = composition.__doc__ or ""
    for aspect in set().union(*composition.TOGETHER, *composition.APART, composition.WITH_ALL):
        assert f"`{aspect}`" in described, f"composition.py does not say what {aspect} is"
    assert all(len(pair) == 2 for pair in composition.TOGETHER) and not composition.TOGETHER & composition.APART


def test_a_config_is_described_by_what_is_not_default():
    assert composition.described(MoDConfig()) == "MoDConfig()"
    assert composition.described(MoDConfig(keep=0.5, layers=(1,))) == "MoDConfig(keep=0.5, layers=(1,))"
    assert composition.described("something else") == "'something else'"
