"""VLM tuning of a model with grid positions (Qwen2.5-VL): another processor, another layout, no packing."""

import json

import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

import mmskip
from mmskip.datasets.chat.module import ChatData
from mmskip.datasets.video.reader import write_video
from mmskip.models.vlm.module import VLM

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
WORDS = ["<pad>", "<unk>", *SPECIAL, "user", "assistant", "what", "colour", "red", "green", "?", "is", "it"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}"
    "<|vision_start|><|{{ part['type'] }}_pad|><|vision_end|>{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TINY_QWEN = {
    "model_type": "qwen2_5_vl",
    "vision_start_token_id": WORDS.index("<|vision_start|>"),
    "vision_end_token_id": WORDS.index("<|vision_end|>"),
    "text_config": {
        "model_type": "qwen2_5_vl_text",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    },
    "vision_config": {
        "model_type": "qwen2_5_vl",
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
        "patch_size": 14,
    },
}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Four conversations about pictures of two sizes and a clip, and a processor of Qwen2.5-VL."""
    folder = tmp_path_factory.mktemp("qwen")
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), behavior="removed", invert=True)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="<|im_end|>", chat_template=TEMPLATE
    )
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    sizes = {"min_pixels": 28 * 28, "max_pixels": 56 * 56}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**sizes), tokenizer, Qwen2VLVideoProcessor(**sizes), chat_template=TEMPLATE
    )
    processor.save_pretrained(folder / "processor")
    records = []
    for index, (colour, size) in enumerate([("red", (56, 56)), ("green", (28, 84)), ("red", (84, 28))]):
        Image.new("RGB", size, colour).save(folder / f"{index}.png")
        question = [{"type": "image", "path": f"{index}.png"}, {"type": "text", "text": "what colour is it?"}]
        answer = {"role": "assistant", "content": [{"type": "text", "text": colour}]}
        records.append({"messages": [{"role": "user", "content": question}, answer]})
    frames = torch.zeros(8, 56, 56, 3, dtype=torch.uint8).numpy()
    write_video(folder / "clip.mp4", frames, 4)
    clip = {"video": "clip.mp4", "conversations": [{"from": "human", "value": "<video>what is it?"}]}
    clip["conversations"].append({"from": "gpt", "value": "it is green"})
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, [*records, clip])))
    return {
        "root": str(folder),
        "files": {"train": str(folder / "train.jsonl")},
        "processor": str(folder / "processor"),
    }


def built(arguments, **kwargs) -> tuple[VLM, ChatData]:
    data = ChatData(**arguments, fps=4.0, batch_size=4, **kwargs)
    data.prepare_data()
    torch.manual_seed(0)
    model = VLM(TINY_QWEN, [mmskip.MoDConfig(keep=0.5, gate="sigmoid")])
    model._trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    model._trainer.datamodule = data
    model.configure_model()
    return model, data


def test_pictures_clips_and_sizes_in_one_batch_are_their_conversations_alone(arguments):
    model, data = built(arguments)
    model.eval()
    rows = list(data.dataset("train"))
    collate = data.collate()
    batch = collate(rows)
    words = [data.processor.tokenizer.decode(row[row != -100]) for row in batch["labels"]]
    expected = ["red", "green", "red", "it is green"]
    assert [text.split() for text in words] == [[*answer.split(), "<|im_end|>"] for answer in expected]
    alone = sum(model.loss_sums(collate([row])) for row in rows)
    torch.testing.assert_close(model.loss_sums(batch), alone, rtol=1e-5, atol=1e-4)
    with mmskip.trace(model.llm) as trace:
        model.loss_sums(batch)
    assert trace.ran < trace.tokens


def test_packing_is_refused_for_grid_positions(arguments):
    with pytest.raises(ValueError, match="M-RoPE"):
        built(arguments, pack=True, max_tokens=100)
