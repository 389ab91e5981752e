"""Towers of three libraries, transformers and CNNs alike; frozen, or trained."""

import pytest
import torch

from mmskip.datasets.video.tower import VisionTower, check_tower_name, tower_id

TINY_VIT = {"depth": 1, "embed_dim": 32, "num_heads": 2}
TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 1, "layers": 1},
}
_TINY_HF = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
TOWERS = {
    "vit with cls": {"name": "timm/vit_tiny_patch16_224", "image_size": 64, "tower_kwargs": TINY_VIT},
    "vit with attention pool": {
        "name": "timm/vit_base_patch16_siglip_224",
        "image_size": 64,
        "tower_kwargs": TINY_VIT,
    },
    "cnn": {"name": "timm/resnet10t", "image_size": 96},
    "channels last": {"name": "timm/swin_tiny_patch4_window7_224", "tower_kwargs": {"depths": (1, 1, 1, 1)}},
    "open_clip": {"name": "open_clip/ViT-B-32", "image_size": 96, "tower_kwargs": {}},
    "hf vit": {"name": "hf/vit", "image_size": 64, "tower_kwargs": _TINY_HF},
    "hf siglip": {
        "name": "hf/siglip_vision_model",
        "image_size": 64,
        "tower_kwargs": {**_TINY_HF, "vision_use_head": False},
    },
    "hf with registers": {"name": "hf/dinov2_with_registers", "image_size": 56, "tower_kwargs": _TINY_HF},
    "hf cnn": {"name": "hf/resnet", "tower_kwargs": {"hidden_sizes": [16, 32], "depths": [1, 1], "embedding_size": 8}},
}


@pytest.fixture(autouse=True)
def _small_open_clip(monkeypatch):
    """open_clip has no small models and no size arguments: a tiny one under a known name."""
    import open_clip.factory

    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-32", TINY_CLIP)


def frames(count=2, size=64):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("kind", TOWERS)
def test_frames_become_cls_and_grid_tokens(kind):
    tower = VisionTower(**TOWERS[kind], grid=2)
    out = tower(frames())
    assert out.shape == (2, 5, tower.dim) and tower.num_tokens == 5
    assert out.isfinite().all() and not out.requires_grad
    assert not torch.equal(out[0], out[1]), "another picture, other features"


@pytest.mark.parametrize("kind", TOWERS)
def test_grid_tokens_keep_their_place(kind):
    """A change in one corner of the picture changes that corner's token most."""
    if kind == "channels last":
        pytest.skip("the windows of a random Swin smear over the picture")
    tower = VisionTower(**TOWERS[kind], grid=2)
    size = tower.image_size
    black = torch.zeros(1, 3, size, size)
    corner = black.clone()
    corner[:, :, : size // 2, size // 2 :] = 1
    change = (tower(corner) - tower(black))[0].norm(dim=1)[1:]
    assert change.argmax() == 1, "row by row: the upper right is the second"


@pytest.mark.parametrize("kind", ["vit with cls", "open_clip"])
def test_random_weights_depend_on_the_seed_alone(kind):
    before = torch.random.get_rng_state()
    first = VisionTower(**TOWERS[kind], seed=1)
    assert torch.equal(torch.random.get_rng_state(), before), "the caller's random numbers are not touched"
    torch.manual_seed(99)
    again, other = VisionTower(**TOWERS[kind], seed=1), VisionTower(**TOWERS[kind], seed=2)
    assert torch.equal(first(frames()), again(frames()))
    assert not torch.equal(first(frames()), other(frames()))


def test_tower_is_frozen_and_stays_in_evaluation_mode():
    tower = VisionTower(**TOWERS["cnn"]).train()
    assert not tower.training and not any(parameter.requires_grad for parameter in tower.parameters())
    first = tower(frames())
    assert torch.equal(first, tower(frames())), "no batch statistics move"
    alone = tower(frames()[:1])
    assert torch.allclose(alone, first[:1], atol=1e-5), "nor do the others in the batch matter"


def test_integer_and_float_frames_of_any_size_agree():
    tower = VisionTower(**TOWERS["vit with cls"])
    assert torch.allclose(tower(frames()), tower(frames().float() / 255), atol=1e-6)
    assert tower(frames(size=40)).shape == tower(frames()).shape
    with pytest.raises(ValueError, match=r"must be \[F, 3, H, W\]"):
        tower(frames()[0])


def test_normalised_by_the_models_own_statistics():
    tower = VisionTower(**TOWERS["vit with cls"])
    mean = tower.mean.expand(1, 3, 64, 64)
    expected, _ = tower._features(torch.zeros(1, 3, 64, 64))
    assert torch.allclose(tower(mean)[:, 0], expected, atol=1e-5)


def test_equal_ids_mean_equal_features():
    base = TOWERS["vit with cls"]
    assert VisionTower(**base).features_id == tower_id(**base) == tower_id(**base)
    variants = [{"grid": 2}, {"seed": 1}, {"pretrained": True}, {"image_size": 32}, {"tower_kwargs": {"depth": 2}}]
    assert len({tower_id(**(base | change)) for change in [{}, *variants]}) == 6


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm/vit_tiny_patch16_225", "near names: .*vit_tiny_patch16_224"),
        ("open_clip/ViT-B-33", "near names: .*ViT-B-32"),
        ("open_clip/ViT-B-32/nobody", "has no weights 'nobody'; it has: .*openai"),
        ("siglip", "write timm/<model>, open_clip/<model>"),
        ("timm/", "timm has no model ''"),
    ],
)
def test_unknown_names_list_what_is_near(name, message):
    with pytest.raises(ValueError, match=message):
        check_tower_name(name)
    with pytest.raises(ValueError, match=message):
        VisionTower(name)


def test_published_weights_that_cannot_be_had_are_a_clear_error(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no route to the hub")

    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(ValueError, match=r"no route to the hub.*set pretrained to false"):
        VisionTower("timm/vit_tiny_patch16_224", pretrained=True)


def test_a_grid_finer_than_the_patches_is_refused():
    with pytest.raises(ValueError, match="grid=5 is finer than the 4x4 patches"):
        VisionTower(**TOWERS["vit with cls"], grid=5)
    with pytest.raises(ValueError, match="grid must be at least 1"):
        VisionTower(**TOWERS["vit with cls"], grid=0)


def test_a_trained_tower_gets_gradients_and_a_frozen_one_none():
    for trained in (True, False):
        tower = VisionTower(**TOWERS["vit with cls"], grid=2, trained=trained).train()
        assert tower.model.training == trained
        out = tower(frames())
        assert out.requires_grad == trained
        if trained:
            out.sum().backward()
            assert all(p.grad is not None for p in tower.model.parameters())


def test_a_saved_model_of_transformers_is_a_tower(tmp_path):
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    model = ViTModel(ViTConfig(image_size=32, patch_size=16, **_TINY_HF))
    model.save_pretrained(tmp_path)
    ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(tmp_path)
    tower = VisionTower(f"hf/{tmp_path}", grid=2)
    assert tower.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    x = frames(size=32) / 255
    states = model.eval()(pixel_values=(x - tower.mean) / tower.std).last_hidden_state
    assert torch.allclose(tower(x), states, atol=1e-5)
    with pytest.raises(ValueError, match="takes images of 32 pixels"):
        VisionTower(f"hf/{tmp_path}", image_size=48)
    with pytest.raises(ValueError, match="cannot be made"):
        VisionTower("hf/no/such_model")
