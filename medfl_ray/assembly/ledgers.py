"""Opens the accounts of a run: hospitals' ledgers and memories, the federation's ledger, the coordinator's mirror."""

from __future__ import annotations

from pathlib import Path

from medfl_ray.assembly.spec import HospitalSpec, keeps_account, make_state_folder
from medfl_ray.config.run import RunConfig
from medfl_ray.config.site import SitePolicy
from medfl_ray.federation.hospital_level import FEDERATION, federation_budget, plan_hospital_level
from medfl_ray.federation.planning import account_delta, budget_of, is_for_one_run
from medfl_ray.federation.ports import Ledger, Memory, Signer
from medfl_ray.round_times import clock_of, has_secret_cohorts
from medfl_ray.store.ledger.events import LedgerHead
from medfl_ray.store.run.folder import RunFolder
from medfl_ray.store.run.mirror import RunMirror, receipt_heads
from medfl_ray.store.state_folders import federation_folder


def open_ledger(spec: HospitalSpec) -> Ledger:
    """Open a hospital's account, or for pooled data the accounts of all hospitals they come from.

    Raises:
      LedgerError: an account is damaged, locked, lacks an expected row, or its folder cannot be made.
    """
    from medfl_ray.store.ledger.account import PrivacyLedger
    from medfl_ray.store.ledger.pooled import PooledLedger

    def account(of: HospitalSpec) -> PrivacyLedger:
        make_state_folder(of)
        return PrivacyLedger.open(
            of.state_folder / "ledger.sqlite",
            hospital=of.policy.hospital,
            data_set=of.policy.data_set,
            delta=account_delta(of.run, of.policy),
            max_epsilon=budget_of(of.run, of.policy),
            one_run=is_for_one_run(of.policy),
            max_steps=of.policy.max_total_steps,
            expected_heads=[LedgerHead.parse(head) for head in of.expected_heads],
            allow_unprotected=of.policy.allow_unprotected,
        )

    return PooledLedger([account(member) for member in spec.pooled]) if spec.pooled else account(spec)


def open_memory(spec: HospitalSpec) -> Memory | None:
    """Return where the hospital keeps what it remembers of a run; None where the strategy remembers nothing."""
    from medfl_ray.store.run.hospital_memory import HospitalMemory

    if spec.pooled or not spec.run.aggregation.is_stateful:
        return None
    return HospitalMemory(spec.state_folder, spec.job, spec.run.output.keep_checkpoints)


def signing_key(spec: HospitalSpec) -> Signer | None:
    """Return the key that signs the hospital's updates; None for pooled data, which send no update."""
    from medfl_ray.store.ledger.file import KEY_NAME
    from medfl_ray.store.signing_key import SigningKey, load_key

    if keeps_account(spec) and not spec.pooled:
        return load_key(spec.state_folder / KEY_NAME)
    return SigningKey.from_seed(spec.signing_seed) if spec.signing_seed is not None else None


def expected_heads(
    run: RunConfig, policies: tuple[SitePolicy, ...], folder: Path, root: Path
) -> dict[str, tuple[str, ...]]:
    """Return the rows that each hospital's ledger must hold: of the mirror, and of the run's last receipt."""
    charged = [policy for policy in policies if run.privacy.patient_level or policy.declared == "private"]
    if not charged:
        return {}
    mirror = run_mirror(run, policies, folder, root)
    receipts = receipt_heads(RunFolder(folder, run).signed_receipts())
    return {
        policy.hospital: mirror.expected_heads(policy.hospital, receipts.get(policy.hospital)) for policy in charged
    }


def run_mirror(run: RunConfig, policies: tuple[SitePolicy, ...], folder: Path, root: Path) -> RunMirror:
    """Return the coordinator's copies of a run's ledgers, the federation's own among them where it has one."""
    return RunMirror(policies, folder, root, (FEDERATION, run.data.name) if run.privacy.hospital_dp else None)


def open_federation_ledger(run: RunConfig, policies: tuple[SitePolicy, ...], folder: Path, root: Path) -> Ledger:
    """Open the federation's account of hospital-level epsilon; it holds what mirror and last receipt have seen.

    Raises:
      LedgerError: the account is damaged, locked, or lacks such a row.
    """
    from medfl_ray.store.ledger.account import PrivacyLedger

    plan = plan_hospital_level(run, policies)
    assert plan is not None
    max_epsilon, one_run = federation_budget(run, policies)
    last = receipt_heads(RunFolder(folder, run).signed_receipts()).get(FEDERATION)
    expected = run_mirror(run, policies, folder, root).expected_heads(FEDERATION, last)
    own = federation_folder(policies, folder, root)
    own.mkdir(parents=True, exist_ok=True, mode=0o700)
    return PrivacyLedger.open(
        own / "ledger.sqlite",
        hospital=FEDERATION,
        data_set=run.data.name,
        delta=plan.delta,
        max_epsilon=max_epsilon,
        one_run=one_run,
        unit="hospital",
        expected_heads=[LedgerHead.parse(head) for head in expected],
        clock=clock_of(has_secret_cohorts(run)),
    )
