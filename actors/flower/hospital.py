"""A hospital behind a Flower SuperNode: which one the node is, and its answers. This file imports no Flower.

A SuperNode may run every message in a process of its own. What a hospital must not forget between two of them (its
ledger, its open reservations, the key under which it signs) is therefore in files of its state folder.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import structlog

from actors.flower.messages import HospitalReply, HospitalRequest, Identity
from medfl_ray.assembly.hospital import build_hospital
from medfl_ray.assembly.spec import HospitalSpec
from medfl_ray.config.files import load_run_config
from medfl_ray.config.run import RunConfig
from medfl_ray.errors import ConfigError, FederationError, LedgerError, MedflError
from medfl_ray.federation.hospital import Hospital
from medfl_ray.federation.hospital_rules.failures import start_failure
from medfl_ray.messages import ClientFailure, Mechanism
from medfl_ray.params import Vector
from medfl_ray.store.durable import replace_file
from medfl_ray.store.state_folders import hospital_folder, state_root

KEY_FILE, RESERVATIONS_FILE = "flower_signing_key", "flower_reservations.json"
AGREED_FILE = "flower_agreed_runs.json"
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
Settings = Mapping[str, object]
Reservation = tuple[str, Mechanism]
RoundKey = tuple[str, int, int]
log = structlog.get_logger()


@dataclass(frozen=True)
class Node:
    """What a SuperNode is to us: a hospital, and the run's YAML file; `is_own` where the node itself named both.

    `executions` is how many times the hospital lets its run file be carried out on private data.
    """

    hospital: str
    run_file: Path
    is_own: bool = False
    executions: int = 1


def node_of(node: Settings, app: Settings) -> Node:
    """Read which hospital a node is, and where its run file is.

    A node with `hospital` in its configuration belongs to an organisation: it names its own run file too, since what
    it trains is not for the coordinator to say. In Flower's simulation, where one machine is all nodes, the node's
    partition-id counts the run's hospitals and the app's own setting names the file.

    Raises:
      ConfigError: neither is there.
    """
    if "hospital" in node:
        if "run" not in node:
            raise ConfigError(
                "the SuperNode names its hospital but no run file; start it with --node-config "
                '\'hospital="NAME" run="/path/of/run.yaml"\''
            )
        return Node(str(node["hospital"]), Path(str(node["run"])), True, _executions(node.get("executions", 1)))
    if "partition-id" not in node or "run" not in app:
        raise ConfigError(
            "the node does not say which hospital it is; start the SuperNode with --node-config "
            '\'hospital="NAME" run="/path/of/run.yaml"\''
        )
    from medfl_ray.data.sources import list_hospitals

    file, number = Path(str(app["run"])), int(str(node["partition-id"]))
    names = [policy.hospital for policy in list_hospitals(load_run_config(file))]
    if number >= len(names):
        raise ConfigError(f"the simulation has more nodes than the run has hospitals ({len(names)}); start fewer")
    return Node(names[number], file)


def _executions(value: object) -> int:
    if not str(value).isdecimal() or int(str(value)) < 1:
        raise ConfigError(f"the SuperNode's 'executions' is {value!r}; expected a whole number from 1")
    return int(str(value))


def answer(text: str, weights: Vector | None, node: Settings, app: Settings) -> HospitalReply:
    """Answer one request, which is JSON; whatever goes wrong is a failure with a reason that holds no identifier."""
    try:
        request = HospitalRequest.model_validate(json.loads(text))
    except (ValueError, RecursionError) as error:
        return start_failure("", f"the request cannot be read ({type(error).__name__}); install the same version")
    number, attempt = (request.plan.round, request.plan.attempt) if request.plan is not None else (request.round, 0)
    try:
        known = node_of(node, app)
        if request.ask == "who":
            return Identity(hospital=known.hospital)
        return ask_hospital(request, weights, known)
    except MedflError as error:
        return start_failure(request.hospital, error, number, attempt)
    except Exception:
        log.exception("flower_node_failed", ask=request.ask, hospital=request.hospital)
        reason = "the hospital's node failed; its own log has the details"
        return start_failure(request.hospital, reason, number, attempt)


def ask_hospital(request: HospitalRequest, weights: Vector | None, node: Node) -> HospitalReply:
    """Ask this node's hospital, which is built first where the process is new.

    Raises:
      ConfigError: the request is for another hospital or run.
      FederationError: it lacks what it needs.
      MedflError: the hospital cannot start.
    """
    run = load_run_config(node.run_file)
    check_request(request, run, node)
    hospital = hospital_of(node, request.job)
    if request.ask == "describe":
        hospital.check_expected(request.expected_heads)
        return hospital.info()
    if request.ask == "ledger":
        return hospital.export_ledger()
    if request.plan is not None and request.ask == "reserve":
        return hospital.reserve(request.plan)
    if request.plan is not None and request.ask == "release":
        hospital.release(request.plan, request.reason)
        return None
    if request.plan is not None and request.ask == "train" and weights is not None:
        return hospital.train(request.plan, weights)
    if request.ask == "evaluate" and weights is not None:
        return hospital.evaluate(request.round, weights, request.pictures)
    if request.ask == "alone" and weights is not None:
        return hospital.train_alone(request.alone_plan, weights)
    raise FederationError(f"the request {request.ask!r} lacks its plan or its weights")


def check_request(request: HospitalRequest, run: RunConfig, node: Node) -> None:
    """Refuse what is not meant for this hospital and the run that it agreed to.

    Raises:
      ConfigError: with what differs.
    """
    if request.hospital != node.hospital:
        raise ConfigError(f"the request is for {request.hospital!r}; this node is {node.hospital!r}")
    if request.config_hash != run.config_hash:
        raise ConfigError(
            f"the run file of {node.hospital!r} is not the coordinator's: what influences the result differs. Give "
            "both sides the same file; data folders and output may differ"
        )
    if not SAFE_NAME.fullmatch(request.job):
        raise ConfigError("the name of the run is no plain file name, and the hospital makes a folder of it")


@lru_cache(maxsize=4)
def hospital_of(node: Node, job: str) -> Hospital:
    """Build this node's hospital for a run, in folders of the node's own machine.

    Nothing that a request says but the job is part of it: else each new value would have all images read again.

    Raises:
      MedflError: as of `build_hospital`.
    """
    from medfl_ray.data.sources import list_hospitals

    run = load_run_config(node.run_file)
    policies = list_hospitals(run)
    index = next((place for place, policy in enumerate(policies) if policy.hospital == node.hospital), None)
    if index is None:
        raise ConfigError(f"the run file has no hospital {node.hospital!r}; the node's configuration must name one")
    policy = policies[index]
    if policy.declared == "private" and not node.is_own:
        raise ConfigError(
            f"hospital {node.hospital!r} has private data, and its node does not say itself what it trains; start the "
            'SuperNode with --node-config \'hospital="NAME" run="/path/of/run.yaml"\''
        )
    root = state_root(run)
    folder = hospital_folder(policy, root / "flower" / job, root)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if policy.declared == "private":
        agree(folder / AGREED_FILE, run.config_hash, job, node)
    spec = HospitalSpec(
        run,
        policy,
        index,
        (policy.hospital,),
        folder,
        signing_seed=None if run.privacy.patient_level else signing_seed(folder / KEY_FILE),
        job=job,
    )
    return build_hospital(spec, reservations=KeptReservations(folder / RESERVATIONS_FILE))


def agree(file: Path, config_hash: str, job: str, node: Node) -> None:
    """Note durably which job carries out the hospital's run file, or refuse one more: a new name is a new budget.

    Raises:
      ConfigError: the run file was carried out as often as the hospital allows.
      LedgerError: the record cannot be read.
    """
    try:
        agreed: dict[str, list[str]] = json.loads(file.read_text()) if file.is_file() else {}
        known = [str(name) for name in agreed.get(config_hash, [])]
    except (OSError, ValueError, AttributeError, TypeError):
        raise LedgerError(
            f"{file.name} in the hospital's state folder cannot be read; restore it from a backup"
        ) from None
    if job in known:
        return
    if len(known) >= node.executions:
        raise ConfigError(
            f"the run file of hospital {node.hospital!r} was carried out already, as {', '.join(known)}; its epsilon "
            "is for one run. To let it be carried out once more, the hospital starts its SuperNode with "
            f"executions={len(known) + 1} in --node-config"
        )
    replace_file(file, json.dumps({**agreed, config_hash: [*known, job]}, indent=1).encode(), private=True)


def signing_seed(file: Path) -> bytes:
    """Return 32 secret bytes of a file that its owner alone may read; they are drawn where there is none."""
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return _read_seed(file)
    with os.fdopen(descriptor, "wb") as stream:
        seed = secrets.token_bytes(32)
        stream.write(seed)
    return seed


def _read_seed(file: Path) -> bytes:
    seed = file.read_bytes()
    if len(seed) != 32:
        raise LedgerError(f"{file.name} in the hospital's state folder is damaged; remove it and start the run again")
    return seed


class KeptReservations(MutableMapping[RoundKey, Reservation]):
    """Open reservations of a hospital's ledger in a file, for the next process to settle or release."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __getitem__(self, key: RoundKey) -> Reservation:
        return self._read()[key]

    def __setitem__(self, key: RoundKey, reservation: Reservation) -> None:
        self._write({**self._read(), key: reservation})

    def __delitem__(self, key: RoundKey) -> None:
        self._write({other: kept for other, kept in self._read().items() if other != key})

    def __iter__(self) -> Iterator[RoundKey]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def _read(self) -> dict[RoundKey, Reservation]:
        if not self._file.is_file():
            return {}
        try:
            rows = json.loads(self._file.read_text())
            return {(job, n, a): (name, Mechanism.model_validate(of)) for job, n, a, name, of in rows}
        except (ValueError, TypeError):
            raise LedgerError(
                f"{self._file.name} in the hospital's state folder cannot be read; remove it: what was reserved stays "
                "charged, and the next round reserves anew"
            ) from None

    def _write(self, reservations: Mapping[RoundKey, Reservation]) -> None:
        rows = [[*key, name, mechanism.model_dump()] for key, (name, mechanism) in reservations.items()]
        replace_file(self._file, json.dumps(rows).encode(), private=True)


def failure_of(hospital: str, reason: str, request: HospitalRequest) -> ClientFailure:
    """Say what became of a request that nobody answered, at the stage that it was for."""
    plan = request.plan
    number, attempt = (plan.round, plan.attempt) if plan is not None else (request.round, 0)
    trains = request.ask in ("train", "alone")
    stage = "train" if trains else "evaluate" if request.ask in ("evaluate", "ledger") else "reserve"
    if request.ask in ("who", "describe"):
        return start_failure(hospital, reason)
    return ClientFailure.model_validate(
        {
            "hospital": hospital,
            "round": number,
            "attempt": attempt,
            "stage": stage,
            "reason": reason,
            "may_have_left": trains,
        }
    )
