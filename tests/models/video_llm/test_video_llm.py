"""VideoLLM: its loss, its metrics, its streaming, its checkpoints."""

import copy

import pytest
import torch
from narration_data import FEATURES, FPS, LLAMA, TOKENS, TinyData, batch, sample, stream_tokens, text_only, token_ids
from torch.nn import functional as F
from transformers import AutoConfig

import mmskip
from mmskip.datasets.narration.turns import collate_narration
from mmskip.models.common.pretrained import LoRA
from mmskip.models.video_llm.module import VideoLLM
from mmskip.models.video_llm.scoring import score_turns
from mmskip.models.video_llm.speaking import split_rows

MOD = mmskip.MoDConfig(keep=0.4, gate="sigmoid")


def build(methods=(), seed: int = 0, **kwargs) -> VideoLLM:
    torch.manual_seed(seed)
    kwargs = {"llm": LLAMA, "feature_dim": FEATURES, "fps": FPS, "tokens": token_ids().to_dict()} | kwargs
    model = VideoLLM(methods=list(methods), **kwargs)
    with torch.no_grad():
        # initial weights are small, and routers even zero: larger ones make outputs differ from token to token
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("mmskip" in name or parameter.ndim > 1):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def gradients(model: VideoLLM, data) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.loss_sums(data)[0].backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.parametrize("methods", [(), (MOD,)])
def test_loss_is_the_shifted_cross_entropy_with_weighted_stream_labels(methods):
    model = build(methods, stream_weight=3.0)
    data = batch([2, 3])
    layout = {"layout": data["layout"]} if methods else {}
    embeds = model.embed(data["input_ids"], data["layout"], data["features"])
    logits = model.llm(inputs_embeds=embeds, **layout).logits[0]
    expected, lm, stream = 0.0, 0, 0
    for t in range(1, len(logits)):
        label = data["labels"][0, t]
        if label == -100:
            continue
        decides = bool(data["layout"][0, t - 1] >= 0)
        expected += (3.0 if decides else 1.0) * F.cross_entropy(logits[t - 1], label)
        lm, stream = lm + (not decides), stream + decides
    sums = model.loss_sums(data)
    torch.testing.assert_close(sums[0], expected)
    assert (int(sums[3]), int(sums[4])) == (lm, stream)
    assert stream == 5  # one decision per frame of the turns, none for the first frame


def test_vision_positions_carry_the_connected_features_in_order():
    model = build()
    data = batch([1], [2, 1])
    embeds = model.embed(data["input_ids"], data["layout"], data["features"])
    expected = model.connector(data["features"]).flatten(0, 1)
    torch.testing.assert_close(embeds[data["layout"] >= 0], expected)
    text = (data["layout"] < 0) & (data["attention_mask"] == 1)
    torch.testing.assert_close(embeds[text], model.llm.get_input_embeddings()(data["input_ids"][text]))


@pytest.mark.parametrize("methods", [(), (MOD,)])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_batch_is_its_samples_one_by_one(methods, side):
    model = build(methods)
    lengths = ([2, 3], [1, 1, 4], [5])
    alone = [model.loss_sums(collate_narration([sample(part, i)], 0)) for i, part in enumerate(lengths)]
    torch.testing.assert_close(model.loss_sums(batch(*lengths, padding_side=side)), sum(alone), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("methods", [(), (MOD,)])
def test_a_batch_without_frames_leaves_zero_gradients_not_none(methods):
    model = build(methods).train()
    found = gradients(model, collate_narration([text_only()], 0))
    new = [name for name, _ in model.named_parameters() if "connector" in name or "mmskip" in name]
    assert len(new) == 4 + len(methods)
    for name in new:
        assert not found[name].any()


def test_the_head_sees_labelled_positions_only():
    model = build()
    data = batch([2, 3], [4])
    seen = []
    model.llm.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape[:-1].numel()))
    model.loss_sums(data)
    assert seen == [int((data["labels"] != -100).sum())]


def test_gradient_checkpointing_gives_the_same_gradients():
    plain, saving = build((MOD,)).train(), build((MOD,), gradient_checkpointing=True).train()
    saving.load_state_dict(plain.state_dict())
    data = batch([2, 3], [4])
    for name, gradient in gradients(plain, data).items():
        torch.testing.assert_close(gradients(saving, data)[name], gradient)


