"""Early exit of encoder-decoders is exact: against the base model, without a cache, sample by sample, and against an
explicit mask."""

import copy
import functools
from pathlib import Path
from typing import Any

import contract
import pytest
import tiny_seq2seq as tiny
import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import DynamicLayer, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

import mmskip
from mmskip import EarlyExitConfig
from mmskip.exits.criteria import SampleScores, TokenScores
from mmskip.exits.rules import Compaction
from mmskip.exits.runs import layers_run
from mmskip.exits.settings import ExitAt, FixedExit
from mmskip.families.encoder_decoder import match
from mmskip.hf.exits.cache import ExitLayer
from mmskip.hf.exits.heads import exit_head
from mmskip.methods.early_exit import exit_layers as deprecated_exit_layers

POLICIES = ("recompute", "copy", "mask")
TOKENS = torch.randint(4, 40, (2, 6), generator=torch.Generator().manual_seed(3))
GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampled": {"do_sample": True, "top_k": 5},
}


def generate(model: Any, inputs: dict[str, Tensor], **settings: Any) -> Tensor:
    torch.manual_seed(5)
    return model.generate(**inputs, **settings)


@torch.no_grad()
def logits(model: Any, inputs: dict[str, Tensor], tokens: Tensor, **settings: Any) -> Tensor:
    return model(**inputs, decoder_input_ids=tokens, **settings).logits


def mixed(name: str, module: str, **settings: Any) -> EarlyExitConfig:
    """A config under which the states of `module` exit at several layers, some of them before the last."""
    return EarlyExitConfig(**{"decoder": None, module: mixing_threshold(name, module), **settings})


@functools.cache
def mixing_threshold(name: str, module: str) -> float:
    model, best = tiny.build(name), (0, 0.0)
    for threshold in torch.linspace(-0.5, 0.95, 30).tolist():
        mmskip.apply_(model, EarlyExitConfig(**{"decoder": None, module: threshold}))
        logits(model, tiny.inputs(name), TOKENS)
        kinds = layers_run(model)[module].unique()
        best = max(best, (len(kinds) if kinds[0] < tiny.LAYERS else 0, threshold))
        mmskip.remove_(model)
    assert best[0] > 1 or (name.startswith("vit") and module == "encoder")
    return best[1]


