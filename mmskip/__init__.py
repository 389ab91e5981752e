"""mmskip: a dial on depth for multimodal models.

Verbs change a model in place (`apply_`, `remove_`, `load_`); functions do not (`trace`, `cost`, `report`, `save`,
`applied`, `masked`, `importance`, `calibrate`, `search`). A method is described by a frozen config such as
`MoDConfig`.
"""

from mmskip.calibration import Calibration, calibrate, importance, search
from mmskip.config import MethodConfig
from mmskip.costs import Cost, cost
from mmskip.importance_table import ImportanceTable
from mmskip.methods.early_exit import EarlyExitConfig
from mmskip.methods.ffn_skip import FFNSkipConfig
from mmskip.methods.freeu import FreeUConfig
from mmskip.methods.lac import LACConfig
from mmskip.methods.layer_bits import LayerBitsConfig
from mmskip.methods.layer_mask import LayerMaskConfig, masked
from mmskip.methods.layer_plan import LayerPlanConfig
from mmskip.methods.mixture_of_depths import MoDConfig
from mmskip.methods.self_speculation import SelfSpeculationConfig, generate
from mmskip.methods.skip_policy import SkipPolicyConfig
from mmskip.methods.skip_scale import SkipScaleConfig, skip_norms
from mmskip.methods.step_cache import StepCacheConfig
from mmskip.methods.token_reduction import TokenReductionConfig
from mmskip.registry import applied, apply_, registered, remove_
from mmskip.reporting import MethodReport, report
from mmskip.saving import load_, save
from mmskip.tracing import Trace, trace
from mmskip.utils import moved

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "Cost",
    "EarlyExitConfig",
    "FFNSkipConfig",
    "FreeUConfig",
    "ImportanceTable",
    "LACConfig",
    "LayerBitsConfig",
    "LayerMaskConfig",
    "LayerPlanConfig",
    "MethodConfig",
    "MethodReport",
    "MoDConfig",
    "SelfSpeculationConfig",
    "SkipPolicyConfig",
    "SkipScaleConfig",
    "StepCacheConfig",
    "TokenReductionConfig",
    "Trace",
    "applied",
    "apply_",
    "calibrate",
    "cost",
    "generate",
    "importance",
    "load_",
    "masked",
    "remove_",
    "report",
    "save",
    "search",
    "skip_norms",
    "trace",
]

# methods that are not named above; type checkers know the others
globals().update({name: config for name, config in registered().items() if name not in globals()})
__all__ = sorted({*__all__, *registered()})

moved.install()
