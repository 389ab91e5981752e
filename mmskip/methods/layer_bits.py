"""Bit widths per layer: blocks that matter more keep more bits (arXiv 2406.17415).

    table = mmskip.importance(model, batches)
    mmskip.apply_(model, mmskip.LayerBitsConfig.by_importance(table, "lim", average=3.5))
    print(mmskip.report(model)["LayerBitsConfig"])

The blocks are ranked by a column of the importance table; as many as the target average allows get `high` bits, the
others `low`. torchao quantizes the linear layers of the blocks; embeddings, norms and the output head are not
quantized.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from torch import nn

from mmskip import families
from mmskip.composition import Applied
from mmskip.config import MethodConfig, check_choice, check_count, check_flag, check_number, renamed
from mmskip.importance_table import ImportanceTable, fingerprint
from mmskip.ops.quantize import STORES
from mmskip.protocols import BlockView
from mmskip.registry import register
from mmskip.reporting import MethodReport, register_report
from mmskip.swap import Change
from mmskip.utils.deprecated import warn_deprecated

PLAIN = 16
"""Sentinel: keep the original precision."""
DESCENDING = {
    "bi": True,
    "lim": True,
    "activity": True,
    "zd": False,
    "drop_block": False,
    "drop_attn": False,
    "drop_mlp": False,
}
"""Columns of the importance table, and whether more means more important."""


@renamed({"made_for": "model_fingerprint"})
@dataclass(frozen=True)
class LayerBitsConfig(MethodConfig):
    """Quantize the weights of each block to its own number of bits.

    Args:
        bits: one number per block: 2 to 8, or 16 to keep the original precision.
        group: inputs that share a scale, >= 2; None: one scale per output channel.
        store: `"int8"`: torchao's plain integers, one byte per weight whatever its bits, computed in the model's
            dtype, on every device: it shows what few bits do to quality, and saves memory against 16 or 32 bits only.
            `"packed"`: torchao's CPU kernels, which pack the bits and quantize activations to 8 bits.
        keep_original: keep the original weights in memory, so that `remove_` can restore them; False frees them, and
            `remove_` then refuses.
        model_fingerprint: the architecture the bits were chosen for, see `mmskip.importance_table.fingerprint`; None:
            not checked.

    Example:
        >>> config = LayerBitsConfig.random(layers=8, average=6, high=8, low=4)
        >>> sum(config.bits) / 8
        6.0
    """

    ASPECTS: ClassVar[tuple[str, ...]] = ("weights",)

    bits: Sequence[int]
    group: int | None = None
    store: str = "int8"
    keep_original: bool = True
    model_fingerprint: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.bits, Sequence) or isinstance(self.bits, str):
            raise ValueError(f"bits is {self.bits!r}; expected one number per block.")
        object.__setattr__(self, "bits", tuple(self.bits))
        if not self.bits:
            raise ValueError("bits is empty; expected one number per block.")
        for value in self.bits:
            check_count("bits: each", value)
        check_choice("store", self.store, STORES)
        check_number("group", self.group, 2, integer=True, optional=True)
        check_flag("keep_original", self.keep_original)

    @classmethod
    def by_importance(
        cls, table: ImportanceTable, column: str, average: float, high: int = 8, low: int = 4, **settings: Any
    ) -> Self:
        """Give the most important blocks by a column of the table `high` bits, the others `low`.

        Args:
            table: of `mmskip.importance(model, data)`.
            column: any of its columns; blocks without a value there count as the least important.
            average: bits per block, in [low, high]; the nearest average that this many blocks can have is taken.
            settings: further fields of the config.

        Raises:
            ValueError: an unknown column, or an average out of range.
        """
        check_choice("column", column, tuple(DESCENDING))
        ranked = table.ranking(column, DESCENDING[column])
        rest = tuple(i for i in range(table.layers) if i not in ranked)
        return cls(_two_levels((*ranked, *rest), average, high, low), model_fingerprint=table.model, **settings)

    @classmethod
    def random(cls, layers: int, average: float, high: int = 8, low: int = 4, seed: int = 0, **settings: Any) -> Self:
        """Build the control: the same bits, but the blocks with `high` bits are drawn at random."""
        drawn = random.Random(seed).sample(range(layers), layers)
        return cls(_two_levels(drawn, average, high, low), **settings)


def _two_levels(ranked: Sequence[int], average: float, high: int, low: int) -> tuple[int, ...]:
    """Return the bits by block, `high` for the first of `ranked`."""
    for name, value in (("high", high), ("low", low)):
        check_count(name, value)
    if not low < high or not low <= average <= high:
        raise ValueError(f"average is {average!r} between low={low} and high={high}; expected low <= average <= high.")
    count = len(ranked)
    top = set(ranked[: round(count * (average - low) / (high - low))])
    return tuple(high if index in top else low for index in range(count))


@dataclass(frozen=True)
class BitsReport(MethodReport):
    """The size of the weights of a quantized model.

    Attributes:
        bits: by block.
        average: bits per weight of the blocks' linear layers (and experts, which are not quantized), without scales.
        ideal_bytes: size of these weights if packed without gaps and scales.
        stored_bytes: their size in memory, scales included.
        original_bytes: their size before quantization.
        kept_bytes: size of the original weights that are still in memory for `remove_`.
    """

    bits: tuple[int, ...]
    average: float
    ideal_bytes: int
    stored_bytes: int
    original_bytes: int
    kept_bytes: int

    def __str__(self) -> str:
        text = (
            f"bits {list(self.bits)}, {self.average:.2f} on average; weights of the blocks stored in "
            f"{self.stored_bytes / 2**20:.3f} MiB ({self.ideal_bytes / 2**20:.3f} if packed without scales, "
            f"{self.original_bytes / 2**20:.3f} before)"
        )
        if self.kept_bytes:
            text += f"; {self.kept_bytes / 2**20:.3f} MiB of original weights are kept for remove_"
        return text


def report(model: nn.Module) -> BitsReport:
    """Deprecated: `mmskip.report(model)["LayerBitsConfig"]`.

    Raises:
        ValueError: the model carries no LayerBitsConfig, or one that quantizes nothing.
    """
    warn_deprecated("mmskip.methods.layer_bits.report", "mmskip.report(model)['LayerBitsConfig']")
    found = _blocks(model)
    if all(block.bits is None for block in found):
        raise ValueError(f"no LayerBitsConfig is applied to this {type(model).__name__}, or it leaves all as it is.")
    return _held(found)


def _blocks(model: nn.Module) -> list[Any]:
    """Measure the weights of each block, see `mmskip.hf.quantized_blocks.HeldBits`."""
    from mmskip.hf.quantized_blocks import held

    view = families.find(model, ("decoder", "vlm"))
    return [held(view, index) for index in range(len(view.blocks))]


def _held(found: Sequence[Any]) -> BitsReport:
    """Sum up the weights of the blocks."""
    widths = [8 * block.original_bytes // block.weights if block.bits is None else block.bits for block in found]
    ideal = sum(width * block.weights for width, block in zip(widths, found, strict=True))
    return BitsReport(
        tuple(widths),
        ideal / sum(block.weights for block in found),
        ideal // 8,
        sum(block.stored_bytes for block in found),
        sum(block.original_bytes for block in found),
        sum(block.kept_bytes for block in found),
    )


@register_report(LayerBitsConfig)
def bits_report(record: Applied, model: nn.Module) -> BitsReport:
    """Report on one LayerBitsConfig."""
    return _held(_blocks(model))


@register(LayerBitsConfig, "decoder", "vlm")
def layer_bits_decoder(config: LayerBitsConfig, view: BlockView) -> list[Change]:
    """Build the changes by which the blocks of a decoder hold weights of few bits."""
    from mmskip.hf.quantized_blocks import bits_changes

    if config.model_fingerprint not in (None, fingerprint(view)):
        raise ValueError(
            f"the bits were chosen by the importance of another model ({config.model_fingerprint}); this one is "
            f"{fingerprint(view)}. Run mmskip.importance on it."
        )
    if len(config.bits) != len(view.blocks):
        raise ValueError(f"bits has {len(config.bits)} numbers; this model has {len(view.blocks)} blocks.")
    chosen = {index: width for index, width in enumerate(config.bits) if width != PLAIN}
    return bits_changes(view, chosen, config.group, config.store, config.keep_original)
