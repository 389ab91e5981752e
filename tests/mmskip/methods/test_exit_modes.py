"""Ways of early exit beside a threshold per state: modalities that run the encoder apart, depths known beforehand, and
samples that decide once."""

import copy
from typing import Any

import pytest
import tiny_seq2seq as tiny
import torch
from tiny_decoders import tiny_decoder
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel
from transformers.modeling_outputs import BaseModelOutput

import mmskip
from mmskip import EarlyExitConfig
from mmskip.exits.criteria import TokenScores
from mmskip.exits.runs import layers_run
from mmskip.exits.settings import ExitAt, FixedExit
from mmskip.families.encoder_decoder import match
from mmskip.methods.early_exit import image_tokens
from mmskip.swap import states

TOKENS = torch.randint(4, 40, (2, 6), generator=torch.Generator().manual_seed(3))


def pictured(row: int | None = None) -> dict[str, Tensor]:
    """Inputs of Florence-2 with image tokens, two samples of which the second is padded, or one of them unpadded."""
    given = tiny.inputs("florence2", row)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    pixels = pixels if row is None else pixels[row : row + 1]
    count = tiny.build("florence2").get_image_features(pixels).pooler_output.shape[1]
    image = torch.full((len(pixels), count), tiny.VOCABULARY - 1)
    ids, mask = torch.cat([image, given["input_ids"]], 1), given["attention_mask"]
    return {"input_ids": ids, "attention_mask": torch.cat([torch.ones_like(image), mask], 1), "pixel_values": pixels}


