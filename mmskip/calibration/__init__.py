"""Measure or search once, before a method is applied. Functions run a model and return a config or a result.

| function | answers |
|---|---|
| `calibrate`, `choose` | which setting keeps a statistical risk guarantee, or a latency budget (`risk_control`) |
| `importance`, `lac_activity` | how much each layer does (`layer_importance`) |
| `greedy_drops`, `drop_order` | which parts to leave out, by the loss without them (`drop_search`) |
| `ffn_threshold` | from which cosine feed-forwards are skipped (`ffn_saturation`) |
| `fit_routers` | routers of mixture of depths, without gradients (`router_fitting`) |
| `search` | the value of one setting with the lowest score (`line_search`) |
| `search_paths`, `shortest_as_good` | paths of layers for one sample, by tree search (`layer_paths`) |
"""

from mmskip.calibration import deprecated as _deprecated  # noqa: F401  attaches LayerPlanConfig.greedy
from mmskip.calibration.drop_search import Drop, drop_order, greedy_drops, plan_of
from mmskip.calibration.ffn_saturation import ffn_threshold
from mmskip.calibration.layer_importance import importance, lac_activity
from mmskip.calibration.layer_paths import PathSettings, Scored, search_paths, shortest_as_good
from mmskip.calibration.line_search import Found, search
from mmskip.calibration.risk_control import Calibration, calibrate, choose
from mmskip.calibration.router_fitting import fit_routers
from mmskip.importance_table import ImportanceTable

__all__ = [
    "Calibration",
    "Drop",
    "Found",
    "ImportanceTable",
    "PathSettings",
    "Scored",
    "calibrate",
    "choose",
    "drop_order",
    "ffn_threshold",
    "fit_routers",
    "greedy_drops",
    "importance",
    "lac_activity",
    "plan_of",
    "search",
    "search_paths",
    "shortest_as_good",
]
