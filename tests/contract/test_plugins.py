"""Families and methods from outside the package, through entry points: a toy model with blocks, skips and exits."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

TOY = '''
"""A network of waves: blocks that pass their inputs on, skips that join, and an exit after every block."""
import torch
from torch import nn

from mmskip.families.base import Site, View


class Wave(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mix = nn.Linear(width, width)
        self.exit = nn.Linear(width, 2)

    def forward(self, step, x):
        return x + torch.tanh(self.mix(x)) * step


class Join(nn.Module):
    def forward(self, x, skipped):
        return x + skipped


class Waves(nn.Module):
    def __init__(self, width=8, depth=4):
        super().__init__()
        self.waves = nn.ModuleList(Wave(width) for _ in range(depth))
        self.joins = nn.ModuleList(Join() for _ in range(depth // 2))

    def forward(self, x):
        early = []
        half = len(self.waves) // 2
        for index, wave in enumerate(self.waves):
            if index >= half:
                x = self.joins[index - half](x, early.pop())
            x = wave(0.5, x)
            if index < half:
                early.append(x)
        return self.waves[-1].exit(x)


class WavesView(View):
    family = "waves"

    def __init__(self, root):
        self.root = root
        self.stacks = {"wave": tuple(root.waves)}

    def hidden_argument(self, block):
        return "x"

    def parts(self, block):
        return None, block.mix

    def _sites(self, kind):
        if kind == "skip":
            for index, join in enumerate(self.root.joins):
                yield Site(f"skip.{index}", "skip", join, index)
        else:
            yield from super()._sites(kind)


def match(model):
    for module in model.modules():
        if isinstance(module, Waves):
            return WavesView(module), ""
    return None, f"{type(model).__name__} has no waves"
'''

METHODS = '''
"""Methods of the toy: one per change that `swap` knows, none of which knows the model."""
from dataclasses import dataclass

import torch
from torch import nn

from mmskip.config import MethodConfig, check_indices, check_number
from mmskip.registry import register
from mmskip.swap import around, children, hidden_states, replace, state_of, states_of, with_states


@dataclass(frozen=True)
class DampConfig(MethodConfig):
    """Weakens the update of every block.

    Args:
        share: of the update that stays, in [0, 1].
    """

    share: float = 1.0

    def __post_init__(self):
        check_number("share", self.share, 0, 1)


class Damped(nn.Module):
    def forward(self, *args, **kwargs):
        site, share = state_of(self, Damped)
        x, output = hidden_states(self, site.argument, args, kwargs), super().forward(*args, **kwargs)
        return with_states(output, torch.lerp(x, states_of(output), share))


@register(DampConfig, "waves", "decoder")
def damp(config, view):
    return [around(site, Damped, (site, config.share), aspect="damped") for site in view.sites("block")]


@dataclass(frozen=True)
class PoolConfig(MethodConfig):
    """Replaces the MLP of some blocks by a parameter-free module."""

    layers: tuple[int, ...] = (0,)

    def __post_init__(self):
        object.__setattr__(self, "layers", check_indices("layers", self.layers))


@register(PoolConfig, "waves")
def pool(config, view):
    return [replace(site, nn.Tanh(), view.root) for site in view.sites("mlp") if site.index in config.layers]


@dataclass(frozen=True)
class GateConfig(MethodConfig):
    """Learns one number per skip."""

    start: float = 0.5


class SkipGate(nn.Module):
    def __init__(self, start):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(start))


class Gated(nn.Module):
    def forward(self, x, skipped):
        return super().forward(x, self.mmskip_gate.value * skipped)


@register(GateConfig, "waves")
def gate(config, view):
    return [
        around(site, Gated, None, aspect="skip", children={"mmskip_gate": SkipGate(config.start)})
        for site in view.sites("skip")
    ]


@dataclass(frozen=True)
class HeadsConfig(MethodConfig):
    """Gives every block a head of its own for training."""


class Head(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


@register(HeadsConfig, "waves")
def heads(config, view):
    return [children(site, {"mmskip_head": Head(8)}) for site in view.sites("block")]
'''


@pytest.fixture(scope="module")
def plugins(tmp_path_factory) -> Path:
    """A folder with the package `toy`, its entry points, and those of a broken one."""
    folder = tmp_path_factory.mktemp("plugins")
    package = folder / "toy"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "waves.py").write_text(TOY)
    (package / "methods.py").write_text(METHODS)
    for name, points in (
        ("toy", "[mmskip.families]\nwaves = toy.waves:match\n\n[mmskip.methods]\ntoy = toy.methods\n"),
        ("broken", "[mmskip.families]\nbroken = nowhere:match\n\n[mmskip.methods]\nbroken = toy.waves:missing\n"),
    ):
        info = folder / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(points)
    return folder


def run(plugins: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process that has the plug-ins installed."""
    header = f"import sys; sys.path.insert(0, {str(plugins)!r})\n"
    command = [sys.executable, "-c", header + textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


def test_a_plugins_model_and_methods_work_like_ours(plugins, tmp_path):
    """One process, since each imports torch: sites, three changes, saving, copies, traces, generic methods."""
    done = run(
        plugins,
        f"""
        import copy, warnings
        warnings.simplefilter("ignore")
        import torch, mmskip
        from mmskip import families, registry
        from mmskip.swap import added
        from toy.waves import Waves

        # a method of mmskip that a plug-in serves, before anything asked for plug-ins
        from mmskip import LACConfig
        try:
            mmskip.apply_(Waves(), LACConfig())
        except ValueError as error:
            assert "decoder" in str(error)
        types = registry.registered()
        Damp, Pool, Gate, Heads = (types[name] for name in ("DampConfig", "PoolConfig", "GateConfig", "HeadsConfig"))
        assert "waves" in families.names() and registry.families_of(Damp) == ("waves", "decoder")

        def build():
            torch.manual_seed(0)
            return torch.nn.Sequential(torch.nn.Identity(), Waves())

        model, x = build(), torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
        view = families.find(model, ("waves",))
        assert [s.name for s in view.sites("block")] == [f"wave.{{i}}" for i in range(4)]
        assert [s.name for s in view.sites("mlp")] == [f"wave.{{i}}.mlp" for i in range(4)]
        assert [s.name for s in view.sites("skip")] == ["skip.0", "skip.1"] and view.sites("conv") == ()
        base, keys = model(x), list(model.state_dict())

        mmskip.apply_(model, Damp(share=1.0))
        assert torch.equal(model(x), base)
        mmskip.remove_(model)
        mmskip.apply_(model, Damp(share=0.0))
        plain = build()[1]
        assert torch.allclose(model(x), plain.waves[-1].exit(3 * x), atol=1e-6)  # two skips are added to x
        mmskip.remove_(model)

        for config in (Pool(layers=(1, 2)), Gate(start=0.25), Heads(), Damp(share=0.5)):
            mmskip.apply_(model, config)
        assert len(mmskip.applied(model)) == 4
        assert "1.waves.1.mix.weight" not in model.state_dict(), "a replaced module leaves no dead parameters"
        assert not any("waves.1.mix" in name for name, _ in model.named_parameters())
        with torch.no_grad():
            for _, name, module in added(model):
                for parameter in getattr(module, name).parameters():
                    parameter.add_(0.125)
        expected = model(x)
        twin = copy.deepcopy(model)
        mmskip.save(model, {str(tmp_path)!r})
        loaded = mmskip.load_(build(), {str(tmp_path)!r})
        assert torch.equal(loaded(x), expected) and mmskip.applied(loaded) == mmskip.applied(model)
        try:
            mmskip.apply_(model, Gate(start=0.1))
            raise SystemExit("two gates on one skip")
        except ValueError as error:
            assert "do not compose: both claim skip.0, skip.1" in str(error), error
        mmskip.remove_(model)
        assert torch.equal(model(x), base) and list(model.state_dict()) == keys
        assert torch.equal(twin(x), expected)

        # the toy's generic method serves a family of ours
        from transformers import LlamaConfig, LlamaForCausalLM
        sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
        llama, ids = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes)).eval(), torch.tensor([[1, 2, 3]])
        mmskip.apply_(llama, Damp(share=0.0))
        expected = llama.lm_head(llama.model.norm(llama.model.embed_tokens(ids)))
        assert torch.allclose(llama(ids).logits, expected, atol=1e-6)
        with mmskip.trace(llama) as trace:
            llama(ids)
        assert len(trace.forwards) == 1
        try:
            mmskip.apply_(llama, Gate())
            raise SystemExit("a family that the method does not serve")
        except ValueError as error:
            assert "waves: LlamaForCausalLM has no waves" in str(error), error
        print("all is well")
        """,
    )
    assert done.returncode == 0 and done.stdout.strip() == "all is well", done.stdout + done.stderr


def test_a_broken_plugin_warns_and_is_left_out(plugins):
    done = run(
        plugins,
        """
        import warnings
        from mmskip import families, registry
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            names, types = families.names(), registry.config_types()
        messages = [str(w.message) for w in caught if "plug-in" in str(w.message)]
        assert len(messages) == 2 and all("the plug-in broken" in m for m in messages), messages
        assert "waves" in names and "broken" not in names and "DampConfig" in types and "MoDConfig" in types
        """,
    )
    assert done.returncode == 0, done.stdout + done.stderr
