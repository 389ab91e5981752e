"""Results on disk that an interrupted run resumes from: written atomically, guarded by what they depend on."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmskip.utils.files import write_json


class ResumableResults:
    """A JSON file of results, rewritten atomically after each of them.

    Several processes may fill one file, each with separate keys.

    Args:
        path: the file; results that are there are read.
        settings: JSON-ready, what all results depend on, kept in the file under `"settings"`. None: the name of the
            file says what they depend on.
        remedy: what to do about a file that does not fit, the end of the error message.

    Attributes:
        values: the results by key.

    Raises:
        ValueError: the file holds something else, or results of other settings.
    """

    def __init__(
        self,
        path: str | Path,
        settings: Mapping[str, Any] | None = None,
        remedy: str = "give another folder, or remove it",
    ) -> None:
        self.path, self.remedy = Path(path), remedy
        self.settings: dict[str, Any] | None = None if settings is None else json.loads(json.dumps(settings))
        self.values = self._read()

    def _read(self) -> dict[str, Any]:
        if not self.path.is_file():
            return {}
        try:
            content = dict(json.loads(self.path.read_text(encoding="utf-8")))
            found = {} if self.settings is None else dict(content.pop("settings"))
        except (ValueError, KeyError, TypeError) as error:
            raise self.unfit(error) from error
        if self.settings is not None and (others := differences(found, self.settings)):
            raise ValueError(f"{self.path} holds results of other settings ({others}); {self.remedy}.")
        return content

    def unfit(self, error: Exception) -> ValueError:
        """Return the error for content that is not what the caller expects."""
        return ValueError(f"{self.path} is not a file of these results ({error!r}); {self.remedy}.")

    def put(self, values: Mapping[str, Any]) -> None:
        """Write further results beside those of the file."""
        self.values = {**self._read(), **values}
        write_json(self.values if self.settings is None else {"settings": self.settings, **self.values}, self.path)

    def once(self, key: str, make: Callable[[], Any], part: str | None = None) -> Any:
        """Return a result; it is made and written unless the file has it.

        Args:
            key: its name.
            make: called without arguments; returns something JSON-ready.
            part: name of the dictionary in the file that holds it; None: the top level of the file.
        """
        if key not in (self.values if part is None else self.values.get(part, {})):
            found = make()
            self.put({key: found} if part is None else {part: {**self._read().get(part, {}), key: found}})
        return self.values[key] if part is None else self.values[part][key]


def differences(found: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """Name the settings in which two JSON-ready mappings differ, with both values; empty if they are equal."""
    keys = sorted(key for key in {*found, *settings} if found.get(key) != settings.get(key))
    return "; ".join(f"{key}: {found.get(key)!r} there, {settings.get(key)!r} now" for key in keys)


def made_once(path: str | Path, make: Callable[[], Any]) -> Any:
    """Return the content of a JSON file; it is made and written unless the file is there."""
    if not Path(path).is_file():
        write_json(make(), path)
    return json.loads(Path(path).read_text(encoding="utf-8"))
