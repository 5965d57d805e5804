"""What an evaluation may ask for, given what the hospitals declare; asked before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence

from medfl_ray.config.run import RunConfig
from medfl_ray.config.site import SitePolicy
from medfl_ray.errors import ConfigError, PrivacyConfigError


def check_studies(run: RunConfig, policies: Sequence[SitePolicy]) -> None:
    """Refuse what suppressed scores cannot decide or show: of private data, under differential privacy.

    Raises:
      PrivacyConfigError: early stopping, the best round, a target, or a study needs such a score.
      ConfigError: a study needs more hospitals than there are.
    """
    evaluation = run.evaluation
    if evaluation.has_studies and len(policies) < 2:
        raise ConfigError(
            "evaluation.cross_site, leave_one_out and contributions compare hospitals; the run has "
            f"{len(policies)}: leave them out or add hospitals"
        )
    private = sorted(policy.hospital for policy in policies if policy.declared == "private")
    if not run.privacy.enable_dp or not private:
        return
    whose = f"under differential privacy the scores of private data ({_some(private)}) are suppressed"
    deciding = _deciding(run)
    if deciding:
        raise PrivacyConfigError(
            f"{' and '.join(deciding)} would decide by scores on held-out patients, and {whose}: deciding by them "
            "would be a release that nothing has paid for. Leave out what decides, or use public data"
        )
    if evaluation.leave_one_out or evaluation.contributions is not None:
        raise PrivacyConfigError(
            f"evaluation.leave_one_out and contributions compare scores of every hospital, and {whose}, so that their "
            "result could not be shown; each federation of fewer hospitals would be charged for nothing. Leave them out"
        )
    if evaluation.cross_site and len(private) == len(policies):
        raise PrivacyConfigError(
            f"evaluation.cross_site would train and charge a model per hospital, and {whose} at every hospital, so "
            "that nothing of it could be shown. Leave it out"
        )


def _deciding(run: RunConfig) -> list[str]:
    """Return the settings that choose by a score."""
    found = []
    if run.federation.patience is not None:
        found.append("federation.patience")
    if run.federation.keep == "best":
        found.append("federation.keep: best")
    if run.evaluation.target_dice is not None:
        found.append("evaluation.target_dice")
    return found


def _some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
