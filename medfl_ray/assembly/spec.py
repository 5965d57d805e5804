"""What a process needs to build a hospital: settings and names, never data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from medfl_ray.config.run import RunConfig
from medfl_ray.config.site import SitePolicy
from medfl_ray.errors import LedgerError, PrivacyConfigError
from medfl_ray.federation.hospital_rules.agreement import Agreement
from medfl_ray.federation.hospital_rules.private_answers import is_confidential


@dataclass(frozen=True)
class HospitalSpec:
    """Settings and names from which a process builds one hospital, or the central baseline over several.

    `members` are the hospitals whose data it opens: itself, or all of them for the central baseline.
    `state_folder` holds the ledger; it belongs to the hospital and outlives the run unless data are synthetic.
    `pooled` are the hospitals whose own ledgers are charged instead, where several hospitals' data are pooled.
    `expected_heads` are rows that the ledger must hold, from the coordinator's mirror and the run's last receipt.
    `job` is the run's, under which what the hospital remembers of it is kept.
    `signing_seed` makes the key that signs updates where it keeps no ledger; otherwise the ledger's key signs.
    """

    run: RunConfig
    policy: SitePolicy
    index: int
    members: tuple[str, ...]
    state_folder: Path
    pooled: tuple[HospitalSpec, ...] = ()
    expected_heads: tuple[str, ...] = ()
    signing_seed: bytes | None = field(default=None, repr=False)
    job: str = ""


def agreement_of(spec: HospitalSpec) -> Agreement:
    """Return what a hospital agreed to: the run of its specification, and no other."""
    return Agreement(spec.run, spec.policy, spec.job, [member.policy for member in spec.pooled])


def keeps_account(spec: HospitalSpec) -> bool:
    """Whether the data set has a ledger: where patients are charged, and of private data always.

    What leaves private data without a charge stands there too.
    """
    return spec.run.privacy.patient_level or is_confidential(spec.policy)


def check_own_policy(spec: HospitalSpec) -> None:
    """Refuse a run that was planned with another policy than the one in the hospital's own file, which wins.

    Raises:
      PrivacyConfigError: the two differ.
      ConfigError: the file cannot be read.
    """
    from medfl_ray.data.sources import own_policy

    for member in spec.pooled:
        check_own_policy(member)
    own = None if spec.pooled else own_policy(spec.run, spec.policy.hospital)
    if own is not None and own != spec.policy:
        raise PrivacyConfigError(
            f"hospital {spec.policy.hospital!r} has another policy in its own file than the one with which this run "
            "was planned; start the run again with the file as it is now"
        )


def make_state_folder(spec: HospitalSpec) -> None:
    """Make the folder of a hospital's ledger, for its owner alone.

    Raises:
      LedgerError: it cannot be made.
    """
    try:
        spec.state_folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise LedgerError(
            f"cannot make the state folder of hospital {spec.policy.hospital!r}: {error.strerror}. Set "
            "output.state_directory or MEDFL_STATE_DIR to a folder that you may write to"
        ) from None
