"""Models of real size, their reductions for a CPU, and the inputs that benchmarks call them with."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel


@dataclass(frozen=True)
class Stream:
    """One row: `lead` text tokens, `frames` times (`vision` vision and one text token), `lead` text tokens."""

    frames: int
    vision: int
    lead: int = 16
    decode: int = 8

    def layout(self) -> Tensor:
        """LongTensor [1, T]."""
        frame = torch.cat([torch.arange(self.frames)[:, None].expand(-1, self.vision), -torch.ones(self.frames, 1)], 1)
        text = -torch.ones(self.lead)
        return torch.cat([text, frame.flatten(), text]).long()[None]


STREAMS = {"tiny": Stream(3, 8, 4, 2), "cpu": Stream(32, 32), "cuda": Stream(64, 64, 32, 16)}


@dataclass(frozen=True)
class Decoder:
    """A model of real size; `others` are further settings of its config, by transformers' names.

    `cuda_layers`: blocks that fit one 139 GiB GPU in training (None: all).
    """

    model_type: str
    like: str
    width: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    window: int | None = None
    attention: str = "sdpa"
    cuda_layers: int | None = None
    others: dict[str, Any] = field(default_factory=dict)

    def reduced(self) -> "Decoder":
        """Shrink the shape for a CPU, in the same proportions."""
        by = {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 4}
        others = {k: v // by[k] if k in by else v for k, v in self.others.items()}
        others = _sections(others, self.head_dim // 2)
        return dataclasses.replace(
            self,
            width=self.width // 8,
            ffn=self.ffn // 8,
            layers=self.layers // 4,
            heads=self.heads // 4,
            kv_heads=self.kv_heads // 4,
            head_dim=self.head_dim // 2,
            vocab=self.vocab // 32,
            window=None if self.window is None else self.window // 8,
            cuda_layers=None,
            others=others,
        )

    def tiny(self) -> "Decoder":
        """Just enough to run the script."""
        small = {"num_experts": 4, "num_experts_per_tok": 2}
        others = _sections({k: small.get(k, v) for k, v in self.others.items()}, 16)
        return dataclasses.replace(
            self,
            width=32,
            ffn=48,
            layers=4,
            heads=2,
            kv_heads=1,
            head_dim=16,
            vocab=64,
            cuda_layers=None,
            others=others,
        )

    def build(self, device: str) -> PreTrainedModel:
        """The model with random weights, fp32 on a CPU and bf16 on CUDA."""
        settings = {**self.settings(), **self.others}
        if self.model_type in ("llama", "qwen3", "mistral", "mixtral", "qwen3_moe"):
            settings["tie_word_embeddings"] = False
        config = CONFIG_MAPPING[self.model_type](**settings)
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, attn_implementation=self.attention, dtype=dtype)

    def settings(self) -> dict[str, Any]:
        """The sizes by transformers' names."""
        settings = {
            "vocab_size": self.vocab,
            "hidden_size": self.width,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.cuda_layers or self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": 32768,
            "pad_token_id": None,
            "bos_token_id": None,
            "eos_token_id": None,
        }
        if self.window is not None or self.model_type == "mistral":
            settings["sliding_window"] = self.window
        return settings

    def call(self, stream: Stream, device: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Make the arguments of the dense model, and the additional ones of a routed model."""
        layout = stream.layout().to(device)
        ids = torch.randint(0, self.vocab, layout.shape, generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids.to(device)}, {"layout": layout}


def _sections(others: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """The settings with M-RoPE's sections, whose sum is half the head width, fitted to another head width."""
    if "rope_scaling" not in others:
        return others
    half = head_dim // 2
    sections = [half // 4, (half - half // 4) // 2, half - half // 4 - (half - half // 4) // 2]
    return {**others, "rope_scaling": {**others["rope_scaling"], "mrope_section": sections}}


DECODERS = {
    "llama": Decoder("llama", "Llama-3-8B", 4096, 14336, 32, 32, 8, 128, 128256),
    "qwen3": Decoder("qwen3", "Qwen3-8B", 4096, 12288, 36, 32, 8, 128, 151936),
    "mistral": Decoder("mistral", "Mistral-7B-v0.1", 4096, 14336, 32, 32, 8, 128, 32000, window=4096),
    "gemma2": Decoder("gemma2", "Gemma-2-9B", 3584, 14336, 42, 16, 8, 256, 256000, window=4096, attention="eager"),
    "gemma3": Decoder("gemma3_text", "Gemma-3-4B", 2560, 10240, 34, 8, 4, 256, 262208, window=1024),
    "mixtral": Decoder("mixtral", "Mixtral-8x7B", 4096, 14336, 32, 32, 8, 128, 32000, cuda_layers=8),
    "qwen3_moe": Decoder(
        "qwen3_moe",
        "Qwen3-30B-A3B",
        2048,
        6144,
        48,
        32,
        4,
        128,
        151936,
        cuda_layers=12,
        others={"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    ),
}


@dataclass(frozen=True)
class Vlm:
    """A vision-language model of real size: its language model, and the sizes of its tower.

    `tower` is reduced as follows: hidden_size and intermediate_size by 8, depth and heads by 4.
    """

    model_type: str
    like: str
    text: Decoder
    tower: dict[str, Any]
    others: dict[str, Any] = field(default_factory=dict)

    @property
    def vocab(self) -> int:
        """Number of token ids; the last few stand for pictures."""
        return self.text.vocab

    def reduced(self) -> "Vlm":
        """Shrink the shape for a CPU, in the same proportions."""
        by = {"hidden_size": 8, "intermediate_size": 8, "depth": 4, "num_hidden_layers": 4, "num_heads": 4}
        tower = {k: v // by.get(k, 1) for k, v in self.tower.items()}
        if "num_attention_heads" in tower:
            tower["num_attention_heads"] //= 4
        return dataclasses.replace(self, text=self.text.reduced(), tower=tower)

    def tiny(self) -> "Vlm":
        """Just enough to run the script."""
        sizes = {"hidden_size": 16, "intermediate_size": 24, "depth": 2, "num_hidden_layers": 2}
        heads = {"num_heads": 2, "num_attention_heads": 2}
        tower = {k: {**sizes, **heads}.get(k, v) for k, v in self.tower.items()}
        return dataclasses.replace(self, text=self.text.tiny(), tower=tower)

    def build(self, device: str) -> PreTrainedModel:
        """The model with random weights, fp32 on a CPU and bf16 on CUDA."""
        text = {**self.text.settings(), **self.text.others, "model_type": self.text.model_type}
        tower = {**self.tower}
        if self.model_type == "qwen2_5_vl":
            tower["out_hidden_size"] = self.text.width
            tower["fullatt_block_indexes"] = [tower["depth"] - 1]
        else:
            tower |= {"model_type": "siglip_vision_model", "image_size": self._image(device), "vision_use_head": False}
        config = CONFIG_MAPPING[self.model_type](
            text_config=text,
            vision_config=tower,
            image_token_id=self.vocab - 1,
            video_token_id=self.vocab - 2,
            **self.others,
        )
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        with torch.device(device):
            return AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa", dtype=dtype)

    def _image(self, device: str) -> int:
        return 56 if self.text.width == 32 else 384 if device == "cuda" else 168

    def call(self, stream: Stream, device: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Make the arguments of the dense model; a routed model finds its frames in them."""
        generator = torch.Generator().manual_seed(0)
        frames, call = stream.frames, {}
        if self.model_type == "qwen2_5_vl":
            height = 4 if stream.vision < 32 else 8 if stream.vision < 64 else 16
            width, per_frame = stream.vision * 4 // height, stream.vision
            call["pixel_values_videos"] = torch.randn(frames * height * width, 3 * 2 * 14 * 14, generator=generator)
            call["video_grid_thw"] = torch.tensor([[frames, height, width]])
            newline = 0
        else:
            side = self._image(device) // 14
            per_frame, newline = ((side + 1) // 2) ** 2, 1
            call["pixel_values_videos"] = torch.randn(1, frames, 3, self._image(device), self._image(device))
        count = frames * per_frame + newline
        ids = torch.randint(0, self.vocab - 8, (1, 2 * stream.lead + count), generator=generator)
        ids[0, stream.lead : stream.lead + count] = self.vocab - 2
        call["input_ids"] = ids
        if self.model_type == "qwen2_5_vl":
            call["mm_token_type_ids"] = (ids == self.vocab - 2).long() * 2
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        call["pixel_values_videos"] = call["pixel_values_videos"].to(dtype)
        return {name: value.to(device) for name, value in call.items()}, {}


_QWEN2_7B = Decoder("qwen2", "Qwen2-7B", 3584, 18944, 28, 28, 4, 128, 152064)
VLMS = {
    "qwen2_5_vl": Vlm(
        "qwen2_5_vl",
        "Qwen2.5-VL-7B",
        dataclasses.replace(
            _QWEN2_7B,
            model_type="qwen2_5_vl_text",
            others={"rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]}},
        ),
        {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "patch_size": 14},
    ),
    "llava_onevision": Vlm(
        "llava_onevision",
        "LLaVA-OneVision-7B",
        _QWEN2_7B,
        {
            "num_hidden_layers": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_attention_heads": 16,
            "patch_size": 14,
        },
        others={"vision_feature_select_strategy": "full", "vision_feature_layer": -1},
    ),
}
FAMILIES: dict[str, Decoder | Vlm] = {**DECODERS, **VLMS}
