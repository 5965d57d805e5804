"""medfl-ray privacy audit: attack a run's mechanism and say what that proves compared with what is claimed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from medfl_ray.errors import ConfigError, DataError, PrivacyConfigError

if TYPE_CHECKING:
    from medfl_ray.privacy.audit_record import AuditRecord, MechanismAudit, MembershipAttack
    from medfl_ray.store.run.folder import RunFolder


def audit(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    canaries: Annotated[
        int | None, typer.Option(help="Artificial patients put into the private steps; chosen by the claim if absent.")
    ] = None,
    confidence: Annotated[float, typer.Option(help="Confidence of the lower bound.")] = 0.95,
    membership: Annotated[
        bool, typer.Option(help="Also attack the final model where the data are public or synthetic.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print audit.json instead of sentences.")] = False,
) -> None:
    """Put canaries through a run's private steps and print a lower bound on epsilon; the report is written anew.

    Nothing is charged: the canaries are artificial, and no private image is read.
    """
    from medfl_ray.privacy.audit_record import AUDIT_FILE
    from medfl_ray.store.run.folder import RunFolder

    if not 0 < confidence < 1:
        raise PrivacyConfigError(f"--confidence is {confidence:g}; it must lie between 0 and 1, such as 0.95")
    folder = RunFolder.open(run)
    record = _audit(folder, canaries, confidence, membership)
    folder.save_json(AUDIT_FILE, record.model_dump(mode="json"))
    if (folder.path / "report.html").is_file():
        from medfl_ray.analytics.report import write_report

        write_report(folder.path)
    typer.echo(record.model_dump_json(indent=1) if as_json else "\n".join(_sentences(record)))
    if record.mechanism is not None and record.mechanism.is_exceeded:
        typer.echo(_alarm(record.mechanism), err=True)
        raise typer.Exit(1)


def _audit(folder: RunFolder, canaries: int | None, confidence: float, membership: bool) -> AuditRecord:
    from medfl_ray.data.sources import list_hospitals
    from medfl_ray.federation.planning import mechanisms
    from medfl_ray.federation.studies.auditing import audit_mechanism, audit_subject, enough_canaries
    from medfl_ray.privacy.audit_record import AuditRecord

    results = folder.results()
    rounds = len({result.round for result in results if result.receipt.published})
    if not rounds:
        raise PrivacyConfigError(
            f"the run {folder.path.name!r} has published no round, so that there is nothing to audit; continue it "
            "with medfl-ray run --resume"
        )
    policies = list_hospitals(folder.run)
    mechanism, note = None, "the run had no patient-level differential privacy, so that there is no claim to attack"
    if mechanisms(folder.run, policies):
        subject = audit_subject(folder.run, policies, results)
        num_canaries = canaries if canaries is not None else enough_canaries(subject)
        mechanism, note = audit_mechanism(subject, num_canaries, confidence), ""
    attack, why_not = _attack(folder, confidence) if membership else (None, "left out, with --no-membership")
    return AuditRecord(
        rounds=rounds, mechanism=mechanism, mechanism_note=note, membership=attack, membership_note=why_not
    )


def _attack(folder: RunFolder, confidence: float) -> tuple[MembershipAttack | None, str]:
    """Attack the final model where no patient can be harmed by it; otherwise say why it was not done."""
    from medfl_ray.data.sources import list_hospitals, open_hospital_data
    from medfl_ray.export.package import read_package
    from medfl_ray.export.weights import load_weights
    from medfl_ray.training.scoring.membership import attack_membership
    from medfl_ray.training.trainer import Trainer

    run = folder.run
    hospitals = tuple(policy.hospital for policy in list_hospitals(run) if policy.declared != "private")
    if not hospitals:
        return None, (
            "not computed: all data are private, and how a model's loss differs between patients would be a release "
            "of its own"
        )
    if not (folder.path / "model.safetensors").is_file():
        return None, "not computed: the run has not ended, so that there is no final model"
    try:
        data = open_hospital_data(run, hospitals)
        package = read_package(folder.path, run, data)
        shape = (package.spatial_dims, package.num_channels, package.out_channels, package.patch_size)
        trainer = Trainer(package.model, run.training, package.task, *shape, for_dp=False)
        weights = load_weights(folder.path / "model.safetensors", trainer.layout)
        return attack_membership(trainer, weights, data, confidence), ""
    except (ConfigError, DataError) as error:
        return None, f"not computed: {error}"


def _sentences(record: AuditRecord) -> list[str]:
    from medfl_ray.analytics.audit_words import audit_facts

    return [f"{name}: {words}" for name, words in audit_facts(record)]


def _alarm(mechanism: MechanismAudit) -> str:
    from medfl_ray.analytics.audit_words import alarm

    return f"ALARM: {alarm(mechanism)}"
