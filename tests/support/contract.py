"""Cases of the contract grid (`tests/contract/test_every_method.py`): tiny models by family, and what is run on them.

The test file of a method holds `CONTRACT`, a list of cases; the grid finds it. One case per family that the method
serves is the least.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
import tiny_seq2seq
import tiny_unets
import tiny_vlms
import torch
from cnn_zoo import images, patch_mask
from masked_nets import SIZE, net
from tiny_decoders import VOCAB, randomize_routers, sharpen, stream_layout, tiny_decoder
from torch import Tensor, nn

import mmskip

Outputs = list[Tensor]


@dataclass(frozen=True)
class Base:
    """A tiny model of a family.

    Attributes:
        family: name of the family.
        build: makes the model, the same one every time, in evaluation mode.
        run: (model, further arguments) -> outputs, the same ones every time.
        loss: (model, further arguments) -> a scalar with gradients; None: the family is not trained here.
    """

    family: str
    build: Callable[[], Any]
    run: Callable[..., Outputs]
    loss: Callable[..., Tensor] | None = None


@dataclass(frozen=True)
class Case:
    """A method on a tiny model.

    Attributes:
        base: the model.
        config: settings that change its outputs.
        identity: settings that leave them bit for bit as they are, through the method's own path; None where there are
            none, with the reason in `why`.
        call: further arguments of a run while the method is applied.
        bad: field -> a value that is out of range.
        compiles: whether decisions are static, so that `torch.compile(fullgraph=True)` takes the model.
        trains: whether the changed model can be trained: gradient checkpointing and LoRA are then tried.
        exact: whether the outputs stay as they are with `config` too (a method that only saves time).
        why: the reason for a missing identity.
    """

    base: Base
    config: Any
    identity: Any
    bad: Mapping[str, Any]
    call: Mapping[str, Any] = field(default_factory=dict)
    compiles: bool = False
    trains: bool = False
    exact: bool = False
    why: str = ""

    def __str__(self) -> str:
        return f"{type(self.config).__name__}-{self.base.family}"

    def build(self, config: Any = None) -> Any:
        """The model, with `config` applied and its new weights drawn at random."""
        model = self.base.build()
        if config is not None:
            mmskip.apply_(model, config)
            randomize_routers(model)
        return model

    def run(self, model: nn.Module) -> Outputs:
        """Outputs without gradients."""
        with torch.no_grad():
            return self.base.run(model, **(self.call if mmskip.applied(model) else {}))

    def loss(self, model: nn.Module) -> Tensor:
        """A scalar with gradients."""
        assert self.base.loss is not None
        return self.base.loss(model, **(self.call if mmskip.applied(model) else {}))


LAYOUT = stream_layout(2)[None]
IDS = torch.randint(3, VOCAB, LAYOUT.shape, generator=torch.Generator().manual_seed(0))


def _decoder() -> Any:
    model = tiny_decoder("llama")
    sharpen(model, 8.0)
    return model


def _decode(model: Any, **call: Any) -> Outputs:
    tokens = model.generate(IDS, **call, max_new_tokens=4, do_sample=False, pad_token_id=0)
    return [model(IDS, **call).logits, tokens]


def _decoder_loss(model: Any, **call: Any) -> Tensor:
    loss: Tensor = model(IDS, labels=IDS, **call).loss
    return loss


VLM_NAME = "llava_onevision"


def _see(model: Any, **call: Any) -> Outputs:
    rows = tiny_vlms.example_rows(VLM_NAME)[:1]
    return [model(**tiny_vlms.collate(VLM_NAME, rows)[0], **call).logits]


def _translate(model: Any, **call: Any) -> Outputs:
    given, start = tiny_seq2seq.inputs("t5"), torch.tensor([[3, 8], [3, 9]])
    return [model(**given, decoder_input_ids=start, **call).logits, model.generate(**given, **call)]


def _encoder() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_heads": 2, "num_classes": 5}
    model = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model


def _classify(model: nn.Module) -> Outputs:
    return [model(images(3, 32))]


def _masked(model: nn.Module) -> Outputs:
    x = images(2, SIZE)
    if not mmskip.applied(model):
        return [model(x)]
    with mmskip.masked(model, patch_mask(2, SIZE, 8, 0.5)):
        return [model(x)]


def _seen_whole(model: nn.Module) -> Outputs:
    """With a mask that keeps every position."""
    x = images(2, SIZE)
    if not mmskip.applied(model):
        return [model(x)]
    with mmskip.masked(model, torch.ones(2, 1, SIZE, SIZE)):
        return [model(x)]


UNET_NAME = "unet2d_condition"


def _denoise(model: nn.Module) -> Outputs:
    times = enumerate((900, 700, 500))
    return [tiny_unets.output(model, tiny_unets.inputs(UNET_NAME, timestep=t, seed=i)) for i, t in times]


DECODER = Base("decoder", _decoder, _decode, _decoder_loss)
VLM = Base("vlm", lambda: tiny_vlms.tiny_vlm(VLM_NAME).eval(), _see)
ENCODER_DECODER = Base("encoder_decoder", lambda: tiny_seq2seq.build("t5"), _translate)
ENCODER = Base("encoder", _encoder, _classify)
CNN = Base("cnn", lambda: net("resnet").eval(), _masked)
CNN_UNMASKED = Base("cnn", lambda: net("resnet").eval(), _seen_whole)
UNET = Base("unet", lambda: tiny_unets.tiny_unet(UNET_NAME), _denoise)
ROUTED = {"layout": LAYOUT}
"""Settings that token routing needs on `DECODER`."""
