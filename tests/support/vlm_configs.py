"""Settings of tiny vision-language models, by the name of their architecture in transformers."""

from typing import Any

VOCAB = 90
IMAGE, VIDEO, START, END, BREAK = 80, 81, 82, 83, 84
"""Ids of placeholders and separators; words are 3 to 79."""

_TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_SIGLIP = {"model_type": "siglip_vision_model", **_TOWER, "image_size": 16, "patch_size": 4}
_CLIP = {"model_type": "clip_vision_model", **_TOWER, "image_size": 16, "patch_size": 4, "projection_dim": 16}
_TOKENS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
_QWEN_TEXT = {**_TEXT, "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}}
_QWEN_TOWER = {"depth": 2, "in_channels": 3, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
_PINPOINTS = [[16, 32], [32, 16], [32, 32]]

VLMS: dict[str, dict[str, Any]] = {
    "llava_onevision": {
        "text_config": {"model_type": "qwen2", **_TEXT},
        "vision_config": _SIGLIP,
        "image_token_index": IMAGE,
        "video_token_index": VIDEO,
        "image_grid_pinpoints": _PINPOINTS,
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": -1,
    },
    "llava_next_video": {
        "text_config": {"model_type": "llama", **_TEXT},
        "vision_config": _CLIP,
        "image_token_index": IMAGE,
        "video_token_index": VIDEO,
        "image_grid_pinpoints": _PINPOINTS,
        "spatial_pool_stride": 2,
        "image_seq_length": 16,
    },
    "llava_next": {
        "text_config": {"model_type": "llama", **_TEXT},
        "vision_config": _CLIP,
        "image_token_index": IMAGE,
        "image_grid_pinpoints": _PINPOINTS,
    },
    "qwen2_vl": {
        "text_config": {**_QWEN_TEXT},
        "vision_config": {**_QWEN_TOWER, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        **_TOKENS,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
    },
    "qwen2_5_vl": {
        "text_config": {**_QWEN_TEXT},
        "vision_config": {
            **_QWEN_TOWER,
            "hidden_size": 16,
            "out_hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 24,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        **_TOKENS,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
    },
    "qwen3_vl": {
        "text_config": {**_QWEN_TEXT, "head_dim": 8},
        "vision_config": {
            **_QWEN_TOWER,
            "depth": 3,
            "hidden_size": 16,
            "out_hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 24,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1, 2],
        },
        **_TOKENS,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
    },
    "qwen3_5": {
        "text_config": {
            **_QWEN_TEXT,
            "num_hidden_layers": 8,
            "head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        "vision_config": {
            **_QWEN_TOWER,
            "hidden_size": 16,
            "out_hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 24,
            "num_position_embeddings": 64,
        },
        **_TOKENS,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
    },
    "qwen3_vl_moe": {
        "text_config": {
            **_QWEN_TEXT,
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
        },
        "vision_config": {
            **_QWEN_TOWER,
            "depth": 3,
            "hidden_size": 16,
            "out_hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 24,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1, 2],
        },
        **_TOKENS,
        "vision_start_token_id": START,
        "vision_end_token_id": END,
    },
    "video_llama_3": {
        "text_config": {"model_type": "qwen2", **_TEXT},
        "vision_config": {**_TOWER, "patch_size": 4},
        **_TOKENS,
    },
    "internvl": {
        "text_config": {"model_type": "qwen2", **_TEXT},
        "vision_config": {**_TOWER, "image_size": [16, 16], "patch_size": [4, 4]},
        "image_token_id": IMAGE,
        "image_seq_length": 4,
    },
    "smolvlm": {
        "text_config": {"model_type": "llama", **_TEXT},
        "vision_config": {**_TOWER, "image_size": 16, "patch_size": 4},
        "image_token_id": IMAGE,
        "scale_factor": 2,
        "pad_token_id": 0,
    },
    "idefics3": {
        "text_config": {"model_type": "llama", **_TEXT},
        "vision_config": {**_TOWER, "image_size": 16, "patch_size": 4},
        "image_token_id": IMAGE,
        "scale_factor": 2,
        "pad_token_id": 0,
    },
    "idefics2": {
        "text_config": {"model_type": "mistral", **_TEXT, "head_dim": 8, "sliding_window": None},
        "vision_config": {**_TOWER, "image_size": 16, "patch_size": 4},
        "perceiver_config": {
            "hidden_size": 32,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "num_key_value_heads": 1,
            "resampler_head_dim": 8,
        },
        "image_token_id": IMAGE,
    },
    "cohere2_vision": {
        "text_config": {"model_type": "cohere2", **_TEXT, "sliding_window": 9},
        "vision_config": _SIGLIP,
        "image_token_id": IMAGE,
        "downsample_factor": 2,
        "alignment_intermediate_size": 32,
    },
    "paligemma": {
        "text_config": {"model_type": "gemma", **_TEXT, "head_dim": 8},
        "vision_config": {**_SIGLIP, "vision_use_head": False},
        "image_token_index": IMAGE,
        "projection_dim": 32,
        "hidden_size": 32,
    },
    "paligemma2": {
        "model_type": "paligemma",
        "text_config": {"model_type": "gemma2", **_TEXT, "head_dim": 8, "sliding_window": 9},
        "vision_config": {**_SIGLIP, "vision_use_head": False},
        "image_token_index": IMAGE,
        "projection_dim": 32,
        "hidden_size": 32,
        "attn": "eager",
    },
    "gemma3": {
        "text_config": {**_TEXT, "head_dim": 8, "sliding_window": 9, "sliding_window_pattern": 2},
        "vision_config": {**_SIGLIP, "vision_use_head": False},
        "image_token_index": IMAGE,
        "mm_tokens_per_image": 4,
    },
    "llava": {
        "text_config": {"model_type": "llama", **_TEXT},
        "vision_config": _CLIP,
        "image_token_index": IMAGE,
        "image_seq_length": 16,
    },
    "llava_pixtral": {
        "model_type": "llava",
        "text_config": {"model_type": "llama", **_TEXT},
        "vision_config": {"model_type": "pixtral", **_TOWER, "image_size": 64, "patch_size": 8, "head_dim": 8},
        "image_token_index": IMAGE,
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": -1,
    },
    "aya_vision": {
        "text_config": {"model_type": "cohere2", **_TEXT, "sliding_window": 9},
        "vision_config": _SIGLIP,
        "image_token_index": IMAGE,
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": -1,
        "adapter_layer_norm_eps": 1e-5,
        "downsample_factor": 2,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", **_TEXT, "head_dim": 8, "sliding_window": None},
        "vision_config": {
            "model_type": "pixtral",
            **_TOWER,
            "image_size": 64,
            "patch_size": 4,
            "head_dim": 8,
        },
        "image_token_index": IMAGE,
        "spatial_merge_size": 2,
        "vision_feature_layer": -1,
    },
}
NO_PLACEHOLDERS = {"suppress_tokens": list(range(IMAGE, BREAK + 1)), "max_new_tokens": 4}
MROPE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5")
GRIDS = (*MROPE, "video_llama_3")
ANYRES = ("llava_onevision", "llava_next_video", "llava_next")
PREFIX = ("paligemma", "paligemma2", "gemma3")
WITH_VIDEO = ("llava_onevision", "llava_next_video", *GRIDS)
