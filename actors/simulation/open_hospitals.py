"""The data of the hospitals that come to one process: the last ones stay open, the next ones are prepared ahead."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from actors.simulation.work import OpenData
from medfl_ray.config.run import RunConfig
from medfl_ray.data.prepare.cache import MemoryBudget
from medfl_ray.errors import MedflError

OPEN_HOSPITALS = 4096


class OpenHospitals:
    """Opens hospitals' data by name; a thread of its own may open those whose turn is next."""

    def __init__(self, run: RunConfig, open_data: OpenData | None, cache_bytes: int | None, looks_ahead: bool) -> None:
        """Open nothing yet.

        Args:
          open_data: returns a hospital's data by its name; the run's own data when None.
          cache_bytes: most memory for prepared images, None for no limit.
          looks_ahead: whether `prepare_ahead` does anything.
        """
        self._run, self._open_data = run, open_data
        self._data: OrderedDict[str, Any] = OrderedDict()
        self._opening = threading.Lock()
        self._budget = MemoryBudget(cache_bytes)
        self._ahead = ThreadPoolExecutor(1, "ahead") if looks_ahead and open_data is None else None

    def opened(self, hospital: str) -> Any:
        """Return a hospital's data; beyond OPEN_HOSPITALS the one that was used longest ago is closed.

        Raises:
          MedflError: the data cannot be opened.
        """
        with self._opening:
            if hospital in self._data:
                self._data.move_to_end(hospital)
            else:
                self._data[hospital] = self._open(hospital)
                if len(self._data) > OPEN_HOSPITALS:
                    self._data.popitem(last=False)
            return self._data[hospital]

    def prepare_ahead(self, hospitals: Sequence[str]) -> None:
        """Have hospitals' images prepared while others train; a failure shows when the hospital's own turn comes."""
        if self._ahead is not None:
            for hospital in hospitals:
                self._ahead.submit(self._prepare_images, hospital)

    def _open(self, hospital: str) -> Any:
        if self._open_data is not None:
            return self._open_data(self._run, hospital)
        from medfl_ray.data.sources import open_hospital_data

        return open_hospital_data(self._run, (hospital,), self._budget)

    def _prepare_images(self, hospital: str) -> None:
        with suppress(MedflError):
            self.opened(hospital).decode_training()
