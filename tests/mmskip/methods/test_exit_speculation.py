"""Self-speculation of encoder-decoders: the tokens of `generate`, drafted by early exit on the live cache."""

from typing import Any

import pytest
import tiny_seq2seq as tiny
import torch
from transformers import T5Model

import mmskip
from mmskip import EarlyExitConfig, SelfSpeculationConfig
from mmskip.families.encoder_decoder import match
from mmskip.methods.self_speculation import speculation_of


def batch_of(name: str, rows: int) -> dict[str, torch.Tensor]:
    """Different inputs; with text, each second row is padded."""
    inputs = tiny.inputs(name)
    if rows == 1:
        return {key: value[:1] for key, value in inputs.items()}
    more = {key: value.repeat(rows // 2, *[1] * (value.dim() - 1)) for key, value in inputs.items()}
    first = next(iter(more.values()))
    for row in range(rows):
        if first.is_floating_point():
            first[row, ..., -1] += row
        else:
            first[row, 0] = 4 + row
    return more


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("name", tiny.NAMES)
def test_tokens_are_those_of_generate(name: str, rows: int) -> None:
    model, inputs = tiny.build(name), batch_of(name, rows)
    for block in match(model)[0].decoder[2:]:  # type: ignore[union-attr]
        for parameter in block.parameters():  # so that some drafts agree
            parameter.data *= 0.6
    settings: dict[str, Any] = {"max_new_tokens": 12}
    expected = model.generate(**inputs, **settings)
    mmskip.apply_(model, SelfSpeculationConfig(exit_after=2, draft_tokens=3, stop_below=0.0))
    assert torch.equal(model.generate(**inputs, **settings), expected)
    found = speculation_of(model)
    assert found.drafted > 0 and found.accepted + found.steps == rows * 11  # and one token each from the prompt
    mmskip.remove_(model)
    end = int(expected[0, 4])
    expected = model.generate(**inputs, **settings, eos_token_id=end)
    with pytest.warns(FutureWarning, match=r"mmskip.generate is now model.generate after mmskip.apply_"):
        found_early = mmskip.generate(
            model, None, SelfSpeculationConfig(stop_below=0.0), **inputs, **settings, eos_token_id=end
        )
    assert torch.equal(found_early, expected) and mmskip.applied(model) == []


def test_a_draft_that_agrees_is_accepted_whole_and_processors_are_obeyed() -> None:
    model, inputs = tiny.build("bart"), tiny.inputs("bart")
    for layer in model.model.decoder.layers[2:]:
        for part in (layer.self_attn.out_proj, layer.encoder_attn.out_proj, layer.fc2):
            torch.nn.init.zeros_(part.weight)
    settings = {"max_new_tokens": 9, "no_repeat_ngram_size": 2, "decoder_input_ids": torch.tensor([[3, 5], [3, 6]])}
    expected = model.generate(**inputs, **settings)
    mmskip.apply_(model, SelfSpeculationConfig(exit_after=2, draft_tokens=8, stop_below=0.0))
    assert torch.equal(model.generate(**inputs, **settings), expected)
    assert speculation_of(model).accepted == speculation_of(model).drafted > 0
    outputs = model.generate(**inputs, **settings, return_dict_in_generate=True)
    assert torch.equal(outputs.sequences, expected)


def test_forwards_outside_of_drafts_are_the_base_model_and_other_settings_are_refused() -> None:
    model, inputs = tiny.build("t5"), tiny.inputs("t5")
    tokens = torch.tensor([[3, 8], [3, 9]])
    plain = model(**inputs, decoder_input_ids=tokens).logits
    for wrong, message in (
        ({"exit_after": 4}, "has 4 layers"),
        ({"branches": 2}, "branches is 2"),
        ({"search": "random"}, "search is 'random'"),
    ):
        with pytest.raises(ValueError, match=message):
            mmskip.apply_(model, SelfSpeculationConfig(**wrong))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"T5Model has no output projection, which drafts need.*ForConditional"):
        mmskip.apply_(T5Model(model.config), SelfSpeculationConfig())
    mmskip.apply_(model, SelfSpeculationConfig(exit_after=1))
    assert torch.equal(model(**inputs, decoder_input_ids=tokens).logits, plain)
    with pytest.raises(ValueError, match="num_beams must be 1"):
        model.generate(**inputs, num_beams=2)
    with pytest.raises(ValueError, match="decoder_inputs_embeds is given"):
        model.generate(**inputs, decoder_inputs_embeds=torch.zeros(2, 1, tiny.WIDTH))
    with pytest.raises(
        ValueError, match=r"EarlyExit.*SelfSpec.* do not compose( on one stack)?: both claim decoder\.0, "
    ):
        mmskip.apply_(model, EarlyExitConfig(decoder=0.9))