@torch.no_grad()
def apart(model: Any, inputs: dict[str, Tensor], thresholds: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
    """Naive: each sample's image and text run the encoder alone, without padding; states [B, T, D] and exits."""
    blocks, found = match(model)[0].encoder, []  # type: ignore[union-attr]
    handle = blocks[0].register_forward_pre_hook(lambda m, a, k: found.append(a[0] if a else k["hidden_states"]),
                                                 with_kwargs=True)  # fmt: skip
    model(**inputs, decoder_input_ids=TOKENS[: len(inputs["input_ids"])])
    handle.remove()
    whole, image = found[0], inputs["input_ids"] == tiny.VOCABULARY - 1
    places = {"image": image, "text": ~image & inputs["attention_mask"].bool()}
    exits = {name: torch.full((len(whole),), len(blocks)) for name in places}
    for row in range(len(whole)):
        for name, mask in places.items():
            x = whole[row : row + 1, mask[row]]
            for number, block in enumerate(blocks, 1):
                y = block(x, None)
                same = torch.cosine_similarity(x.flatten(1), y.flatten(1)).item()
                x = y
                if number < len(blocks) and same > thresholds[name]:
                    exits[name][row] = number
                    break
            whole[row, mask[row]] = x[0]
    return whole, exits


@pytest.mark.parametrize("compact", ["never", "always"])
@pytest.mark.parametrize(("image", "text"), [(1.0, 1.0), (0.45, 0.7), (0.7, 0.45)])
def test_image_and_text_run_the_encoder_apart(image: float, text: float, compact: str) -> None:
    model, inputs = tiny.build("florence2"), pictured()
    expected, exits = apart(model, inputs, {"image": image, "text": text})
    mmskip.apply_(model, EarlyExitConfig(image=image, text=text, decoder=0.6, compact=compact))
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        output = model(**inputs, decoder_input_ids=TOKENS)
    found = output.encoder_last_hidden_state
    torch.testing.assert_close(found[real], expected[real], atol=2e-5, rtol=1e-5)
    ran = layers_run(model)
    assert torch.equal(ran["image"], exits["image"]) and torch.equal(ran["text"], exits["text"])
    said = model.generate(**inputs)
    for row in range(2):
        assert torch.equal(model.generate(**pictured(row))[0], said[row])
        assert torch.equal(layers_run(model)["image"], exits["image"][row : row + 1])
    mmskip.remove_(model)
    outputs = BaseModelOutput(found)
    mmskip.apply_(model, EarlyExitConfig(decoder=0.6))
    with torch.no_grad():
        again = model(**inputs, encoder_outputs=outputs, decoder_input_ids=TOKENS)
    torch.testing.assert_close(again.logits, output.logits, atol=1e-6, rtol=1e-5)


def test_modalities_can_be_told_and_are_apart_in_training() -> None:
    model, inputs = tiny.build("bart"), tiny.inputs("bart")
    encoder, mask = model.get_encoder(), torch.zeros(2, 6, dtype=torch.bool)
    mask[0, ::3] = mask[1, 1:3] = True
    plain = [encoder(**tiny.inputs("bart", row))[0] for row in range(2)]
    mmskip.apply_(model, EarlyExitConfig(image=0.9, text=1.0, decoder=None))
    alone = encoder(**inputs)[0]
    torch.testing.assert_close(alone[1, :4], plain[1][0])  # without a mask all of it is text
    with image_tokens(model, mask):
        early = encoder(**inputs)[0]
        assert (layers_run(model)["text"] == tiny.LAYERS).all() and len(layers_run(model)["image"]) == 2
        before = encoder.train()(**inputs)[0]
        changed = {**inputs, "input_ids": inputs["input_ids"].masked_fill(mask, 9)}
        encoder.eval()
        assert not torch.allclose(encoder(**changed)[0][mask], early[mask])
        torch.testing.assert_close(encoder(**changed)[0][~mask], early[~mask])
        before[~mask].sum().backward()
        seen = model.model.shared.weight.grad[inputs["input_ids"][mask]]
        others = set(inputs["input_ids"][~mask].tolist())
        assert all(
            not row.any() for row, i in zip(seen, inputs["input_ids"][mask].tolist(), strict=True) if i not in others
        )
    mmskip.remove_(model)
    with pytest.raises(ValueError, match="image and text tokens do not run apart"), image_tokens(model, mask):
        pass
    with pytest.raises(ValueError, match="position_bias, so that image"):
        mmskip.apply_(tiny.build("t5"), EarlyExitConfig(image=0.9, text=0.9))
    mmskip.apply_(model, EarlyExitConfig(image=0.9, text=0.9))
    for wrong, message in ((mask[:, :4], "is .2, 4."), (torch.eye(2, 6).cumsum(1).bool(), r"rows have \[6, 5\]")):
        with pytest.raises(ValueError, match=message), image_tokens(model, wrong):
            encoder(**inputs)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_depth_is_a_model_of_fewer_layers(name: str) -> None:
    model, inputs, shallow = tiny.build(name), tiny.inputs(name), tiny.build(name)
    for module, depth in (("encoder", 3), ("decoder", 2)):
        blocks = getattr(match(shallow)[0], module)
        stack = next(m for m in shallow.modules() if isinstance(m, nn.ModuleList) and list(m) == list(blocks))
        del stack[depth:]
    with torch.no_grad():
        expected = shallow(**inputs, decoder_input_ids=TOKENS, use_cache=False).logits
    mmskip.apply_(model, EarlyExitConfig(encoder=FixedExit(3), decoder=FixedExit(2)))
    with torch.no_grad():
        found = model(**inputs, decoder_input_ids=TOKENS).logits
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    assert (layers_run(model)["decoder"] == 2).all() and (layers_run(model)["encoder"] == 3).all()
    assert torch.equal(model.generate(**inputs), model.generate(**inputs, use_cache=False))


@pytest.mark.parametrize(
    "settings",
    [
        {"encoder": FixedExit(3), "decoder": FixedExit(2)},
        {"encoder": FixedExit(3), "decoder": FixedExit(2), "cache_policy": "copy"},
        {"encoder": 1.0, "decoder": 1.0},
        {"encoder": ExitAt(1.0, max_layers=3), "decoder": ExitAt(1.0, max_layers=2)},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["bart", "t5", "vit_trocr"])
def test_what_decides_nothing_compiles_as_a_whole(name: str, settings: dict[str, Any]) -> None:
    eager, model, inputs = tiny.build(name), tiny.build(name), tiny.inputs(name)
    for one in (eager, model):
        mmskip.apply_(one, EarlyExitConfig(**settings))

    def run(model: Any) -> Any:
        def call(states: Tensor, tokens: Tensor) -> Tensor:
            outputs = BaseModelOutput(states)
            logits: Tensor = model(encoder_outputs=outputs, decoder_input_ids=tokens, use_cache=False).logits
            return logits

        return call

    with torch.no_grad():
        torch._dynamo.reset()
        # nothing ran before, so that nothing is remembered from an eager call
        states = torch.compile(model.get_encoder(), fullgraph=True, backend="eager")(**inputs)[0]
        torch.testing.assert_close(states, eager.get_encoder()(**inputs)[0])
        found = torch.compile(run(model), fullgraph=True, backend="eager")(states, TOKENS)
        torch.testing.assert_close(found, run(eager)(states, TOKENS))


@pytest.mark.parametrize("name", ["t5", "bart", "vit_gpt2"])
def test_the_first_token_decides_for_its_sample(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny.build(name), tiny.inputs(name)
    tokens = torch.tensor([[3, 7, 9, 11], [8, 9, 12, 5]])
    base = copy.deepcopy(model)
    mmskip.apply_(base, EarlyExitConfig(decoder=ExitAt(0.9999, exit_layers=(1,))))
    scores: list[Tensor] = []
    plain = TokenScores.__call__
    monkeypatch.setattr(TokenScores, "__call__", lambda s, a, b: scores.append(plain(s, a, b)) or scores[-1])
    with torch.no_grad():
        base(**inputs, decoder_input_ids=tokens)
    low, high = sorted(scores[0][:, 0].tolist())
    assert low < high
    mmskip.apply_(model, EarlyExitConfig(decoder=ExitAt((low + high) / 2, exit_layers=(1,), decide_once=True)))
    with torch.no_grad():
        whole = model(**inputs, decoder_input_ids=tokens, use_cache=False).logits
        exits = layers_run(model)["decoder"]
        assert (exits == exits[:, :1]).all() and sorted(exits[:, 0].tolist()) == [1, tiny.LAYERS]
        output = model(**inputs, decoder_input_ids=tokens[:, :2], use_cache=True)
        asked, steps, outputs = len(scores), [output.logits], BaseModelOutput(output.encoder_last_hidden_state)
        for t in (2, 3):
            given = {"attention_mask": inputs["attention_mask"]} if "attention_mask" in inputs else {}
            output = model(**given, encoder_outputs=outputs, decoder_input_ids=tokens[:, t : t + 1],
                           past_key_values=output.past_key_values, use_cache=True)  # fmt: skip
            steps.append(output.logits)
            assert torch.equal(layers_run(model)["decoder"], exits[:, :1])
    assert len(scores) == asked  # nothing is scored again
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=2e-5, rtol=1e-5)
    said = model.generate(**inputs, num_beams=3)
    assert torch.equal(said, model.generate(**inputs, num_beams=3, use_cache=False))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image": 0.9}, r"image is ExitAt\(threshold=0.9\) and text None"),
        ({"image": 0.9, "text": 1.4}, "text is 1.4"),
        ({"image": 0.9, "text": 0.9, "encoder": 0.8}, r"encoder is ExitAt\(threshold=0.8\) and image ExitAt\(thres"),
        ({"decoder": {"layer": 2, "threshold": 0.5}}, "decoder: FixedExit has no threshold"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EarlyExitConfig(**settings)


def test_configs_survive_json_and_depths_must_exist() -> None:
    for config in (
        EarlyExitConfig(decoder=FixedExit(2), encoder=FixedExit(1)),
        EarlyExitConfig(image=0.9, text=0.8, decoder=None),
    ):
        assert EarlyExitConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="decoder: layer is 4, and there are 4 layers"):
        mmskip.apply_(tiny.build("bart"), EarlyExitConfig(decoder=FixedExit(4)))


def forwards() -> dict[str, tuple[Any, Any, EarlyExitConfig]]:
    """Per kind of model, how it is built, how it is run, and exits of all and of no states."""
    found: dict[str, tuple[Any, Any, EarlyExitConfig]] = {}
    for name in tiny.NAMES:
        found[name] = (
            lambda name=name: tiny.build(name),
            lambda m, name=name: m(**tiny.inputs(name), decoder_input_ids=TOKENS, use_cache=False),
            EarlyExitConfig(encoder=0.5, decoder=0.5),
        )
    build, run, _ = found["bart"]
    found["bart_once"] = (build, lambda m: m(**tiny.inputs("bart"), decoder_input_ids=TOKENS),
                          EarlyExitConfig(decoder=ExitAt(0.9, decide_once=True)))  # fmt: skip
    found["bart_copy"] = build, run, EarlyExitConfig(decoder=0.5, cache_policy="copy")
    found["florence2_apart"] = (
        lambda: tiny.build("florence2"),
        lambda m: m(**pictured(), decoder_input_ids=TOKENS),
        EarlyExitConfig(image=-1.0, text=1.0, decoder=None),
    )
    found["llama"] = (
        lambda: tiny_decoder("llama").eval(),
        lambda m: m(input_ids=TOKENS),
        EarlyExitConfig(cache_policy="copy"),
    )
    size: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    found["vit"] = (
        lambda: ViTModel(ViTConfig(**size, num_hidden_layers=4, image_size=16, patch_size=4)).eval(),
        lambda m: m(pixel_values=torch.randn(2, 3, 16, 16)),
        EarlyExitConfig(decoder=None, encoder=0.5),
    )
    return found


@pytest.mark.parametrize("name", forwards())
def test_a_forward_leaves_nothing_behind_but_its_exits(name: str) -> None:
    build, run, config = forwards()[name]
    model = mmskip.apply_(build(), config)
    run(model)
    exits = layers_run(model)
    twin = copy.deepcopy(model)  # a graph cannot be copied
    for state in states(model):
        for one in getattr(state, "exit_runs", {}).values():
            assert not [
                k for k, v in vars(one).items() if k != "exits" and v not in (None, {}) and not isinstance(v, int)
            ]
    assert all(torch.equal(exits[part], found) for part, found in layers_run(twin).items())
    run(model.train())
    assert set(layers_run(model).values()) == {None}
