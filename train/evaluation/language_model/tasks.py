"""Scores on tasks of lm-evaluation-harness (the extra `lm-eval`), for a model as it stands, methods included."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmskip.utils.extras import require


def harness() -> Any:
    """Return the module `lm_eval`.

    Raises:
        ValueError: it is not installed.
    """
    require("lm-eval", "lm_eval.models.huggingface", "--tasks")
    return require("lm-eval", "lm_eval", "--tasks")


def task_manager(names: Sequence[str], folder: Path | None) -> Any:
    """The harness's tasks, and those of a folder of YAML files.

    Raises:
        ValueError: an unknown task.
    """
    harness()
    from lm_eval.tasks import TaskManager

    if folder is not None:
        # the harness's own thousands of tasks take a while to look through
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        if all(name in manager.all_tasks for name in names):
            return manager
    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ValueError(f"--tasks holds {', '.join(unknown)}, which lm-evaluation-harness does not know.")
    return manager


def task_scores(
    model: Any, tokenizer: Any, names: Sequence[str], manager: Any, limit: int | None, batch: int
) -> dict[str, dict[str, float]]:
    """Scores by task and metric.

    Args:
        model: a transformers model, with whatever methods it carries. Likelihoods are scored in one pass over a text,
            which is all prompt to a plan of the decoding phase; generated answers are decoded.
        limit: samples of each task; None: all.
    """
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch, device=str(model.device))
    found = harness().simple_evaluate(
        model=wrapped, tasks=list(names), task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False
    )
    return {name: _numbers(found["results"][name]) for name in names}


def _numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    return {
        key.removesuffix(",none"): float(value)
        for key, value in scores.items()
        if isinstance(value, int | float)
        and not isinstance(value, bool)
        and "stderr" not in key
        and key != "sample_len"
    }
