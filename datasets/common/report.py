"""Counts of records skipped or repaired while a data set was read."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class LoadReport:
    """Samples left out or repaired while loading, counted by reason, with some names for each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, example: str, count: int = 1) -> None:
        """Count `count` cases of a reason; the first three examples are kept."""
        if count:
            self.counts[reason] += count
            names = self.examples.setdefault(reason, [])
            if len(names) < 3 and example not in names:
                names.append(example)

    def merge(self, other: "LoadReport") -> None:
        """Add the counts and examples of another report."""
        for reason, count in other.counts.items():
            for example in other.examples[reason]:
                self.add(reason, example, count)
                count = 0

    def __str__(self) -> str:
        if not self.counts:
            return "nothing left out"
        return "; ".join(
            f"{reason}: {count} ({', '.join(self.examples[reason])}{', ...' if count > 3 else ''})"
            for reason, count in self.counts.most_common()
        )
