"""Tiny random networks with skip connections, inputs for them, and a naive reference of scaled concatenations."""

from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

diffusers = pytest.importorskip("diffusers", reason="needs the extra 'diffusion'")

_SMALL = {"sample_size": 16, "block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
_CROSS = {**_SMALL, "cross_attention_dim": 12, "attention_head_dim": 4, "in_channels": 3, "out_channels": 3}
_IMAGE = {**_SMALL, "attention_head_dim": 4}


class UserUNet(nn.Module):
    """A network as its author wrote it: the skip comes first in the concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 10, 3, 2, 1)
        self.middle = nn.Conv2d(10, 10, 3, padding=1)
        self.up2 = nn.Sequential(nn.GroupNorm(2, 20), nn.SiLU(), nn.Conv2d(20, 6, 3, padding=1))
        self.up1 = nn.Sequential(nn.GroupNorm(2, 12), nn.SiLU(), nn.Conv2d(12, 3, 3, padding=1))

    def forward(self, x, t):
        one = self.down1(x) + torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1, 1, 1) / 1000
        two = self.down2(torch.relu(one))
        out = self.up2(torch.cat((two, self.middle(torch.relu(two))), dim=1))
        return self.up1(torch.cat((one, nn.functional.interpolate(out, scale_factor=2)), dim=1))


def _describe_user_unet() -> None:
    from mmskip.families.unet import SkipSite, UNetView, describe_unet

    @describe_unet(UserUNet)
    def _(unet):
        skips = (SkipSite(unet.up2, 0, 10, 20, stage=0), SkipSite(unet.up1, 0, 6, 12, stage=1))
        return UNetView(unet, skips, timestep="t")


_describe_user_unet()


def _hunyuan():
    return diffusers.HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        patch_size=2,
        sample_size=8,
        hidden_size=16,
        num_layers=6,
        mlp_ratio=2.0,
        cross_attention_dim=8,
        cross_attention_dim_t5=8,
        pooled_projection_dim=8,
        text_len=3,
        text_len_t5=4,
    )


def _uvit():
    from diffusers.pipelines.deprecated.unidiffuser.modeling_uvit import UTransformer2DModel

    return UTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        sample_size=8,
        patch_size=2,
        norm_num_groups=2,
        use_patch_pos_embed=True,
    )


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "unet2d": lambda: diffusers.UNet2DModel(
        **_IMAGE, down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D")
    ),
    "unet2d_resnet": lambda: diffusers.UNet2DModel(
        **_IMAGE,
        down_block_types=("ResnetDownsampleBlock2D",) * 2,
        up_block_types=("ResnetUpsampleBlock2D",) * 2,
        resnet_time_scale_shift="scale_shift",
    ),
    "unet2d_skip": lambda: diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=None,
        attention_head_dim=8,
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
    ),
    "unet2d_condition": lambda: diffusers.UNet2DConditionModel(
        **{**_CROSS, "layers_per_block": 2},
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ),
    "unet2d_simple_cross": lambda: diffusers.UNet2DConditionModel(
        **_CROSS,
        down_block_types=("SimpleCrossAttnDownBlock2D",) * 2,
        up_block_types=("SimpleCrossAttnUpBlock2D",) * 2,
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    ),
    "unet2d_k": lambda: diffusers.UNet2DConditionModel(
        **{
            **_CROSS,
            "block_out_channels": (32, 32),
            "attention_head_dim": 8,
            "norm_num_groups": None,
            "layers_per_block": 4,
        },
        down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D"),
        up_block_types=("KCrossAttnUpBlock2D", "KUpBlock2D"),
        mid_block_type=None,
        act_fn="gelu",
        conv_in_kernel=1,
        conv_out_kernel=1,
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="fourier",
        time_embedding_act_fn="gelu",
        resnet_skip_time_act=False,
        time_embedding_dim=32,
        class_embed_type=None,
        downsample_padding=1,
    ),
    "unet3d": lambda: diffusers.UNet3DConditionModel(
        **_CROSS,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    ),
    "motion": lambda: diffusers.UNetMotionModel(
        **{k: v for k, v in _CROSS.items() if k != "attention_head_dim"},
        num_attention_heads=2,
        motion_num_attention_heads=2,
        motion_max_seq_length=8,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
    ),
    "spatio_temporal": lambda: diffusers.UNetSpatioTemporalConditionModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=12,
        num_attention_heads=(2, 4),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        num_frames=2,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    ),
    "hunyuan_dit": _hunyuan,
    "uvit": _uvit,
    "user": UserUNet,
}
UNETS = tuple(BUILDERS)
TOKENS = ("hunyuan_dit", "uvit")
STAGED = tuple(name for name in UNETS if name not in (*TOKENS, "user"))


def tiny_unet(name: str, seed: int = 0) -> nn.Module:
    """A tiny random network in evaluation mode, fp32; zero-initialised outputs and gates are made random too."""
    torch.manual_seed(seed)
    unet = BUILDERS[name]().eval()
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.dim() > 1 and not parameter.any():
                nn.init.normal_(parameter, std=0.05)
    return unet


def inputs(name: str, batch: int = 2, timestep=(40, 700), seed: int = 1) -> dict[str, object]:
    """Keyword arguments of a forward."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    times = torch.tensor(timestep[:batch]) if isinstance(timestep, tuple) else timestep
    text = noise(batch, 5, 12)
    if name == "user":
        return {"x": noise(batch, 3, 16, 16), "t": times}
    if name in ("unet2d", "unet2d_resnet", "unet2d_skip"):
        return {"sample": noise(batch, 3, 16, 16), "timestep": times}
    if name == "motion":
        frames = text.repeat_interleave(2, 0)
        return {"sample": noise(batch, 3, 2, 16, 16), "timestep": times, "encoder_hidden_states": frames}
    if name == "unet3d":
        return {"sample": noise(batch, 3, 2, 16, 16), "timestep": times, "encoder_hidden_states": text}
    if name == "spatio_temporal":
        return {
            "sample": noise(batch, 2, 3, 16, 16),
            "timestep": times,
            "encoder_hidden_states": noise(batch, 1, 12),
            "added_time_ids": noise(batch, 3),
        }
    if name == "hunyuan_dit":
        return {
            "hidden_states": noise(batch, 4, 8, 8),
            "timestep": torch.as_tensor(times, dtype=torch.float32).expand(batch),
            "encoder_hidden_states": noise(batch, 3, 8),
            "text_embedding_mask": torch.ones(batch, 3),
            "encoder_hidden_states_t5": noise(batch, 4, 8),
            "text_embedding_mask_t5": torch.ones(batch, 4),
            "image_meta_size": noise(batch, 6),
            "style": torch.zeros(batch, dtype=torch.long),
            "image_rotary_emb": [noise(16, 8), noise(16, 8)],
        }
    if name == "uvit":
        return {"hidden_states": noise(batch, 4, 8, 8), "timestep": times}
    return {"sample": noise(batch, 3, 16, 16), "timestep": times, "encoder_hidden_states": text}


def output(unet: nn.Module, arguments: dict[str, object]) -> torch.Tensor:
    """The tensor a network returns."""
    result = unet(**arguments)
    return result if isinstance(result, torch.Tensor) else result[0]


class _ScaleConcatenations(TorchFunctionMode):
    def __init__(self, name: str, scales) -> None:
        self.dim, self.rank = (-1, 3) if name in TOKENS else (1, 4)
        self.skip_place = 0 if name == "user" else 1
        self.scales, self.seen = list(scales), 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.cat:
            parts = list(args[0])
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            if len(parts) == 2 and dim == self.dim and parts[0].dim() == self.rank and self._is_skip(parts):
                rho = self.scales[self.seen]
                self.seen += 1
                if isinstance(rho, torch.Tensor):
                    rho = rho.repeat_interleave(len(parts[0]) // len(rho)).reshape(-1, *[1] * (self.rank - 1))
                parts[self.skip_place] = parts[self.skip_place] * rho
                args = (parts, *args[1:])
        return function(*args, **kwargs)

    def _is_skip(self, parts) -> bool:
        return parts[0].shape[2:] == parts[1].shape[2:] if self.dim == 1 else parts[0].shape == parts[1].shape


@contextmanager
def scaled_concatenations(name: str, scales):
    """The naive reference: inside, the skip of the n-th concatenation of the decoder is multiplied by scales[n], at
    the concatenation itself. A scale is a number or a tensor [B]."""
    mode = _ScaleConcatenations(name, scales)
    with mode:
        yield mode
