"""A small chat set and a tiny VLM for the tests of chat data and VLM tuning."""

from typing import Any

from mmskip.datasets.chat.module import ChatData
from mmskip.datasets.synthetic.chat import SceneChatConfig

SMALL = SceneChatConfig(train=12, val=4, test=2, image_size=48, clips=0.4)
TINY_VLM: dict[str, Any] = {
    "model_type": "llava_onevision",
    "image_grid_pinpoints": [[48, 48]],
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 48,
        "patch_size": 12,
        "vision_use_head": False,
    },
    "text_config": {
        "model_type": "qwen2",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "initializer_range": 0.1,
    },
}


def chat_data(root: Any, **kwargs: Any) -> ChatData:
    """The small set, prepared."""
    data = ChatData(root=str(root), generated=SMALL, **kwargs)
    data.prepare_data()
    return data
