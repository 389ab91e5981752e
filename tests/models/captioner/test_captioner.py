"""The captioner: apart in the encoder, a loss at every decoder layer, answers and captions, exits from outside."""

import re

import pytest
import torch
from captioning import SMALL, TEXTS, TOWER, captioner, data
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutput

import mmskip
from mmskip import EarlyExitConfig
from mmskip.datasets.common.labels import IGNORE
from mmskip.exits.runs import layers_run
from mmskip.exits.settings import FixedExit
from mmskip.models.captioner.exit_training import exiting, layer_weights, saturation_loss
from mmskip.models.captioner.module import Captioner
from mmskip.train.evaluation.captioner.exit_sweep import encoder_exits, recording

KINDS = [*TEXTS, "florence2"]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return data(tmp_path_factory.mktemp("captions"))


@pytest.fixture(scope="module")
def batch(given):
    return next(iter(given.train_dataloader()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_every_layer_through_the_head(kind, given, batch):
    model = captioner(kind, given, layer_loss="linear", caption_weight=0.5, label_smoothing=0.1).eval()
    embedded = model.see(batch["images"])
    total = count = 0.0
    for task, factor in (("caption", 0.5), ("entailment", 1.0), ("question", 1.0)):
        texts = batch[task]
        states, mask = model.encode(embedded, texts)
        for row, labels in enumerate(texts.labels):
            labels = labels[labels != IGNORE]
            read = torch.tensor([[model.start_id, *labels[:-1].tolist()]])
            blocks = model.view.decoder
            weights = range(1, len(blocks) + 1)
            for number in weights:
                # a naive reference: cut the decoder after the layer
                with exiting(blocks, torch.tensor([number])):
                    logits = model.llm(
                        encoder_outputs=BaseModelOutput(states[row : row + 1]), attention_mask=mask[row : row + 1],
                        decoder_input_ids=read, use_cache=False,
                    ).logits  # fmt: skip
                loss = F.cross_entropy(logits[0], labels, reduction="sum", label_smoothing=0.1)
                total += factor * number / sum(weights) * loss.item()
            count += factor * len(labels)
    sums = model.loss_sums(batch)
    assert float(sums[0]) == pytest.approx(total, rel=1e-4)
    assert float(sums[1]) == pytest.approx(count)
    sums[0].backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if n.startswith("connector"))


@pytest.mark.parametrize("kind", KINDS)
def test_image_and_prompt_do_not_meet_in_the_encoder(kind, given, batch):
    texts = batch["entailment"]
    other = texts.rows(range(len(texts.uids)))
    other.prompt = other.prompt.flip(0)
    other.prompt_mask = other.prompt_mask.flip(0)
    for separate in (True, False):
        model = captioner(kind, given, separate=separate).eval()
        embedded = model.see(batch["images"])
        count = embedded.shape[1]
        one, two = (model.encode(embedded, t)[0][:, :count] for t in (texts, other))
        assert torch.equal(one, two) == separate
        blank = model.see(torch.zeros_like(batch["images"]))
        read, unseen = (model.encode(e, texts)[0][:, count:] for e in (embedded, blank))
        assert torch.equal(read, unseen) == separate


@pytest.mark.parametrize("kind", ["mbart", "t5"])
def test_rows_of_a_batch_are_as_alone(kind, given, batch):
    model = captioner(kind, given).eval()
    texts = batch["entailment"]
    embedded = model.see(batch["images"])
    batched = model.judge(*model.encode(embedded, texts))
    for row in range(len(texts.uids)):
        one = texts.rows([row])
        length = int(one.prompt_mask.sum())
        one.prompt, one.prompt_mask = one.prompt[:, :length], one.prompt_mask[:, :length]
        assert torch.allclose(model.judge(*model.encode(embedded, one))[0], batched[row], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_exits_come_from_outside_and_never_firing_ones_change_nothing(kind, given, batch):
    model = captioner(kind, given).eval()
    texts = batch["caption"].first_of_each()

    def answers():
        embedded = model.see(batch["images"])
        judged = model.judge(*model.encode(embedded, batch["entailment"]))
        said = [model.caption(*model.encode(embedded, texts), num_beams=beams) for beams in (1, 3)]
        return judged, *said

    full = answers()
    mmskip.apply_(model.llm, EarlyExitConfig(encoder=1.0, decoder=1.0))
    assert all(torch.equal(one, two) for one, two in zip(full, answers(), strict=True))
    mmskip.remove_(model.llm)
    mmskip.apply_(model.llm, EarlyExitConfig(encoder=-1.0, decoder=-1.0))
    answers()
    assert all((layers == 1).all() for layers in layers_run(model.llm).values())
    mmskip.remove_(model.llm)
    assert all(torch.equal(one, two) for one, two in zip(full, answers(), strict=True))


@pytest.mark.parametrize("kind", ["bart", "mbart", "florence2"])
def test_image_and_prompt_have_thresholds_of_their_own(kind, given, batch):
    model = captioner(kind, given).eval()
    depth = len(model.view.encoder)
    texts = batch["entailment"]
    full = model.encode(model.see(batch["images"]), texts)[0]
    for image, text in ((-1.0, 1.0), (1.0, -1.0), (1.0, 1.0)):
        mmskip.apply_(model.llm, EarlyExitConfig(image=image, text=text, decoder=None))
        with torch.no_grad(), recording(model) as record:
            states = model.encode(model.see(batch["images"]), texts)[0]
        images, prompts = encoder_exits(record, texts.image)
        assert set(images) == {1 if image < 0 else depth}
        assert set(prompts) == {1 if text < 0 else depth}
        count = full.shape[1] - texts.prompt.shape[1]
        assert torch.equal(states[:, :count], full[:, :count]) == (image > 0)
        assert torch.equal(states[:, count:], full[:, count:]) == (text > 0)
        mmskip.remove_(model.llm)


@pytest.mark.parametrize("settings", [{"image": None, "text": 1.0}, {"encoder": None}])
def test_depths_of_one_sequence_are_those_of_its_row(settings, given, batch):
    model, texts = captioner("bart", given, separate=False).eval(), batch["entailment"]
    for parameter in (*model.llm.parameters(), *model.connector.parameters()):
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    seen = set()
    for threshold in torch.linspace(-0.5, 0.95, 30).tolist():
        at = {key: threshold if value is None else value for key, value in settings.items()}
        mmskip.apply_(model.llm, EarlyExitConfig(decoder=None, **at))
        with torch.no_grad(), recording(model) as record:
            model.encode(model.see(batch["images"]), texts)
            ran = layers_run(model.llm)
        mmskip.remove_(model.llm)
        images, prompts = encoder_exits(record, texts.image)
        assert images == ran.get("image", ran.get("encoder")).tolist()
        assert prompts == ran.get("text", ran.get("encoder")).tolist()
        seen.add(tuple(images) != tuple(images[row] for row in texts.image.tolist()))
    assert True in seen, "taken row by row or image by image, the depths are the same"


@pytest.mark.parametrize("kind", ["bart", "mbart", "florence2"])
def test_a_fixed_depth_is_recorded(kind, given, batch):
    model, texts = captioner(kind, given).eval(), batch["entailment"]
    for settings in ({"decoder": 2}, {"encoder": 1, "decoder": None}, {"decoder": 1, "encoder": 2}):
        exits = {part: None if layer is None else FixedExit(layer) for part, layer in settings.items()}
        mmskip.apply_(model.llm, EarlyExitConfig(**exits))
        with torch.no_grad(), recording(model) as record:
            model.judge(*model.encode(model.see(batch["images"]), texts))
        mmskip.remove_(model.llm)
        encoder = settings.get("encoder", len(model.view.encoder))
        images, prompts = encoder_exits(record, texts.image)
        assert set(images) == set(prompts) == {encoder}
        assert record.decoder[0].unique().tolist() == [settings["decoder"] or len(model.view.decoder)]


def test_the_judgement_is_the_likelihood_of_the_answers(given, batch):
    model = captioner("bart", given).eval()
    texts = batch["entailment"]
    states, mask = model.encode(model.see(batch["images"]), texts)
    judged = model.judge(states, mask).log_softmax(-1)
    for place, ids in enumerate(model.hparams["tokens"]["answers"]):
        labels = torch.tensor(ids).expand(len(states), -1)
        logits = model.llm(
            encoder_outputs=BaseModelOutput(states),
            attention_mask=mask,
            decoder_input_ids=model._shifted(labels),
            use_cache=False,
        ).logits[:, 0]
        others = [other[0] for other in model.hparams["tokens"]["answers"]]
        assert torch.allclose(logits[:, others].log_softmax(-1)[:, place], judged[:, place], atol=1e-5)
    model.hparams["tokens"] = {**model.hparams["tokens"], "answers": [[5, 7, 2], [5, 8, 2], [5, 8, 9]]}
    with pytest.raises(ValueError, match="more than one token"):
        model.judge(states, mask)


def test_a_random_exit_in_training_is_the_encoder_cut_there(given, batch):
    model = captioner("mbart", given)
    texts = batch["entailment"]
    encoder = model.llm.get_encoder()
    depth = torch.tensor([1, 3, 2, 3, 1, 2])
    with exiting(model.view.encoder, depth):
        mixed = encoder(input_ids=texts.prompt, attention_mask=texts.prompt_mask)[0]
    layers = encoder.layers
    for number in (1, 2, 3):
        encoder.layers = layers[:number]
        cut = encoder(input_ids=texts.prompt, attention_mask=texts.prompt_mask)[0]
        assert torch.allclose(mixed[depth == number], cut[depth == number], atol=1e-6)
    encoder.layers = layers
    full = captioner("mbart", given).train().loss_sums(batch)[0]
    torch.manual_seed(1)
    assert captioner("mbart", given, random_exits=1.0).train().loss_sums(batch)[0] != full
    assert captioner("mbart", given, random_exits=1.0).eval().loss_sums(batch)[0] == full


def test_tokens_that_left_at_random_do_not_count_above_their_layer(given, batch, monkeypatch):
    model = captioner("mbart", given, random_token_exits=1.0, layer_loss="sum").train()
    texts, seen = batch["caption"], model.see(batch["images"])
    layers = len(model.view.decoder)
    depth = torch.randint(1, layers + 1, texts.labels.shape, generator=torch.Generator().manual_seed(4))
    monkeypatch.setattr(
        "mmskip.models.captioner.module.draw_layers", lambda share, shape, *_: depth if share == 1 else None
    )
    at, expected = texts.labels != IGNORE, 0.0
    with exiting(model.view.decoder, depth):
        logits, labels = model.layer_logits(*model.encode(seen, texts), texts.labels, list(range(1, layers + 1)))
    for number, of in enumerate(logits, 1):
        counts = depth[at] >= number
        expected += F.cross_entropy(of[counts], labels[counts], reduction="sum").item()
    assert model._losses(seen, texts)[0].item() == pytest.approx(expected, rel=1e-4)
    monkeypatch.undo()
    plain = captioner("mbart", given, layer_loss="sum")
    assert model.eval().loss_sums(batch)[0] == plain.eval().loss_sums(batch)[0]


def test_settled_answers_are_asked_to_stay():
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(4, 8, generator=generator, requires_grad=True) for _ in range(3)]
    labels = torch.tensor([0, 1, 2, 0])
    sure = torch.full((4, 3), -9.0).scatter(1, labels[:, None], 9.0)
    unsure = torch.zeros(4, 3)
    below = torch.where(torch.tensor([True, False, True, False])[:, None], sure, unsure)
    found = saturation_loss(states, [below, sure, sure], labels)
    expected = sum(1 - torch.cosine_similarity(states[1][n], states[0][n], 0) for n in (0, 2))
    expected += (1 - torch.cosine_similarity(states[2], states[1])).sum()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    found.backward()
    assert states[0].grad is None  # a layer learns to stay, not the one before it to be where it will go
    assert not states[1].grad[1].any() and states[1].grad[0].any() and states[2].grad.abs().sum(1).min() > 0
    assert saturation_loss(states, [unsure, unsure, sure], labels).item() == 0
    wrong = torch.full((4, 3), -9.0).scatter(1, (labels[:, None] + 1) % 3, 9.0)
    assert saturation_loss(states, [wrong, wrong, sure], labels).item() == 0


def test_the_settling_loss_is_added_by_its_weight(given, batch, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "mmskip.models.captioner.exit_training.saturation_loss", lambda *a: seen.append(a) or torch.tensor(3.0)
    )
    plain, more = (captioner("mbart", given, settle_weight=weight, caption_weight=0.5) for weight in (0.0, 2.0))
    first, second = plain.loss_sums(batch), more.loss_sums(batch)
    assert second[0].item() == pytest.approx(first[0].item() + 2.0 * 3.0 * (0.5 + 1), rel=1e-5)
    assert torch.equal(second[1:], first[1:]) and len(seen) == 2
    states, logits, labels = seen[0]
    assert len(states) == len(logits) == len(more.view.decoder) and len(states[0]) == len(logits[0]) == len(labels)


def test_layer_weights():
    assert layer_weights("last", 3) == [0, 0, 1]
    assert layer_weights("sum", 3) == [1, 1, 1]
    for name in ("uniform", "linear", "sqrt", "inverse"):
        assert sum(layer_weights(name, 5)) == pytest.approx(1)
    assert layer_weights("linear", 3) == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    assert layer_weights("inverse", 2) == pytest.approx([2 / 3, 1 / 3])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layer_loss": "first"}, "layer_loss"),
        ({"random_exits": 1.5}, "random_exits is 1.5"),
        ({"random_token_exits": -0.1}, "random_token_exits is -0.1"),
        ({"settle_weight": -1.0}, "settle_weight is -1.0"),
        ({"tower": None}, "every other text model needs one"),
        ({"tower": "timm/no_such_net"}, "timm has no model"),
        ({"text": {"model_type": "llama"}}, "no encoder-decoder with text generation"),
        ({"text": {"model_type": "bart", "d_modell": 3}}, "d_model"),
        ({"text": "no/such"}, "not a local folder"),
        ({"num_beams": 0}, "num_beams is 0"),
        ({"schedule": "step"}, "schedule is 'step'"),
    ],
)
def test_bad_settings_are_refused(changed, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Captioner(**({"text": TEXTS["bart"], **TOWER} | changed))


def test_florence_2_needs_no_tower():
    from captioning import florence2

    with pytest.raises(ValueError, match="brings its tower"):
        Captioner(text=florence2(), **TOWER)


def test_the_small_set_has_both_tasks(batch):
    assert len(batch["caption"].uids) == 3
    assert len(batch["entailment"].uids) == 3 * SMALL.pairs
