"""Results on disk: one JSON file per setting, written by one process at a time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffusers.utils.logging import get_logger

from ..files import file_lock, finite, write_json
from ..sampling import differences
from ..text import one_line
from .metrics import Result
from .settings import SweepSetting

logger = get_logger(__name__)
MAY_DIFFER = {"model", "reference.name"}  # names; digests of the content are compared instead


class Store:
    """The results of a folder, `points/NAME.json` with `points/NAME.png`.

    Args:
        protocol: what the results depend on apart from the setting, as JSON: weights, data,
            number of images, ...
    """

    def __init__(self, folder: str | Path, protocol: Mapping[str, Any]):
        self.folder = Path(folder) / "points"
        self.protocol = json.loads(json.dumps(finite(protocol)))
        self._unreadable: set[Path] = set()

    def path(self, setting: SweepSetting) -> Path:
        return self.folder / f"{setting.name}.json"

    def read(self, path: Path) -> Result | None:
        """The result of a file; None, with a warning, where it is unreadable, or there is no file.

        Raises:
            ValueError: for a result that was measured under another protocol.
        """
        try:
            record = json.loads(path.read_text())
            result = Result.from_json(SweepSetting(**record["point"]), record)
            protocol = record["settings"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if path not in self._unreadable:
                reason = f"{type(error).__name__}: {error}"
                logger.warning(one_line(f"{path} is unreadable ({reason}) and is measured again"))
            self._unreadable.add(path)
            return None
        changed = differences(protocol, self.protocol)
        changes = [f"{n} was {old}, is {new}" for n, old, new in changed if n not in MAY_DIFFER]
        if changes:
            raise ValueError(
                f"{path} was measured with other settings ({'; '.join(changes)}); the results of a "
                "folder must be comparable. Use the same settings or another folder."
            )
        return result

    def all(self) -> list[Result]:
        """Every result of the folder, including those of other sweeps under this protocol."""
        results = map(self.read, sorted(self.folder.glob("[!.]*.json")))
        return [result for result in results if result is not None]

    def write(self, result: Result) -> None:
        """Write a result atomically."""
        record = {"point": asdict(result.setting), "settings": self.protocol, **result.to_json()}
        write_json(record, self.path(result.setting))

    @contextmanager
    def claim(self, setting: SweepSetting) -> Iterator[bool]:
        """Within, whether this process has the setting's lock; a killed process loses it."""
        path = self.folder.parent / ".locks" / f"{setting.name}.lock"
        with file_lock(path) as owner:
            yield owner is None

    def fill(
        self,
        settings: Sequence[SweepSetting],
        measure: Callable[[SweepSetting], Result],
        wait: float = 2.0,
    ) -> int:
        """Measure what is missing; wait for settings that other processes are measuring.

        Args:
            wait: seconds between checks on the other processes.

        Returns:
            How many settings this process measured.
        """
        remaining, measured = list(settings), 0
        while remaining:
            busy = []
            for setting in remaining:
                if self.read(self.path(setting)) is not None:
                    continue
                with self.claim(setting) as claimed:
                    if not claimed:
                        busy.append(setting)
                    elif self.read(self.path(setting)) is None:  # still missing, now under the lock
                        self.write(measure(setting))
                        measured += 1
            if len(busy) == len(remaining):
                time.sleep(wait)
            remaining = busy
        return measured
