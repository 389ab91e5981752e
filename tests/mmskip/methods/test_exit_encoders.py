"""Early exit of encoders alone and of two towers, sample by sample; and exits by learned heads."""

import copy
import itertools
from pathlib import Path
from typing import Any

import contract
import open_clip
import pytest
import timm
import tiny_seq2seq as tiny
import torch
from tiny_decoders import tiny_decoder
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    BlipConfig,
    BlipForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    ViTConfig,
    ViTForImageClassification,
)

import mmskip
from mmskip import EarlyExitConfig
from mmskip.exits.criteria import SampleScores
from mmskip.exits.heads import ExitHead
from mmskip.exits.runs import layers_run
from mmskip.exits.settings import ExitAt, FixedExit
from mmskip.families.encoder import match
from mmskip.methods.early_exit import exit_heads

LAYERS = 4
_SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
                          "num_attention_heads": 2}  # fmt: skip
_PICTURE: dict[str, Any] = {**_SIZES, "image_size": 16, "patch_size": 4}
PIXELS = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
PIXELS[1] *= 3
IDS = torch.randint(3, 40, (3, 7), generator=torch.Generator().manual_seed(2))
IDS[:, -1] = 49
MASK = torch.ones_like(IDS)


def _clip() -> nn.Module:
    text = {**_SIZES, "vocab_size": 50, "max_position_embeddings": 12, "eos_token_id": 49}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=_PICTURE, projection_dim=16))


def _open_clip() -> nn.Module:
    vision = {"layers": LAYERS, "width": 32, "head_width": 16, "patch_size": 4, "image_size": 16}
    text = {"context_length": 7, "vocab_size": 50, "width": 32, "heads": 2, "layers": LAYERS}
    return open_clip.CLIP(16, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text))


BUILDERS: dict[str, tuple[Any, Any]] = {
    "vit": (lambda: ViTForImageClassification(ViTConfig(**_PICTURE)), lambda m, s: m(pixel_values=PIXELS[s]).logits),
    "clip_vision": (
        lambda: CLIPVisionModel(CLIPVisionConfig(**_PICTURE)),
        lambda m, s: m(pixel_values=PIXELS[s]).pooler_output,
    ),
    "bert": (
        lambda: BertModel(BertConfig(vocab_size=50, **_SIZES)),
        lambda m, s: m(input_ids=IDS[s], attention_mask=MASK[s]).pooler_output,
    ),
    "timm": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, depth=LAYERS, embed_dim=32,
                                  num_heads=2, num_classes=5),
        lambda m, s: m(PIXELS[s]),
    ),
    "clip": (_clip, lambda m, s: torch.cat(m(input_ids=IDS[s], pixel_values=PIXELS[s])[2:4], 1)),
    "open_clip": (_open_clip, lambda m, s: torch.cat([m.encode_image(PIXELS[s]), m.encode_text(IDS[s])], 1)),
}  # fmt: skip
TOWERS = ("clip", "open_clip")


def build(name: str) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = BUILDERS[name][0]().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model, lambda m, s=slice(None): BUILDERS[name][1](m, s)


def cosines(model: Any, call: Any) -> dict[str, Tensor]:
    """Of each stack, the cosines [layers, B] of the samples' states behind and before its layers."""
    found = {}
    for name, blocks in match(model)[0].stacks.items():  # type: ignore[union-attr]
        states: list[Tensor] = []
        handles = [b.register_forward_hook(lambda m, a, o, s=states: s.append(o[0] if isinstance(o, tuple) else o))
                   for b in blocks]  # fmt: skip
        call(model)
        for handle in handles:
            handle.remove()
        flat = [state.flatten(1) for state in states]
        found[name] = torch.stack([torch.cosine_similarity(a, b) for a, b in itertools.pairwise(flat)])
    return found