@torch.no_grad()
def stepwise(model: Any, inputs: dict[str, Tensor], tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and exits [B, T] token by token over the cache, the first two tokens at once."""
    found, exits, outputs, cache = [], [], None, None
    for start, end in ((0, 2), *((t, t + 1) for t in range(2, tokens.shape[1]))):
        given = inputs if outputs is None else {"attention_mask": inputs.get("attention_mask")}
        output = model(**given, encoder_outputs=outputs, decoder_input_ids=tokens[:, start:end], past_key_values=cache,
                       use_cache=True)  # fmt: skip
        outputs = outputs or BaseModelOutput(output.encoder_last_hidden_state)
        cache = output.past_key_values
        found.append(output.logits)
        exits.append(layers_run(model)["decoder"])
    return torch.cat(found, 1), torch.cat(exits, 1)


NEVER: tuple[dict[str, Any], ...] = (  # at the end of the range, which needs no score; and scored, out of reach
    {"encoder": 1.0, "decoder": 1.0},
    {"encoder": ExitAt(0.99999), "decoder": ExitAt(99, "patience")},
)


@pytest.mark.parametrize("never", NEVER, ids=("unscored", "scored"))
@pytest.mark.parametrize("name", tiny.NAMES)
def test_thresholds_that_never_fire_are_the_base_model_bit_for_bit(name: str, never: dict[str, Any]) -> None:
    model, inputs = tiny.build(name), tiny.inputs(name)
    before = {kind: generate(model, inputs, **settings) for kind, settings in GENERATION.items()}
    plain, keys = logits(model, inputs, TOKENS), list(model.state_dict())
    for kv in POLICIES:
        mmskip.apply_(model, EarlyExitConfig(**never, cache_policy=kv))
        assert torch.equal(logits(model, inputs, TOKENS, use_cache=False), plain)
        assert torch.equal(logits(model, inputs, TOKENS), plain)
        assert (layers_run(model)["decoder"] == tiny.LAYERS).all() and list(model.state_dict()) == keys
        for kind, settings in GENERATION.items() if kv == "recompute" else [("greedy", {})]:
            assert torch.equal(generate(model, inputs, **settings), before[kind]), (kv, kind)
        mmskip.remove_(model)
    assert torch.equal(logits(model, inputs, TOKENS), plain) and mmskip.applied(model) == []


def test_a_threshold_out_of_reach_asks_for_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = tiny.build("bart"), []
    for scores in (TokenScores, SampleScores):
        plain = scores.__call__
        monkeypatch.setattr(scores, "__call__", lambda *a, plain=plain: asked.append(a[0]) or plain(*a))
    decays = {"decoder": ExitAt(1.0, decay=0.5)}  # which lowers it
    for settings, kinds in (
        ({"encoder": 1.0, "decoder": 1.0}, set()),
        ({"encoder": 1.0, "decoder": ExitAt(1.0, "entropy")}, set()),
        ({"decoder": ExitAt(1.0, decide_once=True)}, set()),
        ({"decoder": ExitAt(float("inf"), "patience")}, set()),
        (decays, {TokenScores}),
        ({"decoder": 1.0, "encoder": 0.9999}, {SampleScores}),
        ({"decoder": ExitAt(1.0, "learned")}, {TokenScores}),  # heads that are still to be fitted
    ):
        mmskip.apply_(model, EarlyExitConfig(**settings))
        generate(model, tiny.inputs("bart"), max_new_tokens=3)
        assert {type(one) for one in asked} == kinds, settings
        asked.clear()
        mmskip.remove_(model)


@pytest.mark.parametrize("kv", POLICIES)
@pytest.mark.parametrize("name", tiny.NAMES)
def test_cached_equals_uncached(name: str, kv: str) -> None:
    model, inputs = tiny.build(name), tiny.inputs(name)
    mmskip.apply_(model, mixed(name, "decoder", cache_policy=kv))
    whole = logits(model, inputs, TOKENS, use_cache=False)
    exits = layers_run(model)["decoder"]
    assert exits.unique().numel() > 1 and exits.min() < tiny.LAYERS
    steps, step_exits = stepwise(model, inputs, TOKENS)
    assert torch.equal(step_exits, exits)
    torch.testing.assert_close(steps, whole, atol=2e-5, rtol=1e-5)
    for settings in ({}, {"num_beams": 3}):
        assert torch.equal(generate(model, inputs, **settings), generate(model, inputs, use_cache=False, **settings))


@torch.no_grad()
def reference_with_mask(
    model: Any, inputs: dict[str, Tensor], tokens: Tensor, threshold: float
) -> tuple[Tensor, Tensor]:
    """Masked entries without a cache: every block runs on all tokens under an explicit mask; final states and exits."""
    blocks = match(model)[0].decoder  # type: ignore[union-attr]
    given: dict[str, Any] = {}

    def look(block: Any, args: Any, kwargs: dict[str, Any]) -> None:
        names = ["hidden_states", "attention_mask", "encoder_hidden_states"] if len(args) < 6 else [
            "hidden_states", "attention_mask", "position_bias", "encoder_hidden_states", "encoder_attention_mask",
            "encoder_decoder_position_bias"]  # fmt: skip
        given.update(dict(zip(names, args, strict=False)) | kwargs)

    handle = blocks[0].register_forward_pre_hook(look, with_kwargs=True)
    logits(model, inputs, tokens, use_cache=False)
    handle.remove()
    x, count = given.pop("hidden_states"), tokens.shape[1]
    exits = torch.full(tokens.shape, len(blocks))
    causal = torch.ones(count, count).tril().bool()
    for layer, block in enumerate(blocks, 1):
        runs = exits >= layer
        allowed = causal & (runs[:, None] | torch.eye(count).bool())
        given["attention_mask"] = torch.zeros(2, 1, count, count).masked_fill(~allowed[:, None], -1e30)
        output = block(x, **given)
        y = output[0] if isinstance(output, tuple) else output
        if isinstance(output, tuple) and len(output) > 1:
            given["position_bias"], given["encoder_decoder_position_bias"] = output[1:]
        y = torch.where(runs[..., None], y, x)
        if layer < len(blocks):
            exits[runs & (torch.cosine_similarity(y, x, dim=-1) > threshold)] = layer
        x = y
    return x, exits


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["t5", "bart", "mbart"])
def test_masked_entries_equal_a_reference_with_an_explicit_mask(name: str, attention: str) -> None:
    model, inputs = tiny.build(name), tiny.inputs(name)
    model.set_attn_implementation(attention)
    config = mixed(name, "decoder", cache_policy="mask")
    assert isinstance(config.decoder, ExitAt)
    states, exits = reference_with_mask(model, inputs, TOKENS, config.decoder.threshold)
    expected = exit_head(match(model)[0])(states)  # type: ignore[union-attr]
    mmskip.apply_(model, config)
    found, found_exits = stepwise(model, inputs, TOKENS)
    assert torch.equal(found_exits, exits)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    mmskip.remove_(model)
    mmskip.apply_(model, EarlyExitConfig(decoder=config.decoder, cache_policy="recompute"))
    assert not torch.allclose(logits(model, inputs, TOKENS), expected, atol=1e-3)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_each_sample_of_a_batch_exits_as_alone(name: str) -> None:
    model, inputs = tiny.build(name), tiny.inputs(name)
    encoder, decoder = mixed(name, "encoder").encoder, mixed(name, "decoder").decoder
    mmskip.apply_(model, EarlyExitConfig(encoder=encoder, decoder=decoder))
    together = logits(model, inputs, TOKENS)
    exits = layers_run(model)
    for row in range(2):
        alone = logits(model, tiny.inputs(name, row), TOKENS[row : row + 1])
        found = layers_run(model)
        assert torch.equal(found["encoder"], exits["encoder"][row : row + 1])
        assert torch.equal(found["decoder"], exits["decoder"][row : row + 1])
        torch.testing.assert_close(alone, together[row : row + 1], atol=2e-5, rtol=1e-5)
    for settings in ({}, {"num_beams": 3}):
        said = generate(model, inputs, **settings)
        for row in range(2):
            assert torch.equal(generate(model, tiny.inputs(name, row), **settings)[0], said[row])


@pytest.mark.parametrize("name", tiny.NAMES)
def test_the_tied_head_is_the_models_own_output_and_layers_left_out_do_not_run(name: str) -> None:
    model, inputs = tiny.build(name), tiny.inputs(name)
    view = match(model)[0]
    assert view is not None
    states: list[Tensor] = []
    handles = [block.register_forward_hook(lambda m, a, o: states.append(o[0] if isinstance(o, tuple) else o))
               for block in view.decoder]  # fmt: skip
    plain = logits(model, inputs, TOKENS)
    torch.testing.assert_close(exit_head(view)(states[-1]), plain)
    first = exit_head(view)(states[0])
    for handle in handles:
        handle.remove()
    ran: list[str] = []
    for index, inner in enumerate(feed_forwards(name, "decoder", model)):
        inner.register_forward_hook(lambda m, a, o, index=index: ran.append(index))
    mmskip.apply_(model, EarlyExitConfig(decoder=-1.0))
    torch.testing.assert_close(logits(model, inputs, TOKENS), first)
    assert set(ran) == {0} and (layers_run(model)["decoder"] == 1).all()


def feed_forwards(name: str, module: str, model: Any) -> list[Any]:
    """The last part of each block of a stack, which only states whose block runs pass through."""
    return [
        list(block.children())[-1] if name != "t5" else block.layer[-1] for block in getattr(match(model)[0], module)
    ]


@pytest.mark.parametrize("kv", POLICIES)
@pytest.mark.parametrize("name", tiny.NAMES)
def test_rows_that_exited_are_taken_out_and_change_nothing(name: str, kv: str) -> None:
    encoder, decoder = mixed(name, "encoder").encoder, mixed(name, "decoder").decoder
    found, rows = {}, {}
    for compact in ("never", "always"):
        model, inputs, seen = tiny.build(name), tiny.inputs(name), []
        for module in ("encoder", "decoder"):
            for part in feed_forwards(name, module, model):
                part.register_forward_hook(lambda m, a, o, seen=seen: seen.append(len(a[0])))
        mmskip.apply_(model, EarlyExitConfig(encoder=encoder, decoder=decoder, cache_policy=kv, compact=compact))
        whole = logits(model, inputs, TOKENS, use_cache=False)
        found[compact] = (whole, *stepwise(model, inputs, TOKENS))
        said = [generate(model, inputs, num_beams=beams) for beams in (1, 3)]
        found[compact] += tuple(said)
        rows[compact] = set(seen)
    assert rows["never"] & {1} == set() and 1 in rows["always"]
    torch.testing.assert_close(found["always"][:2], found["never"][:2], atol=1e-5, rtol=1e-5)
    assert all(map(torch.equal, found["always"][2:], found["never"][2:]))


def test_rows_are_taken_out_where_that_pays() -> None:
    taken = Compaction("auto", 0.25)
    assert [taken(left, 8) for left in (8, 7, 6, 5, 1)] == [False, False, False, True, True]
    assert not Compaction("never", 0.0)(1, 8) and Compaction("always", 1.0)(7, 8)
    model, inputs = tiny.build("bart"), tiny.inputs("bart")
    mmskip.apply_(model, EarlyExitConfig(decoder=mixed("bart", "decoder").decoder, compact_overhead=0.6))
    seen: list[int] = []
    for part in feed_forwards("bart", "decoder", model):
        part.register_forward_hook(lambda m, a, o: seen.append(len(a[0])))
    stepwise(model, inputs, TOKENS)
    assert set(seen) == {2}  # half of two rows and an overhead of 0.6


def test_layers_that_no_later_token_reaches_store_nothing_and_rows_can_still_be_picked() -> None:
    model, inputs = tiny.build("bart"), tiny.inputs("bart")
    mmskip.apply_(model, EarlyExitConfig(decoder=-1.0))
    cache = model(**inputs, decoder_input_ids=TOKENS[:, :4], use_cache=True).past_key_values
    layer = cache.self_attention_cache.layers[2]
    assert layer.get_seq_length() == 4 and layer.keys is None
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.crop(-1)
    assert layer.get_seq_length() == 3
    mmskip.remove_(model)
    mmskip.apply_(model, EarlyExitConfig(decoder=ExitAt(-1.0, exit_layers=(2,))))
    flipped = {key: value.flip(0) for key, value in inputs.items()}
    mixed_exits = model(**flipped, decoder_input_ids=TOKENS[:, 3:4].flip(0), past_key_values=cache)
    assert mixed_exits.logits.isfinite().all() and layer.get_seq_length() == 4


def test_cropping_deferred_tokens_keeps_the_stored_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def older(layer: DynamicLayer, length: int) -> None:  # where 0 is the length to keep
        assert layer.keys is not None
        layer.keys = layer.keys[..., :length, :]

    monkeypatch.setattr(DynamicLayer, "crop", older)
    layer, keys = ExitLayer(), torch.randn(2, 1, 3, 4)
    layer.update(keys, keys)
    layer.defer(torch.randn(2, 2, 8), {})
    layer.crop(-1)
    assert layer.get_seq_length() == 4 and torch.equal(layer.keys, keys)
    layer.crop(-2)
    assert layer.get_seq_length() == 2 and torch.equal(layer.keys, keys[..., :2, :])


@pytest.mark.parametrize("criterion", ["confidence", "margin", "entropy", "patience", "state_norm"])
def test_every_criterion_decides_per_token_and_agrees_with_the_cache(criterion: str) -> None:
    model, inputs = tiny.build("mbart"), tiny.inputs("mbart")
    threshold = {"patience": 1, "state_norm": 0.2, "entropy": 0.2, "margin": 0.05}.get(criterion, 0.3)
    mmskip.apply_(model, EarlyExitConfig(decoder=ExitAt(threshold, criterion)))
    whole = logits(model, inputs, TOKENS, use_cache=False)
    exits = layers_run(model)["decoder"]
    steps, step_exits = stepwise(model, inputs, TOKENS)
    assert exits.min() < tiny.LAYERS and torch.equal(step_exits, exits)
    torch.testing.assert_close(steps, whole, atol=2e-5, rtol=1e-5)


def test_minimum_layers_exit_layers_and_decay_delay_exits() -> None:
    model, inputs = tiny.build("t5"), tiny.inputs("t5")
    for exits, expected in (
        (ExitAt(-1.0, min_layers=2), 2),
        (ExitAt(-1.0, exit_layers=(3,)), 3),
        (ExitAt(-1.0, min_layers=2, exit_layers=(1, 3)), 3),
    ):
        mmskip.apply_(model, EarlyExitConfig(decoder=exits))
        logits(model, inputs, TOKENS)
        assert (layers_run(model)["decoder"] == expected).all()
        mmskip.remove_(model)
    mmskip.apply_(model, EarlyExitConfig(decoder=ExitAt(0.0, decay=0.2, decay_speed=50.0, decay_steps=6)))
    whole = logits(model, inputs, TOKENS, use_cache=False)
    exits = layers_run(model)["decoder"]
    assert (exits[:, 0] == tiny.LAYERS).all() and (exits[:, 1:] < tiny.LAYERS).all()
    steps, step_exits = stepwise(model, inputs, TOKENS)
    assert torch.equal(step_exits, exits)
    torch.testing.assert_close(steps, whole, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kv", POLICIES)
@pytest.mark.parametrize("name", tiny.NAMES)
def test_most_layers_end_what_no_score_does(name: str, kv: str) -> None:
    model, inputs = tiny.build(name), tiny.inputs(name)

    def found(**settings: Any) -> tuple[Tensor, Tensor, Tensor]:
        mmskip.apply_(model, EarlyExitConfig(**{"decoder": None, "cache_policy": kv, **settings}))
        whole = logits(model, inputs, TOKENS, use_cache=False)
        exits = layers_run(model)
        steps, step_exits = stepwise(model, inputs, TOKENS)
        torch.testing.assert_close(steps, whole, atol=2e-5, rtol=1e-5)
        assert torch.equal(step_exits, exits["decoder"])
        mmskip.remove_(model)
        return whole, exits["decoder"], exits.get("encoder", torch.tensor(0))

    fixed, _, _ = found(decoder=FixedExit(3), encoder=FixedExit(2))
    never, exits, encoder = found(decoder=ExitAt(1.0, max_layers=3), encoder=ExitAt(1.0, max_layers=2))
    assert torch.equal(never, fixed) and (exits == 3).all() and (encoder == 2).all()
    threshold = mixing_threshold(name, "decoder")
    free, capped = found(decoder=threshold)[1], found(decoder=ExitAt(threshold, max_layers=2))[1]
    assert torch.equal(capped, free.clamp(max=2))
    three = ExitAt(threshold, max_layers=3)
    always, never = (found(decoder=three, compact=compact)[0] for compact in ("always", "never"))
    torch.testing.assert_close(always, never, atol=2e-5, rtol=1e-5)
    if name.startswith("vit") or kv == "mask":  # a sample decides at once, whatever the policy
        return
    once = found(decoder=ExitAt(threshold, max_layers=3, exit_layers=(1,), decide_once=True))[1]
    assert set(once.unique().tolist()) <= {1, 3}


def test_training_runs_all_layers_and_copies_are_independent() -> None:
    model, inputs = tiny.build("bart"), tiny.inputs("bart")
    mmskip.apply_(model, EarlyExitConfig(encoder=-1.0, decoder=-1.0))
    twin = copy.deepcopy(model)
    early = logits(twin, inputs, TOKENS)
    assert (layers_run(twin)["decoder"] == 1).all()
    assert layers_run(model) == {"encoder": None, "decoder": None}
    with pytest.raises(ValueError, match="no exits to report"), pytest.warns(FutureWarning, match="mmskip.report"):
        deprecated_exit_layers(model)
    with pytest.warns(FutureWarning, match="mmskip.report"):
        assert torch.equal(deprecated_exit_layers(twin)["decoder"], layers_run(twin)["decoder"])
    plain = mmskip.remove_(copy.deepcopy(model)).train()
    torch.manual_seed(0)
    expected = logits(plain, inputs, TOKENS)
    torch.manual_seed(0)
    assert torch.equal(logits(model.train(), inputs, TOKENS), expected)
    assert not torch.allclose(early, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "match_"),
    [
        ({"decoder": 1.2}, "decoder is 1.2"),
        ({"encoder": "x"}, "encoder is 'x'"),
        ({"decoder": None}, "both None"),
        ({"decoder": {"threshold": 1.2}}, "decoder: threshold is 1.2"),
        ({"decoder": {"criterion": "margin"}}, "decoder: ExitAt lacks threshold"),
        ({"decoder": {"threshold": 0.5, "layers": 3}}, "decoder: ExitAt has no layers"),
        ({"decoder": {"layer": 0}}, "decoder: layer is 0"),
        ({"decoder": {"threshold": 0.5, "criterion": "luck"}}, "decoder: criterion is 'luck'"),
        ({"encoder": ExitAt(0.5, "margin")}, "encoder: criterion is 'margin'"),
        ({"encoder": ExitAt(0.5, decay=0.5)}, "encoder: decay is 0.5"),
        ({"image": 0.9, "text": ExitAt(0.9, decide_once=True)}, "text: decide_once is True"),
        ({"cache_policy": "drop"}, "cache_policy is 'drop'"),
        ({"cache_policy": "skip"}, "cache_policy is 'skip'"),
        ({"compact": "yes"}, "compact is 'yes'"),
        ({"compact_overhead": 1.5}, "compact_overhead is 1.5"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], match_: str) -> None:
    with pytest.raises(ValueError, match=match_):
        EarlyExitConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "match_"),
    [
        ({"threshold": -2}, "threshold is -2"),
        ({"criterion": "luck"}, "criterion is 'luck'"),
        ({"min_layers": 0}, "min_layers is 0"),
        ({"exit_layers": ()}, "exit_layers is"),
        ({"exit_layers": (1, 1)}, "exit_layers is"),
        ({"max_layers": 1, "min_layers": 2}, "max_layers is 1; expected an integer >= min_layers"),
        ({"decay": 1.5}, "decay is 1.5"),
        ({"decay": 0.5, "criterion": "patience"}, "thresholds in"),
        ({"decay_speed": 0}, "decay_speed is 0"),
        ({"decay_steps": 0}, "decay_steps is 0"),
        ({"decide_once": True, "decay": 0.5}, "decide_once is True"),
        ({"decide_once": 2}, "decide_once is 2"),
    ],
)
def test_bad_settings_of_an_exit_are_refused(settings: dict[str, Any], match_: str) -> None:
    with pytest.raises(ValueError, match=match_):
        ExitAt(**{"threshold": 0.5, **settings})
    with pytest.raises(ValueError, match="layer is 0"):
        FixedExit(0)


@pytest.mark.parametrize(("model", "reason"), [("t5gemma", "final_logit_softcapping"), ("vit_bert", "Transform")])
def test_exit_heads_that_are_not_the_models_output_are_refused(model: str, reason: str) -> None:
    built = getattr(tiny, model)()
    with pytest.raises(ValueError, match=f"changes its logits by .*{reason}"):
        mmskip.apply_(built, EarlyExitConfig(decoder=ExitAt(0.5, "confidence")))
    assert mmskip.applied(built) == []
    mmskip.apply_(built, EarlyExitConfig(decoder=0.5))


def test_what_a_model_cannot_do_is_refused_and_leaves_it_as_it_was(tmp_path: Path) -> None:
    model, inputs = tiny.build("bart"), tiny.inputs("bart")
    for settings, message in (
        ({"exit_layers": (9,)}, "decoder: exit_layers has 9, and there are 4 layers"),
        ({"min_layers": 4}, "min_layers is 4, which leaves no exit: expected exit_layers from min_layers to 3 of 4"),
        ({"max_layers": 4}, "max_layers is 4, and there are 4 layers"),
        (
            {"max_layers": 2, "exit_layers": (3,)},
            r"min_layers is 1 and exit_layers \(3,\), which leaves no exit: .* to 1 of 4",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            mmskip.apply_(model, EarlyExitConfig(decoder=ExitAt(0.99, **settings)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no output projection"):
        mmskip.apply_(model.model, EarlyExitConfig(decoder=ExitAt(0.5, "margin")))
    with pytest.raises(ValueError, match="holds no encoder-decoder"):
        mmskip.apply_(torch.nn.Linear(2, 2), EarlyExitConfig())
    assert mmskip.applied(model) == []
    config = EarlyExitConfig(decoder=ExitAt(0.5, exit_layers=(3, 1)))
    assert EarlyExitConfig.from_dict(config.to_dict()) == config and config.decoder.exit_layers == (1, 3)
    mmskip.apply_(model, config)
    mmskip.save(model, tmp_path / "adapter")
    twin = tiny.build("bart")
    mmskip.load_(twin, tmp_path / "adapter")
    assert mmskip.applied(twin) == [config]
    static = EncoderDecoderCache(*(StaticCache(config=model.config, max_cache_len=8) for _ in range(2)))
    with pytest.raises(ValueError, match="needs a DynamicCache"):
        logits(model, inputs, TOKENS, past_key_values=static)


CONTRACT = [
    contract.Case(
        contract.ENCODER_DECODER,
        EarlyExitConfig(decoder=FixedExit(1)),
        EarlyExitConfig(encoder=1.0, decoder=1.0),
        {"cache_policy": "none", "compact_overhead": 2.0},
    )
]
