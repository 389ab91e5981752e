"""The real processors of transformers at tiny sizes, with a word-level tokenizer of the ids of `tiny_vlms`."""

from typing import Any

import numpy as np
import transformers
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.smolvlm import processing_smolvlm
from vlm_configs import BREAK, END, IMAGE, START, VIDEO

_QWEN = {"<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO, "<|vision_start|>": START, "<|vision_end|>": END}
_LLAVA = {"<image>": IMAGE, "<video>": VIDEO}
_PINPOINTS = [[16, 32], [32, 16], [32, 32]]
_SQUARE = {"size": {"height": 16, "width": 16}}
_CLIP = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
_PIXELS = {"size": {"shortest_edge": 64, "longest_edge": 4096}, "patch_size": 4}

# per VLM: special tokens and their ids, attributes of the tokenizer, class of the processor, its own settings, those of
# its image and video processors, and what stands for an image and a video in a prompt
PROCESSORS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        "specials": _QWEN,
        "processor": ("Qwen2VL", {}),
        "image": ("Qwen2VLImageProcessor", _PIXELS),
        "video": ("Qwen2VLVideoProcessor", _PIXELS),
        "prompt": ("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"),
    },
    "qwen2_5_vl": {
        "specials": _QWEN,
        "processor": ("Qwen2_5_VL", {}),
        "image": ("Qwen2VLImageProcessor", _PIXELS),
        "video": ("Qwen2VLVideoProcessor", _PIXELS),
        "prompt": ("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"),
    },
    "qwen3_vl": {
        "specials": _QWEN,
        "processor": ("Qwen3VL", {}),
        "image": ("Qwen2VLImageProcessor", _PIXELS),
        "video": ("Qwen3VLVideoProcessor", {**_PIXELS, "do_sample_frames": False}),
        "prompt": ("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"),
    },
    "video_llama_3": {
        "specials": _QWEN,
        "processor": ("VideoLlama3", {}),
        "image": ("VideoLlama3ImageProcessor", {**_PIXELS, "merge_size": 1}),
        "video": ("VideoLlama3VideoProcessor", _PIXELS),
        "prompt": ("<|image_pad|>", "<|video_pad|>"),
    },
    "llava_onevision": {
        "specials": _LLAVA,
        "processor": ("LlavaOnevision", {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}),
        "image": ("LlavaOnevisionImageProcessor", {**_SQUARE, "image_grid_pinpoints": _PINPOINTS}),
        "video": ("LlavaOnevisionVideoProcessor", _SQUARE),
        "prompt": ("<image>", "<video>"),
    },
    "llava_next_video": {
        "specials": _LLAVA,
        "processor": (
            "LlavaNextVideo",
            {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        ),
        "image": ("LlavaNextImageProcessor", {**_CLIP, "image_grid_pinpoints": _PINPOINTS}),
        "video": ("LlavaNextVideoVideoProcessor", _CLIP),
        "prompt": ("<image>", "<video>"),
    },
    "internvl": {
        "specials": {"<IMG_CONTEXT>": IMAGE, "<video>": VIDEO, "<img>": START, "</img>": END},
        "names": {
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
            "start_image_token": "<img>",
            "end_image_token": "</img>",
        },
        "processor": ("InternVL", {"image_seq_length": 4}),
        "image": ("GotOcr2ImageProcessor", {**_SQUARE, "crop_to_patches": True, "max_patches": 4}),
        "video": ("InternVLVideoProcessor", _SQUARE),
        "prompt": ("<IMG_CONTEXT>", "<video>"),
    },
    "smolvlm": {
        "specials": {"<image>": IMAGE, "<video>": VIDEO, "<fake_token_around_image>": START, "<global-img>": END},
        "processor": ("SmolVLM", {"image_seq_len": 4}),
        "image": ("SmolVLMImageProcessor", {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}),
        "video": ("SmolVLMVideoProcessor", {"size": {"longest_edge": 16}, "max_image_size": {"longest_edge": 16}}),
        "prompt": ("<image>", "<video>"),
    },
    "idefics3": {
        "specials": {"<image>": IMAGE, "<fake_token_around_image>": START, "<global-img>": END},
        "processor": ("Idefics3", {"image_seq_len": 4}),
        "image": ("Idefics3ImageProcessor", {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}),
        "prompt": ("<image>",),
    },
    "paligemma": {
        "specials": {"<image>": IMAGE},
        "names": {"image_token": "<image>"},
        "processor": ("PaliGemma", {}),
        "image": ("SiglipImageProcessor", {**_SQUARE, "image_seq_length": 16}),
        "prompt": ("<image>",),
    },
    "gemma3": {
        "specials": {"<img>": IMAGE, "<boi>": START, "<eoi>": END},
        "names": {"image_token": "<img>", "boi_token": "<boi>", "eoi_token": "<eoi>"},
        "processor": ("Gemma3", {"image_seq_length": 4}),
        "image": (
            "Gemma3ImageProcessor",
            {**_SQUARE, "pan_and_scan_min_crop_size": 8, "pan_and_scan_max_num_crops": 2},
        ),
        "prompt": ("<boi>",),
    },
    "mistral3": {
        "specials": {"[IMG]": IMAGE, "[IMG_BREAK]": BREAK, "[IMG_END]": END},
        "processor": ("Pixtral", {"patch_size": 4, "spatial_merge_size": 2}),
        "image": ("PixtralImageProcessor", {"size": {"longest_edge": 32}, "patch_size": 8}),
        "prompt": ("[IMG]",),
    },
    "aya_vision": {
        "specials": {"<|IMG_PATCH|>": IMAGE, "<image>": VIDEO, "<|START_OF_IMG|>": START, "<|END_OF_IMG|>": END},
        "processor": ("AyaVision", {"patch_size": 4, "img_size": 16, "downsample_factor": 2}),
        "image": ("GotOcr2ImageProcessor", {**_SQUARE, "crop_to_patches": True, "max_patches": 4}),
        "prompt": ("<image>",),
    },
    "llava": {
        "specials": {"<image>": IMAGE},
        "processor": (
            "Llava",
            {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        ),
        "image": ("CLIPImageProcessor", _CLIP),
        "prompt": ("<image>",),
    },
    "llava_next": {
        "specials": {"<image>": IMAGE},
        "processor": (
            "LlavaNext",
            {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        ),
        "image": ("LlavaNextImageProcessor", {**_CLIP, "image_grid_pinpoints": _PINPOINTS}),
        "prompt": ("<image>",),
    },
}
SIZES = ((24, 32), (16, 40), (32, 32))
"""Height and width of the images of `processed`."""


def tiny_processor(name: str) -> Any:
    """The processor of a VLM of `tiny_vlms`."""
    plan = PROCESSORS[name]
    kind, settings = plan["processor"]
    parts = {"tokenizer": _tokenizer(plan["specials"], **plan.get("names", {}))}
    for part in ("image", "video"):
        if part in plan:
            class_name, own = plan[part]
            parts[f"{part}_processor"] = getattr(transformers, class_name)(**own)
    # SmolVLM spells the number of frames in words by a package that may be missing
    processing_smolvlm.num2words = str
    return getattr(transformers, f"{kind}Processor")(**parts, **settings)


def _tokenizer(specials: dict[str, int], **names: str) -> PreTrainedTokenizerFast:
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": BREAK + 1, **{f"w{i}": i for i in range(3, 80)}, **specials}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=names,
    )
    assert all(tokenizer.convert_tokens_to_ids(token) == number for token, number in specials.items())
    return tokenizer


def processed(name: str, side: str, videos: bool = True) -> dict[str, Any]:
    """What the processor gives for a batch: an image between words; two adjacent images of two sizes and a video of 4
    frames; words; a video of 4 frames, the last three alike. Without `videos`, and where there are none, images stand
    in their place."""
    processor = tiny_processor(name)
    image, *rest = PROCESSORS[name]["prompt"]
    video = rest[0] if rest and videos else image
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in (*SIZES, SIZES[0], SIZES[0])]
    clips = [rng.integers(0, 256, (4, 16, 24, 3), dtype=np.uint8) for _ in range(2)]
    clips[1][1:] = clips[1][1]
    text = [f"w11 {image} w12", f"{image}{image} w13 {video}", "w14 w15 w16 w17", f"w18 {video} w19"]
    rows: list[list[Any]] = [[images[0]], images[1:3], [], []]
    call: dict[str, Any] = {"padding": True, "padding_side": side, "return_tensors": "pt"}
    if video == image:
        rows[1], rows[3] = images[1:4], images[4:]
    elif name == "smolvlm":
        # this processor takes images or videos, not both
        return dict(processor(text=[text[3]] * 2, videos=[[clip] for clip in clips], **call))
    else:
        call["videos"] = clips
    if name == "gemma3":
        call["do_pan_and_scan"] = True
    nested = name in ("smolvlm", "idefics3", "gemma3", "mistral3", "paligemma")
    return dict(processor(text=text, images=rows if nested else [i for row in rows for i in row], **call))


def multi_image(name: str) -> dict[str, Any]:
    """Output of the processor for a row of one image and a row of two, distinguished by nesting."""
    image = PROCESSORS[name]["prompt"][0]
    images = [np.full((*size, 3), 9 * i, np.uint8) for i, size in enumerate(SIZES)]
    text = [f"{image} w12", f"{image}{image} w13"]
    return dict(tiny_processor(name)(text=text, images=[images[:1], images[1:]], padding=True, return_tensors="pt"))
