"""VLM tuning: its loss, what it trains, annealing, packing, adapters, resuming."""

import copy
import csv
import json
from pathlib import Path

import pytest
import torch
from chat_data import SMALL, TINY_VLM, chat_data
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText

import mmskip
from mmskip.datasets.chat.module import ChatData
from mmskip.datasets.synthetic.chat import scene_processor
from mmskip.methods.mixture_of_depths import anneal, read_keep
from mmskip.models.common.pretrained import LoRA
from mmskip.models.vlm.build import load_tuned, save_base, save_tuned, token_ids
from mmskip.models.vlm.module import VLM
from mmskip.train.checkpoints import Resume, WholeFileIO

TOKENS = token_ids(scene_processor(SMALL))
LORA = LoRA(r=2, alpha=4, dropout=0.0, target_modules=r".*language_model.*\.(q_proj|down_proj)")
MOD = mmskip.MoDConfig(keep=0.4, gate="tanh")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> ChatData:
    return chat_data(tmp_path_factory.mktemp("chat"), batch_size=4, eval_batch_size=2)


@pytest.fixture(scope="module")
def batch(data) -> dict:
    return data.collate()([data.dataset("train")[index] for index in range(4)])


def build(*methods, seed: int = 0, **kwargs) -> VLM:
    torch.manual_seed(seed)
    model = VLM(TINY_VLM, methods=list(methods), tokens=TOKENS, **kwargs)
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        # zero-initialised routers and adapters would hide what they do
        for name, parameter in model.named_parameters():
            if "mmskip_" in name or "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.eval()


def trainer(folder: Path, *callbacks, **kwargs) -> Trainer:
    return Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=CSVLogger(folder, name="", version=""),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[WholeFileIO()],
        callbacks=[Resume(), *callbacks],
        **({"num_sanity_val_steps": 0, "enable_checkpointing": False, "max_epochs": 2} | kwargs),
    )


def logged(folder: Path, name: str) -> list[float]:
    return [float(row[name]) for row in csv.DictReader((folder / "metrics.csv").open()) if row.get(name)]


# --- loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("methods", [(), (MOD,)], ids=["dense", "mod"])
def test_loss_is_the_cross_entropy_of_the_assistants_words(batch, methods):
    model = build(*methods)
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "uid")}
    logits = model.llm(**inputs).logits
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    loss, labels, right = model.loss_sums(batch)
    torch.testing.assert_close(loss, expected)
    assert labels == (batch["labels"] != -100).sum()
    assert right == (logits[:, :-1].argmax(-1) == batch["labels"][:, 1:]).sum()


def test_an_answer_is_right_when_all_its_words_are(batch, monkeypatch):
    model = build()
    labels = batch["labels"]
    wrong_row, wrong_col = (labels != -100).nonzero()[0].tolist()

    def forward(data, rows, cols):
        logits = F.one_hot(labels[rows, cols + 1], TOKENS["vocab_size"]).float() * 9
        logits[(rows == wrong_row) & (cols + 1 == wrong_col)] = 0
        return logits

    monkeypatch.setattr(model, "forward", forward)
    _, tokens, right, answers, exact = model._score(batch).tolist()
    runs = sum(int(((row[1:] != -100) & (row[:-1] == -100)).sum()) for row in labels)
    assert (right, answers, exact) == (tokens - 1, runs, runs - 1)


