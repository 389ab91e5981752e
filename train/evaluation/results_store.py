"""Results of single samples, kept on disk as they come, so that an interrupted evaluation goes on where it stopped."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mmskip.train.evaluation.distributed import Ranks
from mmskip.utils.files import write_json, write_text

SETTINGS, DONE, SAMPLE = "evaluation.json", "samples.jsonl", "sample"


class Ledger:
    """The results of one evaluation, one line of JSON each: `samples.jsonl`, and while it runs a file per rank.

    Opening, closing and reading are collective calls.

    Args:
        folder: of this evaluation.
        settings: what all results depend on (JSON-ready).
        samples: by uid, what the result of a single sample depends on. A result of another such text is forgotten: the
            sample has changed.
        ranks: the processes.

    Raises:
        ValueError: the folder holds results of other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], samples: Mapping[str, str], ranks: Ranks) -> None:
        self.folder, self.samples, self.ranks = folder, samples, ranks
        refusal, records = ranks.share(self._open(settings) if ranks.first else None)
        if refusal:
            raise ValueError(refusal)
        self._records: dict[str, dict[str, Any]] = records
        self._file = (folder / f"samples-{ranks.rank}.jsonl").open("a", encoding="utf-8")

    def _open(self, settings: Mapping[str, Any]) -> tuple[str | None, dict[str, dict[str, Any]]]:
        """A refusal or the results so far, put together in one file."""
        path = self.folder / SETTINGS
        settings = json.loads(json.dumps(settings))
        if path.exists():
            found = json.loads(path.read_text())
            differing = sorted(key for key in {*found, *settings} if found.get(key) != settings.get(key))
            if differing:
                told = "; ".join(f"{key}: {found.get(key)!r} there, {settings.get(key)!r} now" for key in differing)
                refusal = f"{self.folder} holds another evaluation ({told}); give another --out, or delete it"
                return refusal, {}
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
        """The samples that had a result when the ledger was opened."""
        return frozenset(self._records) & frozenset(self.samples)

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Keep results of this rank; each has a "uid"."""
        for record in records:
            marked = {**record, SAMPLE: self.samples[record["uid"]]}
            self._file.write(json.dumps(_safe(marked), allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> dict[str, dict[str, Any]]:
        """The results of `samples` by uid, of all ranks."""
        self._file.close()
        self.ranks.wait()
        if self.ranks.first:
            parts = sorted(self.folder.glob("samples-*.jsonl"))
            for part in parts:
                self._records.update(_lines(part))
            self._write(self._records)
            for part in parts:
                part.unlink()
        self._records = self.ranks.share(self._records)
        return {
            uid: {key: value for key, value in record.items() if key != SAMPLE}
            for uid, record in self._records.items()
            if uid in self.samples
        }


def _lines(path: Path) -> dict[str, dict[str, Any]]:
    """The whole lines of a file by uid; the last may have been cut off."""
    found = {}
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            found[record["uid"]] = record
    return found


def _safe(value: Any) -> Any:
    """JSON knows no infinity; null stands for it."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _safe(item) for key, item in value.items()}
    return [_safe(item) for item in value] if isinstance(value, list | tuple) else value
