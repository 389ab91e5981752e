"""Report of early exit in the latest forward, for `mmskip.report`."""

from dataclasses import dataclass

from torch import Tensor, nn

from mmskip.composition import Applied
from mmskip.reporting import MethodReport
from mmskip.swap import states


@dataclass(frozen=True)
class ExitReport(MethodReport):
    """How deep the states of the latest forward went.

    Attributes:
        layers: layers that ran for each state, by stack: `encoder` [B] (or `image` and `text`), `decoder` [B, T]. Empty
            before the first forward, and after one in training mode, where nothing exits.
        depth: layers of each of these stacks.
    """

    layers: dict[str, Tensor]
    depth: dict[str, int]

    @property
    def ran(self) -> bool:
        """Whether there is a forward to report on."""
        return bool(self.layers)

    def __str__(self) -> str:
        if not self.ran:
            return "no exits yet: the model did not run in evaluation mode since apply_"
        parts = []
        for name, exits in self.layers.items():
            counts = exits.flatten().bincount(minlength=self.depth[name] + 1).tolist()
            spread = ", ".join(f"{count} after {layer}" for layer, count in enumerate(counts) if count)
            mean = float(exits.double().mean())
            parts.append(f"{name}: {mean:.2f} of {self.depth[name]} layers on average ({spread})")
        return "; ".join(parts)


def exit_report(record: Applied, model: nn.Module) -> ExitReport:
    """Return the report of one EarlyExitConfig."""
    layers, depth = {}, {}
    for claim in record.claims:
        for state in states(claim.module):
            for name, run in getattr(state, "exit_runs", {}).items():
                if run.exits is not None:
                    layers[name], depth[name] = run.exits, run.depth
    return ExitReport(layers, depth)
