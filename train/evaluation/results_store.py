"""Results of single samples, written as they come, so that an interrupted evaluation resumes where it stopped."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from mmskip.train.evaluation.distributed import ProcessGroup
from mmskip.utils.files import finite, write_json, write_text
from mmskip.utils.results import differences

SETTINGS, DONE, SAMPLE = "evaluation.json", "samples.jsonl", "sample"


class ResultsStore:
    """The results of one evaluation: one line of JSON per sample in `samples.jsonl`, while it runs in a file per rank.

    Opening, closing and reading are collective calls.

    Args:
        folder: of this evaluation.
        settings: what all results depend on (JSON-ready).
        samples: by uid, a text on which the result of a single sample depends. A stored result with another text
            is dropped: the sample has changed.
        group: the processes.
        current: spells stored settings of an older version as today's.

    Raises:
        ValueError: the folder holds results of other settings.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        samples: Mapping[str, str],
        group: ProcessGroup,
        current: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ) -> None:
        self.folder, self.samples, self.group, self._current = folder, samples, group, current
        refusal, records = group.share(self._open(settings) if group.first else None)
        if refusal:
            raise ValueError(refusal)
        self._records: dict[str, dict[str, Any]] = records
        self._file = (folder / f"samples-{group.rank}.jsonl").open("a", encoding="utf-8")

    def _open(self, settings: Mapping[str, Any]) -> tuple[str | None, dict[str, dict[str, Any]]]:
        """Merge what earlier runs left into one file; returns an error message, or the results so far."""
        path = self.folder / SETTINGS
        settings = json.loads(json.dumps(settings))
        if path.exists() and (others := differences(self._current(json.loads(path.read_text())), settings)):
            return f"{self.folder} holds another evaluation ({others}); give another --out, or delete it", {}
        write_json(settings, path)
        parts = sorted(self.folder.glob("samples-*.jsonl"))
        records = {}
        for part in [self.folder / DONE, *parts]:
            records.update(_lines(part))
        wanted = {uid: self.samples.get(uid, record.get(SAMPLE)) for uid, record in records.items()}
        records = {uid: record for uid, record in records.items() if record.get(SAMPLE) == wanted[uid]}
        self._write(records)
        for part in parts:
            part.unlink()
        return None, records

    def _write(self, records: Mapping[str, Mapping[str, Any]]) -> None:
        write_text("".join(json.dumps(records[uid]) + "\n" for uid in sorted(records)), self.folder / DONE)

    @property
    def done(self) -> frozenset[str]:
        """The samples that had a result when the store was opened."""
        return frozenset(self._records) & frozenset(self.samples)

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Keep results of this rank; each has a "uid"."""
        for record in records:
            marked = {**record, SAMPLE: self.samples[record["uid"]]}
            self._file.write(json.dumps(finite(marked), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> dict[str, dict[str, Any]]:
        """Return the results of `samples` by uid, of all ranks."""
        self._file.close()
        self.group.wait()
        if self.group.first:
            parts = sorted(self.folder.glob("samples-*.jsonl"))
            for part in parts:
                self._records.update(_lines(part))
            self._write(self._records)
            for part in parts:
                part.unlink()
        self._records = self.group.share(self._records)
        return {
            uid: {key: value for key, value in record.items() if key != SAMPLE}
            for uid, record in self._records.items()
            if uid in self.samples
        }


def _lines(path: Path) -> dict[str, dict[str, Any]]:
    """The complete lines of a file by uid; the last may have been cut off."""
    found = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            found[record["uid"]] = record
    return found
