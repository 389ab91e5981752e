"""Names of version 0.1, kept for one release: a config's class method that ran a model, and the old `greedy_drops`."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from mmskip.calibration import drop_search
from mmskip.calibration.drop_search import Drop, drop_order, plan_of
from mmskip.methods.layer_plan import LayerPlanConfig
from mmskip.utils.deprecated import warn_deprecated

__all__ = ["Drop", "greedy_drops", "plan_of"]


def greedy_drops(model: nn.Module, data: Iterable[Any], *args: Any, **kwargs: Any) -> list[Drop]:
    """Deprecated: `mmskip.calibration.drop_order`."""
    warn_deprecated("mmskip.methods.greedy_drops.greedy_drops", "mmskip.calibration.drop_order")
    return drop_order(model, data, *args, **kwargs)


def _greedy(
    cls: type[LayerPlanConfig], model: nn.Module, data: Iterable[Any], *args: Any, **kwargs: Any
) -> LayerPlanConfig:
    """Deprecated: `mmskip.calibration.greedy_drops`."""
    warn_deprecated("LayerPlanConfig.greedy", "mmskip.calibration.greedy_drops")
    return cls(**drop_search.greedy_drops(model, data, *args, **kwargs).to_dict())


# a config is data: its class does not know what runs models, so the old name is attached from here
LayerPlanConfig.greedy = classmethod(_greedy)  # type: ignore[attr-defined]
