"""The mirror as one run uses it: which copy belongs to which hospital, and what each ledger must still hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from medfl_ray.config.site import SitePolicy
from medfl_ray.messages import LedgerRows, Receipt
from medfl_ray.store.ledger.events import LedgerHead
from medfl_ray.store.ledger.mirror import LedgerMirror
from medfl_ray.store.state_folders import federation_mirror_folder, mirror_folder


class RunMirror:
    """The coordinator's copies of the ledgers of one run's hospitals."""

    def __init__(
        self, policies: Sequence[SitePolicy], run_folder: Path, root: Path, federation: tuple[str, str] | None = None
    ) -> None:
        """Take the hospitals; `root` is the run's `state_root`. Nothing is read or made yet.

        Args:
          federation: name and data set of the federation's own account, under hospital-level differential privacy.
        """
        folders = {policy.hospital: mirror_folder(policy, run_folder, root) for policy in policies}
        if federation is not None:
            folders[federation[0]] = federation_mirror_folder(policies, run_folder, root)
        mirrors = {folder: LedgerMirror(folder) for folder in set(folders.values())}
        self._mirrors = {hospital: mirrors[folder] for hospital, folder in folders.items()}
        self._data_sets = {policy.hospital: policy.data_set for policy in policies}
        if federation is not None:
            self._data_sets[federation[0]] = federation[1]
        self._heads: dict[str, str] = {}
        self._looked_up: set[str] = set()

    def heads(self, hospitals: Sequence[str]) -> dict[str, str]:
        """Return the last row seen of each hospital's ledger; nothing of a hospital that has shown none.

        Raises:
          LedgerError: the mirror was altered or cannot be read.
        """
        for hospital in hospitals:
            if hospital not in self._looked_up:
                self._looked_up.add(hospital)
                head = self._mirrors[hospital].head(hospital, self._data_sets[hospital])
                if head is not None:
                    self._heads[hospital] = str(head)
        return {hospital: self._heads[hospital] for hospital in hospitals if hospital in self._heads}

    def pin(self, keys: Mapping[str, str]) -> dict[str, str]:
        """Pin the key of each hospital's ledger, 64 hex digits, at first contact; a key that is pinned stays.

        Returns:
          Per hospital that shows another key than the pinned one, the reason and what to do.

        Raises:
          LedgerError: a mirror was altered, or cannot be written.
        """
        by_mirror: dict[LedgerMirror, dict[tuple[str, str], str]] = {}
        for hospital, public_key in keys.items():
            if hospital in self._mirrors:
                account = (hospital, self._data_sets[hospital])
                by_mirror.setdefault(self._mirrors[hospital], {})[account] = public_key
        problems: dict[str, str] = {}
        for mirror, accounts in by_mirror.items():
            problems |= {hospital: reason for (hospital, _), reason in mirror.pin(accounts).items()}
        return problems

    def keep(self, rows: Iterable[LedgerRows]) -> dict[str, str]:
        """Keep new rows, durable when this returns, in one write per mirror.

        Returns:
          Per hospital whose rows do not follow those kept, the reason.

        Raises:
          LedgerError: a mirror was altered, or cannot be written.
        """
        batches: dict[LedgerMirror, list[LedgerRows]] = {}
        problems: dict[str, str] = {}
        for some in rows:
            if self._data_sets.get(some.hospital) != some.data_set:
                problems[some.hospital] = f"the rows of hospital {some.hospital!r} belong to a data set not of this run"
            else:
                batches.setdefault(self._mirrors[some.hospital], []).append(some)
        for mirror, batch in batches.items():
            kept = mirror.keep_rows(batch)
            problems |= kept.problems
            self._heads |= {hospital: str(head) for hospital, head in kept.heads.items()}
        return problems

    def expected_heads(self, hospital: str, receipt_head: str | None = None) -> tuple[str, ...]:
        """Return the rows that a hospital's ledger must hold before it trains.

        The last row mirrored; and the last one of a receipt, where the mirror has never seen it.
        """
        expected = tuple(self.heads([hospital]).values())
        if receipt_head is None:
            return expected
        seen = self._mirrors[hospital].has_seen(hospital, self._data_sets[hospital], LedgerHead.parse(receipt_head))
        return expected if seen else (*expected, receipt_head)


def receipt_heads(receipts: Iterable[Receipt]) -> Mapping[str, str]:
    """Return the last ledger row that a run's receipts, in order, name of each hospital."""
    heads: dict[str, str] = {}
    for receipt in receipts:
        heads |= {name: spent.ledger_head for name, spent in receipt.spent.items() if spent.ledger_head is not None}
    return heads