def test_lora_trains_adapters_connector_and_router_and_nothing_else():
    model = build((MOD,), lora=LoRA(r=2, alpha=4, dropout=0.0, target_modules=["q_proj", "down_proj", "lm_head"]))
    found = gradients(model.train(), batch([2, 3], [4]))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == set(found)
    assert all("lora_" in name or "connector" in name or "mmskip_router" in name for name in trained)
    assert sum("mmskip_router" in name for name in trained) == 1
    assert sum("lm_head" in name for name in trained) == 2
    assert all(gradient.any() for gradient in found.values())


def test_bfloat16_weights_with_fp32_adapters_train_under_autocast():
    model = build((MOD,), llm_dtype="bfloat16", lora=LoRA(r=2, alpha=4, dropout=0.0, target_modules=["q_proj"]))
    assert model.llm.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.train().loss_sums(batch([2, 3]))[0]
    loss.backward()
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    assert adapters
    assert all(p.dtype == torch.float32 and p.grad is not None for p in adapters)
    assert loss.isfinite()


# --- narration metrics of a model ---------------------------------------------------------------------------------


@pytest.mark.parametrize("methods", [(), (MOD,)])
def test_scores_do_not_depend_on_the_batch(methods):
    model = build(methods)
    lengths = ([2, 3], [1, 1, 4], [5, 6])
    together = score_turns(model, batch(*lengths))
    for index, part in enumerate(lengths):
        (alone,) = score_turns(model, collate_narration([sample(part, index)], 0))
        for one, other in zip(together[index], alone, strict=True):
            assert one.nll == pytest.approx(other.nll, rel=1e-4)
            assert (one.correct, one.frame_diff) == (other.correct, other.frame_diff)


def silence(model: VideoLLM, speaks_at: set[tuple[int, int]]) -> VideoLLM:
    """Make the model decide by frame: it speaks where (tokens of the sequence so far, frame) says so."""
    ids = model.ids

    def forward(data, rows, cols):
        logits = torch.zeros(len(rows), ids.vocab_size)
        for i, (row, col) in enumerate(zip(rows.tolist(), cols.tolist(), strict=True)):
            frame = int(data["layout"][row, col])
            texts = int((data["input_ids"][row, : col + 1] == ids.eos).sum())
            logits[i, ids.speak if (texts, frame) in speaks_at else ids.silent] = 5.0
        return logits

    model.forward = forward
    return model


@pytest.mark.parametrize(
    ("speaks_at", "expected"),
    [
        ({(0, 2), (1, 5)}, [0, 0]),  # turns are frames 1-2 and 3-5
        ({(0, 1), (1, 4)}, [1, 1]),
        ({(0, 3), (1, 5)}, [-1, 0]),  # in frame 3 as if nobody had spoken after frame 2
        ({(0, 4)}, [-1, 0]),  # one further frame is shown, for the turn has two; and the last turn is never late
        ({(1, 3)}, [-1, 2]),  # having spoken or not makes the difference
    ],
)
def test_late_turns_are_shown_further_frames_as_if_nobody_had_spoken(speaks_at, expected):
    model = silence(build(), speaks_at)
    (scores,) = score_turns(model, batch([2, 3]))
    assert [score.frame_diff for score in scores] == expected


def test_further_frames_follow_the_turn_as_a_silent_stream(monkeypatch):
    """The sequence shown for a late turn is the stream up to it, `,` and the next frames; nothing of the narration."""
    model, data = silence(build(), set()), sample([3, 4])
    shown, decide = [], model.forward
    monkeypatch.setattr(model, "forward", lambda *args: shown.append(args[0]) or decide(*args))
    score_turns(model, collate_narration([data], 0))
    _, longer = shown
    text = longer["input_ids"][longer["layout"] < 0].tolist()
    assert text == [stream_tokens().bos, *model.ids.open, *[model.ids.silent] * 6]
    frames, counts = longer["layout"][longer["layout"] >= 0].unique(return_counts=True)
    assert (frames.tolist(), counts.tolist()) == ([0, 1, 2, 3, 4, 5], [TOKENS] * 6)  # three frames and two more
    assert torch.equal(longer["features"], data["features"][:6])


