"""Module paths of version 0.1, kept for one release: importing one warns and gives the module of today."""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "datasets.annotated": "datasets.narration.parsing",
    "datasets.annotations": "datasets.narration.index",
    "datasets.captions": "datasets.captioning.module",
    "datasets.chat_batches": "datasets.chat.batches",
    "datasets.chat_format": "datasets.chat.format",
    "datasets.chat_index": "datasets.chat.index",
    "datasets.chat_labels": "datasets.chat.labels",
    "datasets.coco": "datasets.captioning.coco",
    "datasets.coin": "datasets.narration.formats.coin",
    "datasets.ego4d": "datasets.narration.formats.ego4d",
    "datasets.egoexo4d": "datasets.narration.formats.egoexo4d",
    "datasets.encode": "datasets.video.encode",
    "datasets.epic_kitchens": "datasets.narration.formats.epic_kitchens",
    "datasets.features": "datasets.video.features",
    "datasets.frames": "datasets.video.frames",
    "datasets.generated": "datasets.synthetic.videos",
    "datasets.resumable": "datasets.common.resumable",
    "datasets.samples": "datasets.narration.windows",
    "datasets.scene": "datasets.synthetic.world",
    "datasets.scene_captions": "datasets.synthetic.captions",
    "datasets.scene_chat": "datasets.synthetic.chat",
    "datasets.snli_ve": "datasets.captioning.snli_ve",
    "datasets.tokenizer": "datasets.narration.tokenizer",
    "datasets.turns": "datasets.narration.turns",
    "families.diffusers_unet": "families.unet",
    "families.encoders": "families.encoder",
    "families.hf_bits": "hf.quantized_blocks",
    "families.hf_blocks": "hf.structure",
    "families.hf_cache": "hf.routing.cache",
    "families.hf_decoder": "families.decoder",
    "families.hf_decoder_exits": "hf.exits.heads",
    "families.hf_encoder_decoder": "families.encoder_decoder",
    "families.hf_exit_cache": "hf.exits.cache",
    "families.hf_exit_speculate": "hf.speculation.early_exit_draft",
    "families.hf_exits": "hf.exits.block",
    "families.hf_frames": "hf.routing.frames",
    "families.hf_ledger": "hf.streaming.slot_ledger",
    "families.hf_mask": "hf.masks",
    "families.hf_modalities": "hf.exits.modalities",
    "families.hf_plain": "hf.streaming.dense_cache",
    "families.hf_plan": "hf.plans.block",
    "families.hf_plan_entries": "hf.plans.cache_entries",
    "families.hf_plan_export": "hf.plans.export",
    "families.hf_policy": "hf.mlp_skipping",
    "families.hf_probe": "hf.probes.attention",
    "families.hf_prompt": "hf.routing.generate",
    "families.hf_residuals": "hf.probes.residuals",
    "families.hf_rope": "hf.streaming.rope",
    "families.hf_speculate": "hf.speculation.decoding",
    "families.hf_speculate_tree": "hf.speculation.tree",
    "families.hf_stream": "hf.streaming.cache",
    "families.hf_subset": "hf.routing.block",
    "families.hf_vlm": "families.vlm",
    "families.hf_vlm_groups": "hf.routing.vlm_layout",
    "families.timm_cnn": "families.cnn",
    "files": "utils.files",
    "interpret": "attribution",
    "methods.greedy_drops": "calibration.deprecated",
    "methods.mod": "methods.mixture_of_depths",
    "methods.mod_fit": "calibration.router_fitting",
    "models.answering": "models.video_llm.answering",
    "models.captioner_build": "models.captioner.build",
    "models.connector": "models.video_llm.connector",
    "models.language_model": "models.common.pretrained",
    "models.logits": "models.common.fp32_head",
    "models.narrator": "models.video_llm.speaking",
    "models.pretrained": "utils.pretrained",
    "models.samplers": "models.diffusion.samplers",
    "models.scoring": "models.video_llm.scoring",
    "models.step_loss": "models.common.base",
    "models.stream": "models.video_llm.streaming.engine",
    "models.stream_state": "models.video_llm.streaming.state",
    "models.streaming_loss": "models.video_llm.loss",
    "models.vision_tower": "datasets.video.tower",
    "models.vlm_build": "models.vlm.build",
    "routers": "tokens",
    "search.cola": "train.search.layer_paths",
    "search.line": "calibration.line_search",
    "search.paths": "calibration.layer_paths",
    "search.skip": "train.search.skip_scale",
    "timing": "utils.timing",
    "train.callbacks": "train.reports.narration",
    "train.caption_report": "train.reports.captioning",
    "train.chat_report": "train.reports.chat",
    "train.evaluation.budgets": "train.evaluation.video_llm.compute_sweep",
    "train.evaluation.captioners": "train.evaluation.captioner.task",
    "train.evaluation.captioning": "train.evaluation.captioner.generation",
    "train.evaluation.coco": "train.evaluation.captioner.coco",
    "train.evaluation.coin": "train.evaluation.video_llm.coin",
    "train.evaluation.commands": "train.cli.evaluate",
    "train.evaluation.common": "train.evaluation.video_llm.task",
    "train.evaluation.depth": "train.evaluation.language_model.depth",
    "train.evaluation.depth_pictures": "train.evaluation.language_model.depth_figures",
    "train.evaluation.drawing": "train.evaluation.generation.image_sampler",
    "train.evaluation.ego4d": "train.evaluation.video_llm.ego4d",
    "train.evaluation.exits": "train.evaluation.captioner.exit_sweep",
    "train.evaluation.fid": "train.evaluation.generation.fid",
    "train.evaluation.ledger": "train.evaluation.results_store",
    "train.evaluation.lm": "train.evaluation.language_model.perplexity",
    "train.evaluation.lm_tasks": "train.evaluation.language_model.tasks",
    "train.evaluation.masking": "train.evaluation.classifier.masking",
    "train.evaluation.masking_pictures": "train.evaluation.classifier.figures",
    "train.evaluation.own": "utils.user_function",
    "train.evaluation.ranks": "train.evaluation.distributed",
    "train.evaluation.snli_ve": "train.evaluation.captioner.snli_ve",
    "train.metrics.baseline": "train.metrics.majority",
    "train.metrics.captions": "models.captioner.metrics",
    "train.metrics.narration": "models.video_llm.metrics",
    "train.metrics.ptb": "models.captioner.ptb",
    "train.report": "train.reports.text",
    "train.sample_report": "train.reports.generation",
    "train.schedules": "models.common.optim",
    "train.stream_cli": "train.cli.stream",
    "train.stream_play": "train.playback",
    "train.trained": "train.load_run",
    "viz_stream": "viz.stream_page",
}
"""Old path -> new path, both inside `mmskip`."""