@pytest.mark.parametrize("methods", [(), (MOD,)], ids=["dense", "mod"])
def test_a_packed_row_gives_the_loss_of_its_conversations_alone(tmp_path, methods):
    model = build(*methods)
    packed = chat_data(tmp_path, pack=True, max_tokens=220, batch_size=50)
    loader = packed.train_dataloader()
    assert any(len(row) > 1 for row in loader.dataset.rows)
    together = sum(model.loss_sums(b) for b in loader)
    dataset, collate = packed.dataset("val"), packed.collate()
    numbers = [number for row in loader.dataset.rows for number in row]
    dataset.chats, dataset.rows = packed._chats["train"], [[number] for number in numbers]
    alone = sum(model.loss_sums(collate([dataset[index]])) for index in range(len(dataset)))
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("methods", [(), (MOD,)], ids=["dense", "mod"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_batch_is_its_conversations_alone(data, methods, side):
    model = build(*methods)
    dataset, collate = data.dataset("train"), data.collate()
    collate.padding_side = side
    rows = [dataset[index] for index in range(5)]
    alone = sum(model.loss_sums(collate([row])) for row in rows)
    torch.testing.assert_close(model.loss_sums(collate(rows)), alone, rtol=1e-5, atol=1e-4)


# --- what is trained --------------------------------------------------------------------------------------------------


def gradients(model: VLM, batch: dict) -> dict[str, torch.Tensor]:
    model.train().zero_grad()
    model.loss_sums(batch)[0].backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("trainable", "kinds"),
    [("all", {"mmskip_", "vision", "lm_head"}), ("router", {"mmskip_"}), ("router+lora", {"mmskip_", "lora_"})],
)
def test_what_is_named_learns_and_nothing_else(batch, trainable, kinds):
    model = build(MOD, trainable=trainable, lora=LORA if "lora" in trainable else None)
    found = gradients(model, batch)
    for kind in kinds:
        assert any(kind in name and bool(gradient.any()) for name, gradient in found.items()), kind
    if trainable != "all":
        assert all(any(kind in name for kind in kinds) for name in found)


def test_lora_alone_trains_a_dense_model_and_one_with_a_random_router(batch):
    for methods in ((), (mmskip.MoDConfig(keep=0.5, router="random"),)):
        found = gradients(build(*methods, trainable="lora", lora=LORA), batch)
        assert found
        assert all("lora_" in name for name in found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trainable": "routers"}, "did you mean router"),
        ({"trainable": "router"}, "methods is empty"),
        ({"trainable": "lora"}, "need the settings of lora"),
        ({"trainable": "all", "lora": LORA}, "go without"),
        ({"trainable": "router", "methods": [mmskip.MoDConfig(router="random")]}, "router that learns"),
        ({"trainable": "lora", "lora": LORA, "methods": [MOD]}, "does not train the routers"),
        ({"trainable": "router", "methods": [MOD], "export": "x"}, "export"),
        ({"methods": [mmskip.MoDConfig(layers=[0, 1])]}, "block 0"),
        ({"anneal_steps": -1}, "anneal_steps"),
        ({"router_lr": 0.0}, "router_lr"),
        ({"schedule": "steps"}, "schedule"),
        ({"dtype": "int8"}, "int8"),
        ({"vlm": "no/such-model"}, "'no/such-model'"),
        ({"vlm": {"model_type": "llama"}}, "expected a VLM"),
        ({"vlm": {"model_type": "lava"}}, "'lava'"),
        ({"vlm": TINY_VLM | {"text_confg": {}}}, "text_config"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_built(arguments, message):
    with pytest.raises(ValueError, match=message):
        VLM(**({"vlm": TINY_VLM} | arguments))


def test_routers_have_their_own_learning_rate_and_no_decay(data, tmp_path):
    seen = {}

    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            for group in trainer.optimizers[0].param_groups:
                seen[group["name"]] = (group["initial_lr"], group["weight_decay"])

    model = VLM(TINY_VLM, [MOD], lr=1e-3, router_lr=0.05, weight_decay=0.1)
    trainer(tmp_path, Look(), max_epochs=1).fit(model, data)
    assert seen == {"decayed": (1e-3, 0.1), "plain": (1e-3, 0.0), "routers": (0.05, 0.0)}


def test_gradient_checkpointing_gives_the_same_gradients(batch):
    plain = gradients(build(MOD, trainable="router+lora", lora=LORA), batch)
    saving = gradients(build(MOD, trainable="router+lora", lora=LORA, gradient_checkpointing=True), batch)
    assert plain.keys() == saving.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(saving[name], gradient, msg=name)


def test_bfloat16_weights_keep_their_adapters_and_routers_in_fp32(batch):
    model = build(MOD, trainable="router+lora", lora=LORA, dtype="bfloat16").train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss_sums(batch)[0]
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.llm.named_parameters():
        added = "lora_" in name or "mmskip_" in name
        assert parameter.dtype == (torch.float32 if added else torch.bfloat16), name


# --- annealing --------------------------------------------------------------------------------------------------------


def test_annealing_goes_from_the_base_model_to_the_configs_keep(batch):
    model, base = build(MOD), build()
    with torch.no_grad():
        model.llm.load_state_dict(base.llm.state_dict(), strict=False)
        for name, parameter in model.named_parameters():
            if "mmskip_" in name:
                parameter.zero_()
        expected = base.loss_sums(batch)
        kept = []
        for progress in (0.0, 0.5, 1.0):
            anneal(model.llm, progress)
            kept.append(read_keep(model.llm))
            with mmskip.trace(model.llm) as trace:
                loss = model.loss_sums(batch)
            assert torch.equal(loss, expected) == (progress == 0)
        assert kept == pytest.approx([1.0, 0.7, 0.4])
        assert mmskip.applied(model.llm) == [MOD]
        assert trace.ran < trace.tokens
    with pytest.raises(ValueError, match="progress"):
        anneal(model.llm, 1.5)


def test_a_copy_is_annealed_on_its_own():
    model = build(MOD).llm
    other = copy.deepcopy(model)
    anneal(other, 0.0)
    assert (read_keep(model), read_keep(other)) == (0.4, 1.0)


def test_keep_follows_the_optimizer_steps_and_a_resumed_run_goes_on(data, tmp_path):
    """12 conversations in batches of 2, two micro-batches a step: 3 steps an epoch."""

    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.current_epoch == 1 and batch_idx == 3:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")
                raise KeyboardInterrupt

    def fit(folder, *callbacks, ckpt=None):
        seed_everything(1)
        runner = trainer(folder, *callbacks, accumulate_grad_batches=2, max_epochs=3)
        small = chat_data(tmp_path / "data", batch_size=2, eval_batch_size=4)
        model = VLM(TINY_VLM, [MOD], lr=1e-2, anneal_steps=6)
        runner.fit(model, small, ckpt_path=ckpt)
        return model, runner

    straight, runner = fit(tmp_path / "whole")
    keeps = logged(tmp_path / "whole", "train/keep")
    assert keeps == pytest.approx([1 - 0.6 * min(step / 6, 1) for step in range(9)])
    assert logged(tmp_path / "whole", "val/keep") == pytest.approx([0.7, 0.4, 0.4])
    with pytest.raises(SystemExit):
        fit(tmp_path / "half", Stop())
    resumed, _ = fit(tmp_path / "half2", ckpt=tmp_path / "middle.ckpt")
    assert logged(tmp_path / "half2", "train/keep") == pytest.approx(keeps[5:])
    for (name, one), other in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, msg=name)
    # after training, the config's ratio
    anneal(straight.llm, 0.0)
    runner.validate(straight, chat_data(tmp_path / "data", eval_batch_size=4), verbose=False)
    assert straight.results["keep"] == 0.4


def test_an_annealing_that_would_not_end_is_refused(data, tmp_path):
    with pytest.raises(ValueError, match="anneal_steps is 50"):
        trainer(tmp_path).fit(VLM(TINY_VLM, [MOD], anneal_steps=50), data)


def test_router_tuning_starts_exactly_at_the_loss_of_the_base_model(data, tmp_path):
    torch.manual_seed(0)
    base = VLM(TINY_VLM, tokens=TOKENS)
    save_base(base.llm, tmp_path / "base", data.processor)
    results = {}
    for name, model in {
        "dense": VLM(str(tmp_path / "base")),
        "router": VLM(str(tmp_path / "base"), [MOD], trainable="router", anneal_steps=3, lr=0.1),
        "both": VLM(str(tmp_path / "base"), [MOD], LORA, "router+lora", anneal_steps=3, lr=0.1),
    }.items():
        seed_everything(0)
        trainer(tmp_path / name, max_epochs=2).fit(model, data)
        results[name] = logged(tmp_path / name, "train/loss")
    assert results["router"][0] == results["both"][0] == results["dense"][0]
    assert results["router"][-1] != results["dense"][-1]


@pytest.mark.parametrize("router", ["linear", "mlp"])
def test_routers_are_fitted_before_the_first_step_and_not_again_when_a_run_goes_on(data, tmp_path, router):
    torch.manual_seed(0)
    save_base(VLM(TINY_VLM, tokens=TOKENS).llm, tmp_path / "base", data.processor)
    own, settings = (
        mmskip.MoDConfig(keep=0.4, router=router, gate="separate"),
        {"trainable": "router", "anneal_steps": 3, "lr": 0.1},
    )

    def fit(name, model, ckpt=None, epochs=1):
        seed_everything(0)
        runner = trainer(tmp_path / name, max_epochs=epochs)
        runner.fit(model, data, ckpt_path=ckpt)
        runner.save_checkpoint(tmp_path / f"{name}.ckpt")
        return {key: value for key, value in model.state_dict().items() if key.endswith("mmskip_router.weight")}

    fit("dense", VLM(str(tmp_path / "base")))
    random = fit("random", VLM(str(tmp_path / "base"), [own], **settings))
    fitted = fit("fitted", VLM(str(tmp_path / "base"), [own], router_fit=2, **settings))
    assert logged(tmp_path / "fitted", "train/loss")[0] == logged(tmp_path / "dense", "train/loss")[0]
    assert fitted and not any(torch.equal(fitted[key], random[key]) for key in fitted)
    saved = torch.load(tmp_path / "fitted.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[key], value) for key, value in fitted.items()), "they get no gradient, but are kept"
    more = fit("more", VLM(str(tmp_path / "base"), [own], router_fit=1, **settings), tmp_path / "fitted.ckpt", 2)
    assert all(torch.equal(more[key], value) for key, value in fitted.items())


# --- saving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["lora first", "methods first"])
def test_adapters_come_back_on_the_base_model_in_either_order(data, batch, tmp_path, order):
    torch.manual_seed(0)
    save_base(VLM(TINY_VLM, tokens=TOKENS).llm, tmp_path / "base", data.processor)
    tuned = VLM(str(tmp_path / "base"), [MOD], LORA, "router+lora")
    tuned.configure_model()
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    folders = save_tuned(tuned.llm, tmp_path / "adapter")
    assert {folder.name for folder in folders} == {"mmskip", "lora"}
    size = sum(path.stat().st_size for path in (tmp_path / "adapter").rglob("*.safetensors"))
    assert size < 0.2 * sum(path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors"))
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    if order == "lora first":
        load_tuned(again, tmp_path / "adapter")
    else:
        mmskip.load_(again, tmp_path / "adapter/mmskip")
        again.load_adapter(str(tmp_path / "adapter/lora"))
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "uid")}
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(**inputs).logits, tuned.llm.eval()(**inputs).logits)


def test_a_trained_base_model_is_a_plain_one_of_transformers(data, batch, tmp_path):
    model = build(MOD)
    (_, folder) = save_tuned(model.llm, tmp_path, data.processor)
    (tmp_path / "model/old").touch()
    save_base(model.llm, folder, data.processor)  # again, over itself
    plain, loading = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(loading["missing_keys"]) and not any(loading["unexpected_keys"])
    mmskip.load_(plain, tmp_path / "mmskip")
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "uid")}
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(**inputs).logits, model.llm(**inputs).logits)