@torch.no_grad()
@pytest.mark.parametrize("name", BUILDERS)
def test_samples_exit_encoders_as_alone(name: str) -> None:
    model, call = build(name)
    plain, scores = call(model), cosines(model, call)
    keys = list(model.state_dict())
    for threshold, criterion in ((1.0, "saturation"), (0.99999, "saturation")):  # the second is scored
        parts = ("image", "text") if name in TOWERS else ("encoder",)
        never = dict.fromkeys(parts, ExitAt(threshold, criterion))
        mmskip.apply_(model, EarlyExitConfig(decoder=None, **never))
        assert torch.equal(call(model), plain) and list(model.state_dict()) == keys
        mmskip.remove_(model)
    # after the second layer, some samples of each stack and not all
    settings = {stack: scores[stack][0].sort().values[:2].mean().item() for stack in scores}
    found = []
    for compact in ("never", "always"):
        second = {stack: ExitAt(threshold, exit_layers=(2,)) for stack, threshold in settings.items()}
        mmskip.apply_(model, EarlyExitConfig(decoder=None, compact=compact, **second))
        found.append(call(model))
        exits = layers_run(model)
        for stack, row in scores.items():
            assert torch.equal(exits[stack], torch.where(row[0] > settings[stack], 2, LAYERS))
            assert exits[stack].unique().numel() == 2
        for row in range(3):
            torch.testing.assert_close(call(model, slice(row, row + 1))[0], found[-1][row], atol=1e-5, rtol=1e-5)
        mmskip.remove_(model)
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
    shallow = copy.deepcopy(model)
    for blocks in match(shallow)[0].stacks.values():  # type: ignore[union-attr]
        stack = next(m for m in shallow.modules() if list(m.children()) == list(blocks))
        del stack[3:]  # type: ignore[attr-defined]
    capped = dict.fromkeys(("image", "text") if name in TOWERS else ("encoder",), ExitAt(1.0, max_layers=3))
    for config in (
        EarlyExitConfig(decoder=None, encoder=FixedExit(3)),
        EarlyExitConfig(decoder=None, **capped),
    ):
        mmskip.apply_(model, config)
        torch.testing.assert_close(call(model), call(shallow))
        mmskip.remove_(model)


def test_the_image_encoder_of_blip_is_left_and_its_decoder_is_not() -> None:
    text = {**_SIZES, "vocab_size": 50, "encoder_hidden_size": 32, "bos_token_id": 3, "sep_token_id": 2,
            "pad_token_id": 0, "projection_dim": 32}  # fmt: skip
    model = BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=_PICTURE)).eval()
    said = model.generate(pixel_values=PIXELS, max_new_tokens=5)
    mmskip.apply_(model, EarlyExitConfig(decoder=None, encoder=1.0))
    assert torch.equal(model.generate(pixel_values=PIXELS, max_new_tokens=5), said)
    mmskip.remove_(model)
    mmskip.apply_(model, EarlyExitConfig(decoder=None, encoder=ExitAt(-1.0, exit_layers=(2,))))
    model.generate(pixel_values=PIXELS, max_new_tokens=5)
    assert layers_run(model)["encoder"].tolist() == [2, 2, 2]
    mmskip.remove_(model)
    with pytest.raises(ValueError, match="has no decoder"):
        mmskip.apply_(model, EarlyExitConfig(decoder=0.9))