NAMES = {
    "datasets.ego4d": {"read_goalstep": "datasets.narration.formats.goal_step:read_goalstep"},
    "datasets.scene": {
        "draw_world": "datasets.synthetic.render:draw_world",
        "Told": "datasets.synthetic.world:EventNarration",
    },
    "datasets.scene_chat": {"blind_baseline": "train.metrics.majority:blind_baseline"},
    "datasets.tokenizer": {"word_tokenizer": "datasets.common.tokenizer:word_tokenizer"},
    "files": {"whole": "utils.files:atomic_path"},
    "models.captioner_build": {
        "left_behind": "models.captioner.exit_training:exiting",
        "moved": "models.captioner.exit_training:saturation_loss",
    },
    "models.stream": {"Said": "models.video_llm.speaking:StreamUtterance"},
}
"""Old path -> old name -> module:name of today, for names that are no longer in the module of `MOVED`."""

FUNCTIONS = {
    "trace": "tracing",
    "cost": "costs",
    "calibrate": "calibration.risk_control",
    "importance": "calibration.layer_importance",
    "save": "saving",
}
"""The same for modules with the name of a function of `mmskip`, which their import must not replace."""


def _target(old: str, new: str) -> ModuleType:
    warnings.warn(
        f"mmskip.{old} is now mmskip.{new}; the old path goes in the next release.", FutureWarning, stacklevel=3
    )
    return importlib.import_module(f"mmskip.{new}")


class _Finder(MetaPathFinder, Loader):
    """Finds the modules of `MOVED`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of an old path, or None for every other."""
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == "mmskip" and name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        """Return None: Python creates the module as usual."""

    def exec_module(self, module: ModuleType) -> None:
        """Put the module of today in the place of the old one."""
        old = module.__name__.removeprefix("mmskip.")
        today = _target(old, MOVED[old])
        sys.modules[module.__name__] = _Split(today, NAMES[old]) if old in NAMES else today

    def get_code(self, fullname: str) -> Any:
        """Return the code of the module of today: `python -m` asks for it."""
        old = fullname.removeprefix("mmskip.")
        today: Any = _target(old, MOVED[old])
        return today.__spec__.loader.get_code(today.__name__)


class _Split(ModuleType):
    """A module of `NAMES`."""

    def __init__(self, today: ModuleType, names: dict[str, str]) -> None:
        super().__init__(today.__name__)
        self._today, self._names = today, names

    def __getattr__(self, name: str) -> Any:
        if name not in self._names:
            return getattr(self._today, name)
        module, _, today = self._names[name].partition(":")
        return getattr(importlib.import_module(f"mmskip.{module}"), today)


class _StandIn(ModuleType):
    """A module of `FUNCTIONS`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        old = self.__name__.removeprefix("mmskip.")
        return getattr(_target(old, FUNCTIONS[old]), name)


def install() -> None:
    """Make the old paths importable."""
    sys.meta_path.append(_Finder())
    for old in FUNCTIONS:
        sys.modules.setdefault(f"mmskip.{old}", _StandIn(f"mmskip.{old}"))
    package = sys.modules["mmskip"]
    search = package.search  # the folder of `python -m mmskip.search` must not replace the function either
    importlib.import_module("mmskip.search")
    package.search = search  # type: ignore[attr-defined]
