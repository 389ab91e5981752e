"""What routed decoders refuse, and in which words."""

import io
import pickle

import peft
import pytest
import torch
from mod_cases import example, routed
from tiny_decoders import tiny_decoder
from transformers import DynamicCache, StaticCache

import mmskip


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_fixed_size_caches_are_refused(name):
    model, _ = routed(name)
    ids, layout = example(1)
    with pytest.raises(ValueError, match="DynamicCache"):
        model(ids, layout=layout, past_key_values=StaticCache(config=model.config, max_cache_len=64))


def test_a_cache_filled_by_the_dense_model_is_refused():
    model, base = routed("llama")
    ids, layout = example(1)
    cache = base(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="without mmskip"):
        model(ids, layout=layout, past_key_values=cache)


def test_a_frame_in_two_calls_is_refused():
    model, _ = routed("llama")
    ids, layout = example(1, lead=0)
    cache = DynamicCache(config=model.config)
    model(ids[:, :5], layout=layout[:, :5], past_key_values=cache)
    with pytest.raises(ValueError, match="frame 0 of row 0 continues from an earlier call"):
        model(ids[:, 5:], layout=layout[:, 5:], past_key_values=cache)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (None, "needs a layout"),
        (torch.zeros(1, 3, dtype=torch.long), "one entry per token"),
        (torch.zeros(1, 24), "integer tensor"),
        (torch.full((1, 24), -2), "-1 for text"),
    ],
)
def test_a_wrong_layout_is_refused(layout, message):
    model, _ = routed("llama")
    ids, _ = example(2)
    with pytest.raises(ValueError, match=message):
        model(ids, layout=layout)


@pytest.mark.parametrize("shape", [(1, 40), (2, 24)])
def test_generate_refuses_a_layout_of_another_shape(shape):
    model, _ = routed("llama")
    ids, _ = example(2)
    with pytest.raises(ValueError, match="layout of shape"):
        model.generate(ids, layout=torch.full(shape, -1), max_new_tokens=2)


def test_custom_masks_are_refused():
    model, _ = routed("llama")
    ids, layout = example(2)
    mask = torch.zeros(1, 1, ids.shape[1], ids.shape[1])
    with pytest.raises(ValueError, match="2-D padding mask"):
        model(ids, layout=layout, attention_mask=mask)


def test_block_called_without_its_model_says_so():
    model, _ = routed("llama")
    with pytest.raises(RuntimeError, match=r"block\.1 got no layout"):
        model.model.layers[1](torch.zeros(1, 2, 32))


def test_a_block_that_never_ran_is_reported():
    model, _ = routed("llama")
    model.model.layers[3] = tiny_decoder("llama").model.layers[3]
    ids, layout = example(1)
    with pytest.raises(RuntimeError, match=r"\[3\].*did not run"):
        model(ids, layout=layout)


def test_a_trainer_that_drops_the_layout_column_is_told_of(tmp_path):
    from transformers import Trainer, TrainingArguments

    model, _ = routed("llama")
    ids, layout = example(2)
    rows = [{"input_ids": ids[0], "labels": ids[0], "layout": layout[0]}] * 2
    settings = {"output_dir": str(tmp_path), "max_steps": 1, "report_to": [], "use_cpu": True, "save_strategy": "no"}
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        Trainer(model=model, args=TrainingArguments(**settings), train_dataset=rows).train()
    settings["remove_unused_columns"] = False
    Trainer(model=model, args=TrainingArguments(**settings), train_dataset=rows).train()


@pytest.mark.parametrize("first", ["mmskip", "peft"])
def test_prefix_tuning_is_refused_and_prompt_tuning_told_what_layout_to_pass(first):
    def tuned(config):
        model = tiny_decoder("llama")
        if first == "peft":
            return mmskip.apply_(peft.get_peft_model(model, config), mmskip.MoDConfig(gate="none"))
        return peft.get_peft_model(mmskip.apply_(model, mmskip.MoDConfig(gate="none")), config)

    ids, layout = example(2)
    settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    with pytest.raises(ValueError, match=r"prefix tuning .* use LoRA"):
        tuned(peft.PrefixTuningConfig(**settings))(ids, layout=layout)
    model = tuned(peft.PromptTuningConfig(**settings))
    with pytest.raises(ValueError, match="pad the layout with -1"):
        model(ids, layout=layout)
    padded = torch.nn.functional.pad(layout, (3, 0), value=-1)
    embedded = torch.cat([model.get_prompt(1), model.get_input_embeddings()(ids)], 1)
    expected = model.get_base_model()(inputs_embeds=embedded, layout=padded).logits
    torch.testing.assert_close(model(ids, layout=padded).logits, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dump", [torch.save, pickle.dump])
def test_pickling_a_changed_model_says_what_to_do_instead(dump):
    model, _ = routed("llama")
    with pytest.raises(pickle.PicklingError, match=r"Save model.state_dict\(\) or call mmskip.save"):
        dump(model, io.BytesIO())
    dump(mmskip.remove_(model), io.BytesIO())
