"""`SkipPolicyConfig` of version 0.1, kept for one release: it makes an `FFNSkipConfig` or a `LACConfig`."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from mmskip.config import MethodConfig, check_choice, retired
from mmskip.methods.ffn_skip import FFNSkipConfig
from mmskip.methods.lac import LACConfig
from mmskip.utils.deprecated import warn_deprecated

_FIELDS = ("policy", "threshold", "cold_first", "cold_last", "warmup", "made_for", "alpha")


class SkipPolicyConfig:
    """Deprecated: `FFNSkipConfig`, or `LACConfig` for `policy="lac"`. Calling it returns one of them."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Return the config of today; fields as in version 0.1.

        Raises:
            TypeError: an unknown field.
            ValueError: a value out of range.
        """
        if len(args) > len(_FIELDS):
            raise TypeError(f"SkipPolicyConfig takes {len(_FIELDS)} settings, but {len(args)} were given.")
        return _convert({**dict(zip(_FIELDS, args, strict=False)), **kwargs}, stacklevel=3)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MethodConfig:
        """Return the config of today from settings of version 0.1."""
        return _convert(values)

    @classmethod
    def calibrated(cls, model: nn.Module, data: Iterable[Any], *args: Any, **kwargs: Any) -> FFNSkipConfig:
        """Call `mmskip.calibration.ffn_threshold`."""
        from mmskip.calibration.ffn_saturation import ffn_threshold

        warn_deprecated("SkipPolicyConfig.calibrated", "mmskip.calibration.ffn_threshold")
        return ffn_threshold(model, data, *args, **kwargs)


def _convert(values: Mapping[str, Any], stacklevel: int = 3) -> MethodConfig:
    given = dict(values)
    policy = given.pop("policy", "ffn_skip")
    check_choice("policy", policy, ("ffn_skip", "lac"))
    if "made_for" in given:
        given["model_fingerprint"] = given.pop("made_for")
    kind: type[MethodConfig] = LACConfig if policy == "lac" else FFNSkipConfig
    warn_deprecated(f"SkipPolicyConfig(policy={policy!r})", kind.__name__, stacklevel + 1)
    # both kinds carried the fields of the other, which meant nothing there
    unused = {"alpha"} if policy == "ffn_skip" else {"threshold", "cold_first", "cold_last", "warmup"}
    if policy == "lac":
        unused |= {"model_fingerprint"}
    return kind(**{name: value for name, value in given.items() if name not in unused})


retired("SkipPolicyConfig", _convert)
