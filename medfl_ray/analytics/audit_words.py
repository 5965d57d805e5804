"""An audit in words: what it proved compared with what is claimed, and what it cannot say."""

from __future__ import annotations

from medfl_ray.privacy.account import epsilon_words
from medfl_ray.privacy.audit_record import AuditedEpsilon, AuditRecord, MechanismAudit, MembershipAttack

NOT_AUDITED = "not audited"
UNIT = "patient-level"


def audit_tile(record: AuditRecord | None) -> str:
    """Return the few words that stand under the claim."""
    if record is None or record.mechanism is None:
        return NOT_AUDITED
    found = record.mechanism.headline
    words = f"at least {found.lower_bound:.2f} by an audit, {_percent(record.mechanism.confidence)} confidence"
    return f"CLAIM REFUTED: {words}" if record.mechanism.is_exceeded else words


def alarm(mechanism: MechanismAudit) -> str:
    """Return the loud sentence for a bound above the claim."""
    found = mechanism.headline
    return (
        f"the audit refutes the claim. At least epsilon = {found.lower_bound:.2f} is lost and {found.claimed:.2f} is "
        f"claimed ({_terms(found)}, {_percent(mechanism.confidence)} confidence). Do not release the model, stop "
        "training with this installation, and report the defect."
    )


def audit_facts(record: AuditRecord | None) -> list[tuple[str, str]]:
    """Return everything that the audit found, with what each figure means."""
    if record is None:
        return [("Audit", f"{NOT_AUDITED}; medfl-ray privacy audit puts canaries through this run's mechanism")]
    facts = []
    if record.mechanism is None:
        facts.append(("Audit", f"{NOT_AUDITED}: {record.mechanism_note}"))
    else:
        facts += _mechanism_facts(record.mechanism)
    words = _membership_words(record.membership) if record.membership else record.membership_note
    return [*facts, ("Membership inference", words)] if words else facts


def _mechanism_facts(mechanism: MechanismAudit) -> list[tuple[str, str]]:
    found = mechanism.headline
    facts = [
        (
            "Claimed for the rounds",
            f"epsilon = {epsilon_words(found.claimed)} ({_terms(found)}) at {', '.join(mechanism.hospitals)}; "
            "baselines, studies and other runs come on top",
        ),
        (
            "Lower bound",
            f"epsilon >= {found.lower_bound:.2f} at {_percent(mechanism.confidence)} confidence ({_terms(found)}): "
            f"{found.num_correct:,} of {found.num_guessed:,} guesses right, {mechanism.num_canaries:,} canaries in "
            f"{mechanism.num_steps} private steps",
        ),
        ("Verdict", alarm(mechanism) if mechanism.is_exceeded else _verdict(mechanism)),
    ]
    estimate = mechanism.gaussian_estimate
    shown = f"epsilon = {estimate:.2f}" if estimate is not None else "no finite epsilon"
    facts.append(
        (
            "Gaussian-canary estimate",
            f"{shown} ({_terms(mechanism.at[0])}) for someone who sees the sum of all steps; an estimate, not a bound",
        )
    )
    facts.append(("Cost", "nothing was charged: the canaries are artificial patients, and no private image was read"))
    return facts


def _verdict(mechanism: MechanismAudit) -> str:
    if mechanism.could_exceed:
        return "the claim was not refuted; so many canaries would have refuted it had every guess been right"
    most = max(epsilon.ceiling for epsilon in mechanism.at)
    return (
        f"the claim was not refuted, and could not have been: flawless guesses on so many canaries prove no more than "
        f"epsilon = {most:.2f} ({UNIT}, add/remove). Raise --canaries"
    )


def _membership_words(attack: MembershipAttack) -> str:
    return (
        f"AUC {attack.auc:.3f} ({_percent(attack.confidence)} interval {attack.low:.3f} to {attack.high:.3f}) for "
        f"telling {attack.num_members} training patients from {attack.num_others} held-out ones by the final model's "
        "loss; 0.5 is chance"
    )


def _terms(found: AuditedEpsilon) -> str:
    return f"{UNIT}, delta = {found.delta:.2g}, add/remove".replace("e-0", "e-")


def _percent(confidence: float) -> str:
    return f"{100 * confidence:g} %"
