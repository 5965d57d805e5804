"""What the hospitals' ledgers say of their data sets before a search, and after it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from medfl_ray.config.run import RunConfig
from medfl_ray.config.site import SitePolicy
from medfl_ray.federation.planning import account_delta
from medfl_ray.privacy.accountant import Charge, epsilon_spent


@dataclass(frozen=True)
class Past:
    """What each hospital's ledger holds already, and whose epsilon is infinite, whatever is charged to it."""

    charged: Mapping[str, tuple[Charge, ...]] = field(default_factory=dict)
    unprotected: frozenset[str] = frozenset()

    def epsilon(self, hospital: str, delta: float) -> float:
        """Return what the data set has spent, infinite where it was used without patient-level protection."""
        return math.inf if hospital in self.unprotected else epsilon_spent(self.charged.get(hospital, ()), delta)


def past_of(run: RunConfig, policies: Sequence[SitePolicy], folder: Path) -> Past:
    """Read each hospital's ledger; a hospital that has none yet has no past.

    Args:
      folder: of the search.

    Raises:
      LedgerError: a ledger is damaged.
    """
    from medfl_ray.store.ledger.account import PrivacyLedger
    from medfl_ray.store.ledger.events import charged_segments, unprotected_jobs
    from medfl_ray.store.ledger.file import LEDGER_NAME
    from medfl_ray.store.state_folders import hospital_folder, state_root

    charged, unprotected = {}, set()
    for policy in policies:
        path = hospital_folder(policy, folder, state_root(run)) / LEDGER_NAME
        if not path.is_file():
            continue
        delta = account_delta(run, policy)
        events = PrivacyLedger.open(path, policy.hospital, policy.data_set, delta, policy.max_epsilon).events()
        charged[policy.hospital] = charged_segments(events)
        if unprotected_jobs(events):
            unprotected.add(policy.hospital)
    return Past(charged, frozenset(unprotected))


def largest_known(
    worst_case: Mapping[str, float], history: Past, run: RunConfig, policies: Sequence[SitePolicy]
) -> dict[str, float]:
    """Return per hospital the worst case that was checked, or what its ledger holds by now where that is more.

    Another run may have used the same data while the search ran.
    """
    return {
        policy.hospital: max(
            worst_case.get(policy.hospital, 0.0), history.epsilon(policy.hospital, account_delta(run, policy))
        )
        for policy in policies
    }