def test_a_folder_without_adapters_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no folder"):
        load_tuned(build().llm, tmp_path)


def test_the_checkpoint_of_a_named_model_holds_only_what_is_trained(data, tmp_path):
    save_base(build().llm, tmp_path / "base", data.processor)
    model = VLM(str(tmp_path / "base"), [MOD], LORA, "router+lora")
    runner = trainer(tmp_path / "run", max_epochs=1)
    runner.fit(model, data)
    runner.save_checkpoint(tmp_path / "x.ckpt")
    state = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
    assert all("mmskip_" in name or "lora_" in name for name in state)
    assert {path.name for path in (tmp_path / "run/adapter").iterdir()} == {"mmskip", "lora"}
    other = VLM(str(tmp_path / "base"), [MOD], trainable="router")
    with pytest.raises(ValueError, match="trained with"):
        trainer(tmp_path / "other").validate(other, data, ckpt_path=tmp_path / "x.ckpt")


def test_predictions_are_the_greedy_answers_of_the_model(data, tmp_path):
    model = build(MOD, max_new_tokens=3)
    (found,) = trainer(tmp_path).predict(model, data)
    assert [uid for uid, _ in found] == ["test-00000", "test-00001"]
    for index, (_, ids) in enumerate(found):
        (row,) = [data.dataset("test", prompt=True)[index]]
        prompt = data.collate()([row])
        inputs = {key: value for key, value in prompt.items() if key not in ("labels", "uid")}
        said = []
        for _ in range(3):
            with torch.no_grad():
                token = int(model.llm(**inputs).logits[0, -1].argmax())
            said.append(token)
            if token == TOKENS["eos_token_id"]:
                break
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[token]])], 1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        assert ids[: len(said)] == said


def test_hyper_parameters_are_plain_json(data):
    model = build(MOD, trainable="router+lora", lora=LORA)
    assert json.loads(json.dumps(dict(model.hparams)))["lora"]["r"] == 2
