"""A game about one patient: an adversary who controls the coordinator asks a hospital up to a thousand things.

A coin decides whether the patient is in the hospital's data. The adversary knows every other patient, the patient, the
run and how long each piece of work takes; it sees every answer but charged updates, and when each came. Twelve
adversaries look for one thing each, a thirteenth learns from the transcripts of other games.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from private_hospitals import EDGE, Clock, first_weights, plan_for, private_run, write_manifest, write_patients

from medfl_ray.assembly.hospital import build_hospital
from medfl_ray.assembly.spec import HospitalSpec
from medfl_ray.data.sources import list_hospitals, open_hospital_data
from medfl_ray.errors import MedflError
from medfl_ray.federation.hospital_rules.answer_times import AnswerTimes, answer_step_s
from medfl_ray.federation.ports import AlonePlan
from medfl_ray.messages import ClientFailure

MAX_REQUESTS = 1000
RANDOM = {"delta", "weights", "public_key", "signature", "at", "hash", "previous_hash", "head", "ledger_head"}
RANDOM |= {"reservation", "closes", "ledger_rows", "events"}
"""Parts of answers that are charged, or keys, hashes, random names and times of day."""
KINDS = ("ordinary", "bright", "missing file", "unreadable file", "unknown label", "other shape", "no label", "doubled")


@dataclass(frozen=True)
class Said:
    """One request and its answer: what was asked, the answer without what is random or charged, and its time in s."""

    asked: str
    answer: Any
    time_s: float

    @property
    def text(self) -> str:
        """The answer as text."""
        return json.dumps(self.answer, sort_keys=True, default=str)

    @property
    def failed(self) -> bool:
        """Whether it is a failure."""
        return isinstance(self.answer, dict) and "reason" in self.answer


@dataclass
class Transcript:
    """Everything that an adversary saw in one game, and what it knew beforehand."""

    num_others: int
    num_others_held_out: int
    cost_s: float
    step_s: float
    said: list[Said] = field(default_factory=list)

    def of(self, *asked: str) -> list[Said]:
        """The answers to some kinds of requests."""
        return [one for one in self.said if one.asked in asked]


def plain(answer: Any) -> Any:
    """Return an answer as plain data, without what is charged or random."""
    if hasattr(answer, "model_dump"):
        answer = answer.model_dump()
    elif hasattr(answer, "__dataclass_fields__"):
        answer = {name: getattr(answer, name) for name in answer.__dataclass_fields__}
    if isinstance(answer, dict):
        return {str(name): plain(value) for name, value in answer.items() if name not in RANDOM}
    if isinstance(answer, list | tuple):
        return [plain(value) for value in answer]
    if isinstance(answer, np.ndarray):
        return None
    return answer if isinstance(answer, str | int | float | bool | type(None)) else str(answer)


def add_patient(folder: Path, rows: Sequence[str], kind: str, task: str, rng: np.random.Generator) -> list[str]:
    """Return the rows with one patient more, of a kind that could make a difference."""
    edge = EDGE + 5 if kind == "other shape" else EDGE
    picture = rng.integers(0, 90, (edge, edge)).astype(np.uint8)
    mask = np.zeros((edge, edge), np.uint8)
    mask[4:9, 4:9] = 7 if kind == "unknown label" else 1
    if kind == "bright":
        picture[3:13, 3:13] = 255
    Image.fromarray(picture).save(folder / "x.png")
    Image.fromarray(mask).save(folder / "x-mask.png")
    if kind == "unreadable file":
        (folder / "x.png").write_bytes(b"no picture at all")
    image = {"missing file": "gone.png", "doubled": "0.png"}.get(kind, "x.png")
    label = "x-mask.png" if task == "segmentation" else "9" if kind == "unknown label" else "1"
    return [*rows, f"p999,{image},{'' if kind == 'no label' else label}"]


class Game:
    """One pair of neighbouring data sets and one hospital that has one of them."""

    def __init__(self, folder: Path, seed: int) -> None:
        rng = np.random.default_rng([seed, 19])
        self.task = "classification" if seed % 8 == 7 else "segmentation"
        self.num_others = int(rng.integers(20, 200))
        self.is_in = bool(rng.integers(2))
        rows = write_patients(folder / "images", self.num_others, self.task, seed)
        more = add_patient(folder / "images", rows, KINDS[seed % len(KINDS)], self.task, rng)
        write_manifest(folder / "images", more if self.is_in else rows)
        hospital = {"id": "a", "directory": str(folder / "images"), "num_patients": self.num_others // 10 * 10}
        self.run = private_run(
            folder / "images",
            self.task,
            data={"hospitals": [{**hospital, "max_epsilon": 50}]},
            privacy={"enable_dp": True, "noise_multiplier": 2.0, "epsilon": 8.0, "extra_epsilon": 8.0},
            federation={"rounds": 3, "local_steps": 1, "pool": "local", "baselines": ["local"]},
        )
        self.policy = list_hospitals(self.run)[0]
        self.folder, self.rng, self.clock = folder, rng, Clock()
        self.cost_s = float(10 ** rng.uniform(-3.5, -1.0))
        self.times = AnswerTimes(self.clock.now, self.clock.sleep)
        held_out = sum(_is_held_out(row.split(",")[0], self.run) for row in rows[1:])
        self.transcript = Transcript(self.num_others, held_out, self.cost_s, answer_step_s(self.policy))

    def play(self) -> Transcript:
        """Ask everything and return the transcript."""
        hospital = self.ask("describe", self.build)
        if not isinstance(hospital, ClientFailure | str):
            self.transcript.said.append(Said("info", plain(hospital.info()), 0.0))
            for ask in (self.evaluations, self.plans, self.last_scores, self.baselines, self.exports):
                ask(hospital)
            self.ask("describe", self.build)
        assert len(self.transcript.said) <= MAX_REQUESTS
        return self.transcript

    def ask(self, asked: str, request: Callable[[], Any]) -> Any:
        """Make one request and write down what the adversary sees of it."""
        started = self.clock.time
        try:
            answer = request()
        except MedflError as error:
            answer = {"reason": str(error)}
        shown = plain(answer) if asked != "describe" or isinstance(answer, dict) else {}
        self.transcript.said.append(Said(asked, shown, self.clock.time - started))
        return str(answer) if isinstance(answer, dict) and "reason" in answer else answer

    def build(self) -> Any:
        """Build the hospital; reading and scoring its patients takes time by their number."""

        def opened(run: Any, members: tuple[str, ...]) -> Any:
            data = open_hospital_data(run, members)
            check = data.check_cases

            def check_cases() -> None:
                self.clock.sleep(self.cost_s * (self.num_others + self.is_in))
                check()

            data.check_cases = check_cases
            return data

        spec = HospitalSpec(self.run, self.policy, 0, ("a",), self.folder / "state", job="job")
        hospital = build_hospital(spec, opened, times=self.times)
        evaluate = hospital._parts.trainer.evaluate

        def timed(weights: Any, data: Any) -> Any:
            self.clock.sleep(self.cost_s * len(data.holdout))
            return evaluate(weights, data)

        hospital._parts.trainer.evaluate = timed
        return hospital

    def weights_of_choice(self, hospital: Any) -> list[np.ndarray]:
        """Return weights that an adversary would have scored: broken, overflowing, scaled and random ones."""
        honest = first_weights(hospital)
        broken = [np.full_like(honest, value) for value in (np.nan, np.inf, -np.inf, 0.0, 3e38)]
        scaled = [(honest.astype(np.float64) * 10.0**power).astype(np.float32) for power in np.linspace(-5, 38, 40)]
        drawn = [self.rng.normal(0, 10.0**power, honest.shape).astype(np.float32) for power in (-2, 0, 2, 10, 30)]
        return [honest, *broken, *scaled, *drawn]

    def evaluations(self, hospital: Any) -> None:
        for repeat in range(14):
            for weights in self.weights_of_choice(hospital):
                number = repeat % 4
                self.ask("evaluate", lambda w=weights, n=number: hospital.evaluate(n, w))

    def last_scores(self, hospital: Any) -> None:
        for weights in self.weights_of_choice(hospital)[:20]:
            self.ask("final", lambda w=weights: hospital.evaluate(3, w, pictures=True))

    def plans(self, hospital: Any) -> None:
        weights = first_weights(hospital)
        for number in (1, 2, 3):
            plan = plan_for(hospital, number)
            self.ask("reserve", lambda p=plan: hospital.reserve(p))
            self.ask("reserve", lambda p=plan: hospital.reserve(p))
            if number == 1:
                self.ask("release", lambda p=plan: hospital.release(p, "not needed"))
                again = plan_for(hospital, number, attempt=2)
                self.ask("reserve", lambda p=again: hospital.reserve(p))
                plan = again
            sent = np.full_like(weights, np.nan) if number == 3 else weights
            self.ask("train", lambda p=plan, w=sent: hospital.train(p, w))
            self.ask("train", lambda p=plan: hospital.train(p, weights))
            self.ask("release", lambda p=plan: hospital.release(p, "after training"))
        for fields in ({"job": "other"}, {"number": 99}, {"num_steps": {"a": 500}}, {"mechanisms": {}}, {"attempt": 7}):
            plan = plan_for(hospital, **{"number": 1, **fields})
            self.ask("reserve", lambda p=plan: hospital.reserve(p))
            self.ask("train", lambda p=plan: hospital.train(p, weights))

    def baselines(self, hospital: Any) -> None:
        weights = first_weights(hospital)
        for job in ("job/local", "other/local", "job/central"):
            rounds = tuple(plan_for(hospital, number, job=job) for number in (1, 2, 3))
            self.ask("alone", lambda r=rounds: hospital.train_alone(AlonePlan(r, True), weights))

    def exports(self, hospital: Any) -> None:
        for _ in range(5):
            self.ask("export", hospital.export_ledger)
        self.transcript.said.append(Said("rows", len(hospital.export_ledger()["events"]), 0.0))


def _is_held_out(patient: str, run: Any) -> bool:
    from medfl_ray.data.layouts.partitions import patient_draw

    return patient_draw(patient, run.federation.seed) < run.data.holdout_fraction


def padded(step_s: float, work_s: float) -> float:
    """Return when an answer leaves that took so long, as docs/privacy.md says."""
    while work_s > step_s * (1 + 1e-12):
        step_s *= 2
    return step_s


def _excess(found: float, expected: float) -> int:
    """Return 1 where more is there than without the patient, -1 for less, 0 where nothing tells."""
    return 0 if math.isclose(found, expected, rel_tol=1e-9, abs_tol=1e-9) else 1 if found > expected else -1


def _sign_of_time(found: float, t: Transcript, num_others: int) -> int:
    """Compare a time with that of the work without the patient: padded as is promised, or as it is where it is not."""
    expected = padded(t.step_s, t.cost_s * num_others)
    steps = math.log2(found / t.step_s) if found > 0 else 0.5
    is_padded = math.isclose(steps, round(steps), abs_tol=1e-6)
    return _excess(found, expected) if is_padded else _excess(found, t.cost_s * (num_others + 0.5))


def failing_scores(t: Transcript) -> int:
    return _excess(sum(one.failed for one in t.of("evaluate", "final")), 0)


def different_scores(t: Transcript) -> int:
    return _excess(len({one.text for one in t.of("evaluate")}), 4)


def figures_that_are_shown(t: Transcript) -> int:
    values = [m["value"] for one in t.of("evaluate", "final") for m in one.answer.get("metrics", {}).values()]
    return _excess(sum(value is not None for value in values), 0)


def time_of_scores(t: Transcript) -> int:
    return _excess(sum(one.time_s for one in t.of("evaluate")), 0.0)


def time_of_last_scores(t: Transcript) -> int:
    longest = max((one.time_s for one in t.of("final")), default=0.0)
    return _sign_of_time(longest, t, t.num_others_held_out)


def time_of_description(t: Transcript) -> int:
    return _sign_of_time(t.of("describe")[0].time_s, t, t.num_others)


def what_is_described(t: Transcript) -> int:
    info = t.of("info")[0].answer if t.of("info") else {}
    return _excess(info.get("num_patients", 0), t.num_others // 10 * 10)


def failing_starts(t: Transcript) -> int:
    return _excess(sum(one.failed for one in t.of("describe", "info")), 0)


def charges(t: Transcript) -> int:
    spent = [
        one.answer["epsilon"] for one in t.of("reserve") if isinstance(one.answer, dict) and "epsilon" in one.answer
    ]
    return _excess(len(spent), 5) or _excess(t.of("rows")[0].answer if t.of("rows") else 0, 16)


def failing_rounds(t: Transcript) -> int:
    reasons = Counter(one.answer["reason"] for one in t.of("train", "reserve") if one.failed)
    own = sum("private data" in reason or "log" in reason for reason in reasons)
    return _excess(own, 1)  # weights that are not numbers fail whatever the data are


def figures_of_training(t: Transcript) -> int:
    fields = [one.answer for one in t.of("train") if not one.failed]
    values = [m["value"] for answer in fields for m in [*answer["metrics"].values(), answer["duration"]]]
    steps = [answer["num_steps"] for answer in fields]
    return _excess(sum(value is not None for value in values), 0) or _excess(sum(steps), 3)


def baselines_and_exports(t: Transcript) -> int:
    alone = t.of("alone")
    shown = [m["value"] for one in alone if not one.failed for m in one.answer["metrics"].values()]
    took = sum(one.time_s for one in alone)
    same = len({one.text for one in t.of("export")})
    expected = 3 * padded(3 * t.step_s, 0.0)
    return _excess(sum(v is not None for v in shown), 0) or _excess(took, expected) or _excess(same, 1)


ADVERSARIES: tuple[Callable[[Transcript], int], ...] = (
    failing_scores,
    different_scores,
    figures_that_are_shown,
    time_of_scores,
    time_of_last_scores,
    time_of_description,
    what_is_described,
    failing_starts,
    charges,
    failing_rounds,
    figures_of_training,
    baselines_and_exports,
)


def features(t: Transcript) -> list[float]:
    """Return what the learning adversary looks at: of each kind of request counts, sizes, failures and times."""
    found: list[float] = [t.num_others / 100, math.log10(t.cost_s)]
    for asked in ("describe", "info", "evaluate", "final", "reserve", "release", "train", "alone", "export"):
        said = t.of(asked)
        times = [one.time_s / t.step_s for one in said] if asked != "train" else [0.0]
        found += [len(said), sum(one.failed for one in said), sum(len(one.text) for one in said) / 100]
        found += [len({one.text for one in said}), sum(times), max(times, default=0.0)]
    return found


@dataclass(frozen=True)
class Played:
    """What is kept of one game: the coin, the sign that each adversary saw, and what the learning one looks at."""

    is_in: bool
    signs: tuple[int, ...]
    features: tuple[float, ...]


def play(folder: Path, seed: int) -> Played:
    """Play one game in a folder of its own."""
    game = Game(folder, seed)
    transcript = game.play()
    signs = tuple(adversary(transcript) for adversary in ADVERSARIES)
    return Played(game.is_in, signs, tuple(features(transcript)))


def right_guesses(games: Sequence[Played], seed: int) -> dict[str, int]:
    """Return how often every adversary is right; where one sees nothing, it tosses a coin."""
    coins = np.random.default_rng(seed)
    found: dict[str, int] = {}
    for place, adversary in enumerate(ADVERSARIES):
        tossed = coins.integers(2, size=len(games))
        pairs = zip(games, tossed, strict=True)
        made = [game.signs[place] > 0 if game.signs[place] else bool(coin) for game, coin in pairs]
        found[adversary.__name__] = sum(guess == game.is_in for guess, game in zip(made, games, strict=True))
    found["classifier"] = sum(
        guess == game.is_in for guess, game in zip(learned_guesses(games, seed), games, strict=True)
    )
    return found


def learned_guesses(games: Sequence[Played], seed: int) -> list[bool]:
    """Return what boosted trees guess of each game, learned from the other folds."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    table, truth = np.array([game.features for game in games]), np.array([game.is_in for game in games])
    folds = StratifiedKFold(4, shuffle=True, random_state=seed)
    model = HistGradientBoostingClassifier(max_iter=30, min_samples_leaf=5, random_state=seed)
    return [bool(guess) for guess in cross_val_predict(model, table, truth, cv=folds)]


def interval(right: int, num_games: int) -> tuple[float, float]:
    """Return the exact interval of a rate of right guesses: 99.6 %, so that 13 of them hold together with 95 %."""
    from scipy.stats import binomtest

    bounds = binomtest(right, num_games).proportion_ci(0.996)
    return float(bounds.low), float(bounds.high)


def winners(games: Sequence[Played], seed: int) -> dict[str, float]:
    """Return the rate of right guesses of every adversary whose interval does not contain a half."""
    rates = {}
    for name, right in right_guesses(games, seed).items():
        low, high = interval(right, len(games))
        if not low <= 0.5 <= high:
            rates[name] = right / len(games)
    return rates
