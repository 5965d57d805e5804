"""A run whose hospitals are Flower nodes: the same loop, receipts and ledgers as any other. Imports no Flower."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path

import structlog

from actors.flower.pool import FlowerPool, Link, check_flower_run
from actors.flower.rule import with_flower
from medfl_ray.assembly.ledgers import expected_heads
from medfl_ray.assembly.run import run_in_process
from medfl_ray.assembly.tracking import tracked
from medfl_ray.config.files import load_run_config
from medfl_ray.errors import ConfigError, MedflError, QuorumLost
from medfl_ray.federation.events import Event, HospitalState, Notice, RoundClosed
from medfl_ray.federation.run import RunOutcome
from medfl_ray.store.run.folder import RunFolder
from medfl_ray.store.state_folders import state_root

WAIT_S = 120.0
log = structlog.get_logger()


def run_over_flower(link: Link, settings: Mapping[str, object]) -> RunOutcome:
    """Run or resume a federation over Flower.

    Args:
      settings: of the app: `run`, the YAML file of a new run, or `resume`, the folder of an earlier one; `wait-s`, how
        long hospitals that are not there yet are waited for.

    Raises:
      ConfigError: the settings or the run are wrong.
      MedflError: the run cannot start or cannot go on; what was published before is kept.
    """
    from medfl_ray.data.sources import list_hospitals

    file, earlier = str(settings.get("run", "")), str(settings.get("resume", ""))
    if not file and not earlier:
        raise ConfigError('the Flower app names no run; set run = "/path/of/run.yaml" or resume = "/runs/FOLDER"')
    run = RunFolder.open(Path(earlier)).run if earlier else load_run_config(file)
    policies = tuple(list_hospitals(run))  # a mistake is found before a folder is made
    check_flower_run(run)
    folder = RunFolder.open(Path(earlier)) if earlier else RunFolder.create(run)
    with folder.locked():
        try:
            heads = expected_heads(run, policies, folder.path, state_root(run))
            pool = FlowerPool(link, run, policies, folder.job, heads, float(str(settings.get("wait-s", WAIT_S))))
            emit = tracked(run, folder.path, tell)
            outcome = run_in_process(run, policies, folder.path, pool, emit, threading.Event(), with_flower(run, emit))
        except MedflError:
            folder.discard_if_unused()
            raise
        if outcome.completed:
            leave_results(folder)
    log.info("run_ended", folder=folder.path.name, weights=outcome.weights_checksum[:16], reason=outcome.reason)
    if not outcome.completed:
        raise QuorumLost(outcome.reason)
    return outcome


def leave_results(folder: RunFolder) -> None:
    """Write the model's package and the report, where the run asks for them."""
    if folder.run.output.export:
        from medfl_ray.export.onnx_export import export_run

        export_run(folder.path)
    if folder.run.output.report:
        from medfl_ray.analytics.report import write_report

        write_report(folder.path)


def tell(event: Event) -> None:
    """Write the run's progress to the log of the ServerApp."""
    if isinstance(event, Notice):
        log.info(event.message)
    elif isinstance(event, HospitalState) and event.state in ("failed", "left_out"):
        log.warning("hospital", hospital=event.hospital, state=event.state, reason=event.detail)
    elif isinstance(event, RoundClosed):
        receipt = event.result.receipt
        log.info("round", round=event.result.round, trained=len(receipt.trained), published=receipt.published)