# --- streaming ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("methods", [(), (MOD,)])
@pytest.mark.parametrize("threshold", [0.0, 0.725])
def test_narration_equals_recomputing_the_whole_stream_at_every_token(methods, threshold):
    model = build(methods, seed=3, max_new_tokens=6)
    data = sample([2, 3])
    said = model.narrate(data, threshold)
    assert said

    ids, features = model.ids, data["features"]
    tokens = [stream_tokens().bos, *ids.open]
    layout = [-1] * len(tokens)

    @torch.no_grad()
    def last_logits() -> torch.Tensor:
        row, frames = torch.tensor([tokens]), torch.tensor([layout])
        shown = features[: max(layout) + 1]
        extra = {"layout": frames} if methods else {}
        return model.llm(inputs_embeds=model.embed(row, frames, shown), **extra).logits[0, -1]

    def write(text):
        tokens.extend(text)
        layout.extend([-1] * len(text))

    expected = []
    for frame in range(len(features)):
        tokens.extend([0] * TOKENS)
        layout.extend([frame] * TOKENS)
        probability = last_logits().softmax(-1)
        if probability[ids.silent] < threshold:
            probability[ids.silent] = 0
        if frame == 0 or int(probability.argmax()) == ids.silent:
            write([ids.silent])
            continue
        write([ids.speak, *ids.assistant])
        words = []
        while (token := int(last_logits().argmax())) != ids.eos and len(words) < 6:
            words.append(token)
            write([token])
        write([ids.eos, *ids.open])
        expected.append((frame, tuple(words)))
    assert [tuple(utterance) for utterance in said] == expected


def test_a_model_that_speaks_at_once_may_narrate_at_every_frame_but_the_first():
    model = build()
    said = model.narrate(sample([4]), threshold=1.0)
    assert [utterance.frame for utterance in said] == [1, 2, 3, 4]


def test_split_rows_undoes_collation():
    originals = [sample([2, 3], 0), sample([1], 1), sample([4], 2)]
    for side in ("right", "left"):
        for original, row in zip(originals, split_rows(collate_narration(originals, 0, side)), strict=True):
            assert row["turns"] == original["turns"]
            assert row["uid"] == original["uid"]
            for key in ("input_ids", "labels", "layout", "features"):
                assert torch.equal(row[key], original[key])


# --- building and checkpoints ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"llm": {"model_type": "lama"}}, "model_type='lama'.*llama"),
        ({"llm": {**LLAMA, "hiden_size": 8}}, "hiden_size.*hidden_size"),
        ({"stream_weight": -1.0}, "stream_weight is -1"),
        ({"lr": 0.0}, "lr is 0"),
        ({"warmup": 1.0}, "warmup is 1"),
        ({"schedule": "cosin"}, "'cosin'.*cosine"),
        ({"llm_dtype": "int8"}, "llm_dtype.*float32"),
        ({"feature_dim": None}, "feature_dim and tokens"),
        ({"methods": [{"class_path": "mmskip.ModConfig"}]}, "ModConfig.*MoDConfig"),
        ({"methods": [{"class_path": "mmskip.MoDConfig", "init_args": {"keep": 2.0}}]}, "keep is 2"),
        ({"methods": [mmskip.MoDConfig(layers=(1, 9))]}, "9"),
        ({"residual_init": -0.5}, "residual_init is -0.5"),
        ({"llm": {"model_type": "opt"}, "residual_init": 0.0}, "OPTForCausalLM has other names"),
    ],
)
def test_bad_settings_are_refused(kwargs, message):
    settings = {"llm": LLAMA, "feature_dim": FEATURES, "tokens": token_ids().to_dict()} | kwargs
    with pytest.raises(ValueError, match=message):
        VideoLLM(**settings).configure_model()


def test_a_name_that_cannot_be_had_is_refused_before_anything_is_built(monkeypatch):
    def offline(name):
        raise OSError("We couldn't connect\nand more")

    monkeypatch.setattr(AutoConfig, "from_pretrained", offline)
    with pytest.raises(ValueError, match=r"llm='no/such-model' is not a local folder.*We couldn't connect"):
        VideoLLM("no/such-model")


def test_a_local_folder_serves_as_llm_and_keeps_its_vocabulary(tmp_path):
    source = build()
    source.llm.save_pretrained(tmp_path / "llm")
    model = VideoLLM(str(tmp_path / "llm"), feature_dim=FEATURES, tokens=token_ids().to_dict())
    assert torch.equal(model.llm.lm_head.weight, source.llm.lm_head.weight)
    assert model.llm.lm_head.out_features == token_ids().vocab_size


def test_padding_and_vision_tokens_need_no_rows_of_a_pretrained_vocabulary():
    model = build()
    data = batch([2], [1, 3])
    expected = model.loss_sums(data)
    far = copy.copy(data)
    far["input_ids"] = data["input_ids"].masked_fill(data["attention_mask"] == 0, 10**6)
    far["input_ids"] = far["input_ids"].masked_fill(data["layout"] >= 0, 10**6 + 1)
    assert torch.equal(model.loss_sums(far), expected)