@torch.no_grad()
def test_padding_of_an_encoder_changes_no_exit() -> None:
    model, _ = build("bert")
    mask = MASK.clone()
    mask[0, 4:] = 0
    whole = cosines(model, lambda m: m(input_ids=IDS, attention_mask=mask))["encoder"][0, 0].item()
    real = cosines(model, lambda m: m(input_ids=IDS[:1, :4]))["encoder"][0, 0].item()
    assert abs(whole - real) > 1e-4
    mmskip.apply_(model, EarlyExitConfig(decoder=None, encoder=ExitAt((whole + real) / 2, exit_layers=(2,))))
    model(input_ids=IDS, attention_mask=mask)
    assert layers_run(model)["encoder"][0] == (2 if real > whole else LAYERS)


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The mask of real tokens that each forward used."""
    found: list[Tensor] = []
    plain = SampleScores.__init__
    monkeypatch.setattr(SampleScores, "__init__", lambda s, c, real, h=(): found.append(real) or plain(s, c, real, h))
    return found


def test_padding_is_found_where_the_first_layer_has_a_window(masks: list[Tensor]) -> None:
    model = tiny.t5gemma()
    ids = torch.randint(4, 40, (2, 14), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    mmskip.apply_(model, EarlyExitConfig(decoder=None, encoder=0.5))
    with torch.no_grad():
        model.get_encoder()(input_ids=ids, attention_mask=mask)
    assert torch.equal(masks[0], mask.bool())


@torch.no_grad()
def test_padding_of_open_clip_is_read_from_its_mask_where_it_has_one(masks: list[Tensor]) -> None:
    torch.manual_seed(0)
    model = open_clip.transformer.TextTransformer(7, 50, 32, 2, LAYERS, embed_cls=True, correct_cls_mask=True).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    ids = IDS.clone()
    ids[0, 4:] = 0
    score = cosines(model, lambda m: m(ids))["encoder"][0]
    found = []
    for compact in ("never", "always"):
        mmskip.apply_(model, EarlyExitConfig(decoder=None, encoder=score[1:].mean().item(), compact=compact))
        found.append(model(ids))
        assert layers_run(model)["encoder"].unique().numel() > 1
        assert torch.equal(masks[-1], nn.functional.pad(ids > 0, (0, 1), value=True))
        mmskip.remove_(model)
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def scramble(model: nn.Module, seed: int) -> None:
    """Random weights of all exit heads."""
    torch.manual_seed(seed)
    for heads in exit_heads(model).values():
        for head in heads.values():
            nn.init.normal_(head.weight)


def test_learned_heads_decide_and_travel_with_the_adapter(tmp_path: Path) -> None:
    model, call = build("vit")
    config = EarlyExitConfig(decoder=None, encoder=ExitAt(0.6, "learned", exit_layers=(1, 3)))
    mmskip.apply_(model, config)
    scramble(model, 3)
    heads = exit_heads(model)["encoder"]
    assert list(heads) == [1, 3] and sum("mmskip_exit" in key for key in model.state_dict()) == 8
    states: list[Tensor] = []
    block = match(build("vit")[0])[0]
    assert block is not None
    plain = build("vit")[0]
    for layer in match(plain)[0].stacks["encoder"]:  # type: ignore[union-attr]
        layer.register_forward_hook(lambda m, a, o: states.append(o))
    with torch.no_grad():
        call(plain)
        said = call(model)
        first, third = (heads[n].score(states[n - 1].mean(1, keepdim=True))[:, 0] > 0.6 for n in (1, 3))
        assert torch.equal(layers_run(model)["encoder"], torch.where(first, 1, torch.where(third, 3, LAYERS)))
        mmskip.save(model, tmp_path)
        twin = mmskip.load_(build("vit")[0], tmp_path)
        assert torch.equal(call(twin), said)
        other = copy.deepcopy(model)
        scramble(other, 4)
        assert torch.equal(call(model), said)
    mmskip.remove_(model)
    assert not any("mmskip" in key for key in model.state_dict())


def test_learned_heads_of_decoders_and_modalities(tmp_path: Path) -> None:
    tokens = torch.tensor([[3, 7, 9], [8, 9, 12]])
    for name, settings in (
        ("florence2", {"image": ExitAt(0.5, "learned"), "text": ExitAt(0.5, "learned"), "decoder": None}),
        ("t5", {"decoder": ExitAt(0.5, "learned", exit_layers=(1, 2))}),
    ):
        model, inputs = tiny.build(name), tiny.inputs(name)
        mmskip.apply_(model, EarlyExitConfig(**settings))  # type: ignore[arg-type]
        scramble(model, 1)
        assert set(exit_heads(model)) == ({"decoder"} if name == "t5" else {"image", "text"})
        with torch.no_grad():
            found = model(**inputs, decoder_input_ids=tokens).logits
            mmskip.save(model, tmp_path / name)
            twin = mmskip.load_(tiny.build(name), tmp_path / name)
            assert torch.equal(twin(**inputs, decoder_input_ids=tokens).logits, found)
        assert torch.equal(model.generate(**inputs), model.generate(**inputs, use_cache=False))
    llama = mmskip.apply_(tiny_decoder("llama"), EarlyExitConfig(decoder=ExitAt(0.5, "learned", exit_layers=(2,))))
    scramble(llama, 2)
    llama(input_ids=IDS, labels=IDS)
    mmskip.save(llama, tmp_path / "llama")
    assert len(exit_heads(mmskip.load_(tiny_decoder("llama"), tmp_path / "llama"))["decoder"]) == 1


def test_samples_score_by_their_real_tokens_and_heads_can_be_fitted() -> None:
    head, states = ExitHead(8, 1), torch.randn(2, 5, 8)
    nn.init.normal_(head.weight)
    real = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    together = SampleScores("learned", real, [head])(states, states)
    for row, count in ((0, 5), (1, 3)):
        alone = SampleScores("learned", None, [head])(states[row : row + 1, :count], states[row : row + 1, :count])
        torch.testing.assert_close(alone[0], together[row])
    together.sum().backward()
    assert head.weight.grad is not None and bool(head.weight.grad.any())


def test_what_encoders_lack_is_refused() -> None:
    vit, clip = build("vit")[0], build("clip")[0]
    decoding_bert = BertModel(BertConfig(vocab_size=50, is_decoder=True, **_SIZES))
    for model, settings, message in (
        (vit, {"decoder": 0.9}, "has no decoder"),
        (vit, {"decoder": None, "image": 0.9, "text": 0.9}, "not two towers"),
        (clip, {"decoder": None, "encoder": ExitAt(0.9, exit_layers=(7,))}, "encoder: exit_layers has 7"),
        (timm.create_model("resnet10t"), {"decoder": None, "encoder": 0.9}, "has 0 stacks"),
        (decoding_bert, {"decoder": None, "encoder": 0.9}, "has 0 stacks"),
        (tiny_decoder("nemotron_h"), {"decoder": None, "encoder": 0.9}, "a decoder only"),
    ):
        with pytest.raises(ValueError, match=message):
            mmskip.apply_(model, EarlyExitConfig(**settings))  # type: ignore[arg-type]


CONTRACT = [
    contract.Case(
        contract.ENCODER,
        EarlyExitConfig(decoder=None, encoder=FixedExit(2)),
        EarlyExitConfig(decoder=None, encoder=1.0),
        {"compact": "none"},
    )
]