def test_initial_weights_do_not_depend_on_what_ran_before_nor_on_the_methods():
    torch.manual_seed(5)
    first = VideoLLM(LLAMA, tokens=token_ids().to_dict())
    torch.manual_seed(5)
    second = VideoLLM(LLAMA, methods=[MOD], tokens=token_ids().to_dict())
    torch.rand(3)
    for model in (first, second):
        model.hparams["feature_dim"] = FEATURES
        model.configure_model()
    own = first.state_dict()
    for name, value in second.state_dict().items():
        assert "mmskip_router" in name or torch.equal(own[name], value)


def test_blocks_may_start_as_the_identity():
    torch.manual_seed(5)
    model = VideoLLM(LLAMA, residual_init=0.0, feature_dim=FEATURES, tokens=token_ids().to_dict())
    embeds = torch.randn(1, 4, LLAMA["hidden_size"])
    out = model.llm.model(inputs_embeds=embeds, output_hidden_states=True)
    assert all(torch.equal(hidden, embeds) for hidden in out.hidden_states[:-1])
    batch = collate_narration([sample([2, 3])], 0)
    model.loss_sums(batch)[0].backward()
    assert all(block.self_attn.o_proj.weight.grad.any() for block in model.llm.model.layers), "and learn from there"


def test_pretrained_weights_are_not_scaled(tmp_path):
    VideoLLM(LLAMA, feature_dim=FEATURES, tokens=token_ids().to_dict()).llm.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"residual_init=0\.0 would spoil the pretrained weights"):
        VideoLLM(str(tmp_path), residual_init=0.0)


def test_checkpoint_loads_by_itself_weights_only(tmp_path):
    from lightning.pytorch import Trainer

    model = VideoLLM(LLAMA, methods=[MOD], lora=LoRA(r=2, alpha=2, dropout=0.0, target_modules=["q_proj"]))
    trainer = Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, num_sanity_val_steps=0, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(model, datamodule=TinyData())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    loaded = VideoLLM.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert mmskip.applied(loaded.llm) == [MOD]
    assert torch.equal(loaded.loss_sums(batch([2, 3])), model.loss_sums(batch([2, 3])))


def test_checkpoint_of_another_method_is_refused_naming_both():
    saved, other = build((MOD,)), build((mmskip.MoDConfig(keep=0.8),))
    checkpoint = {"hyper_parameters": dict(saved.hparams), "state_dict": saved.state_dict()}
    with pytest.raises(ValueError, match=r"methods=.*0\.4.*methods=.*0\.8"):
        other.on_load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("key", "value"),
    [("fps", FPS + 1), ("feature_dim", FEATURES + 2), ("tokens", {**token_ids().to_dict(), "speak": 1})],
)
def test_checkpoint_of_other_data_is_refused(key, value):
    saved = build()
    checkpoint = {"hyper_parameters": dict(saved.hparams), "state_dict": saved.state_dict()}
    with pytest.raises(ValueError, match=f"trained with {key}=.*this model has {key}="):
        build(**{key: value}).on_load_checkpoint(checkpoint)
    build(fps=None).on_load_checkpoint(checkpoint)  # to be taken from a data module


def test_checkpoint_of_a_named_model_leaves_out_its_frozen_weights(tmp_path):
    build().llm.save_pretrained(tmp_path / "llm")
    model = build(llm=str(tmp_path / "llm"), lora=LoRA(r=2, alpha=2, target_modules=["q_proj"]))
    checkpoint = {"hyper_parameters": dict(model.hparams), "state_dict": dict(model.state_dict())}
    model.on_save_checkpoint(checkpoint)
    assert all("lora_" in name or "connector" in name for name in checkpoint["state_dict"])
    again = VideoLLM(**{**model.hparams, "lora": LoRA(**model.hparams["lora"])})
    again.on_load_checkpoint(checkpoint)
    again.load_state_dict(checkpoint["state_dict"])
    assert torch.equal(again.eval().loss_sums(batch([2])), model.eval().loss_sums(batch([2])))


@pytest.mark.parametrize(
    ("llm", "message"),
    [
        ({"model_type": "llama", "num_hidden_layers": 2}, "layers holds 9; the model has 2 blocks"),
        ({"model_type": "falcon"}, "no family fits"),
    ],
)
def test_a_method_that_does_not_fit_is_refused_before_any_work(llm, message):
    with pytest.raises(ValueError, match=message):
        VideoLLM(llm, methods=[mmskip.MoDConfig(layers=(9,))])
