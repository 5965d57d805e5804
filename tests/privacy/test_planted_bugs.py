"""Privacy bugs of 22 kinds planted in a copy of the package: the ordinary tests must catch each of them.

A bug is a change of text in the real code. What it replaces must be there exactly once, so that no bug vanishes
unseen when the code moves on; then follow it here.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from warm import WarmParent, warm_parent

pytestmark = [pytest.mark.ci, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
PARTS = ("medfl_ray", "actors", "tests", "pyproject.toml")
LIBRARIES = (
    "torch", "torch.func", "scipy.stats", "pandas", "sklearn.metrics", "sqlalchemy", "opacus", "nibabel", "pydicom",
    "highdicom", "dp_accounting.pld.pld_privacy_accountant", "pydantic", "cryptography.x509", "PIL.Image", "typer",
    "structlog", "yaml", "safetensors.torch", "pytest",
)  # fmt: skip
"""What the tests import besides the package itself, so that no bug's process does it again."""
CAUGHT = re.compile(r"[Aa]ssert|DID NOT RAISE|NotFitForDP")

SUM, SAMPLER, NOISE = "privacy/dpsgd.py", "privacy/sampler.py", "privacy/noise.py"
ACCOUNTANT, ENGINES, TRAINER = "privacy/accountant.py", "training/gradients/patient_gradients.py", "training/trainer.py"
EVENTS, LEDGER = "store/ledger/events.py", "store/ledger/account.py"

IN_SUM, IN_NOISE, IN_SAMPLER = ("tests/privacy/test_" + name for name in ("dpsgd.py::", "noise.py::", "sampler.py::"))
IN_STEPS, IN_GRADIENTS = "tests/training/test_private_steps.py::", "tests/training/test_patient_gradients.py::"
IN_ENGINES, IN_COUPLING = "tests/training/test_engine_choice.py::", "tests/training/test_coupling.py::"
IN_ACCOUNTANT, IN_PLANNING = "tests/privacy/test_accountant.py::", "tests/federation/test_planning.py::"
IN_LEDGER, IN_SCHEDULES = "tests/store/test_ledger.py::", "tests/store/test_ledger_schedules.py::"

ANSWERS, PLANNING = "federation/hospital_rules/private_answers.py", "federation/planning.py"
IN_BOUNDARY, IN_AGREEMENT = (f"tests/federation/test_{name}.py::" for name in ("hospital_boundary", "agreement"))
IN_MIRRORED = "tests/federation/test_mirrored_runs.py::"
BUDGETS, MIRROR = "store/ledger/budgets.py", "store/ledger/mirror.py"
IN_KEYS, IN_VERIFICATION = (f"tests/store/test_{name}.py::" for name in ("mirror_keys", "run_verification"))


@dataclass(frozen=True)
class Bug:
    """One change, `edits` of (file, old text, new text), and the tests of which every one must fail under it."""

    kind: str
    edits: tuple[tuple[str, str, str], ...]
    caught_by: tuple[str, ...]


RELEASE = "noised = self._total() + torch.from_numpy(self._noise.draw(self._num_parameters, std))"
DRAWN = "        for gradient in gradients(step.draw()):\n"
INDICES = "return np.flatnonzero(uniform < self._sample_rate)"
CHARGED = "return tuple(charged.values())"

TIMES_OF_SECRETS = (
    "tests/federation/test_secret_cohorts.py::test_hole_times_of_a_secret_cohort_are_full_hours_in_every_file"
)

BUGS = {
    "no noise": Bug(
        "no noise",
        ((SUM, RELEASE, "noised = self._total().clone()"),),
        (
            IN_SUM + "test_an_empty_step_is_noised_with_the_right_deviation",
            IN_STEPS + "test_weights_move_by_the_charged_noise",
        ),
    ),
    "half of sigma, in the step": Bug(
        "sigma/2",
        ((SUM, "std = mechanism.noise_multiplier * mechanism", "std = mechanism.noise_multiplier / 2 * mechanism"),),
        (
            IN_SUM + "test_noise_of_a_full_step_has_the_same_deviation",
            IN_STEPS + "test_weights_move_by_the_charged_noise",
        ),
    ),
    "half of sigma, in the draws": Bug(
        "sigma/2",
        ((NOISE, "values *= std / math.sqrt(NUM_SUMMED)", "values *= std / NUM_SUMMED"),),
        (IN_NOISE + "test_chi_square_on_a_hundred_thousand_coordinates",),
    ),
    "the batch is clipped, not the patient": Bug(
        "clip of the batch",
        (
            (SUM, "scale = min(1.0, self._mechanism.max_grad_norm / norm) if norm > 0 else 1.0", "scale = 1.0"),
            (
                SUM,
                "noised = self._total() +",
                "noised = self._total() * min(1.0, mechanism.max_grad_norm / max(float(self._total().norm()), 1e-9)) +",
            ),
        ),
        (
            IN_SUM + "test_a_hand_computed_step",
            IN_GRADIENTS + "test_one_patient_more_moves_the_sum_by_at_most_the_clip_norm",
        ),
    ),
    "the loss is one over all patients of a group": Bug(
        "coupled loss",
        (
            (
                ENGINES,
                "torch.autograd.grad(losses.sum(), trained_parameters(members))",
                "torch.autograd.grad(self._loss(torch.cat(list(own_logits)), torch.cat([t for _, t in some]))"
                " * len(some), list(members.parameters()))",
            ),
        ),
        (IN_COUPLING + "test_networks_of_the_catalogue_keep_patients_apart", IN_ENGINES + "test_same_clipped_sum"),
    ),
    "every patch is clipped by itself": Bug(
        "patch as unit",
        (
            (
                TRAINER,
                "engine(self._draw(data, int(index), rng) for index in drawn)",
                "engine((image[None], target[None]) for index in drawn"
                " for image, target in zip(*self._draw(data, int(index), rng), strict=True))",
            ),
        ),
        (
            IN_GRADIENTS + "test_one_patient_more_moves_the_sum_by_at_most_the_clip_norm[4]",
            IN_GRADIENTS + "test_one_patient_more_moves_the_sum_by_at_most_the_clip_norm[16]",
        ),
    ),
    "nothing is released when nobody is drawn": Bug(
        "skipped empty batch",
        (
            (
                SUM,
                DRAWN,
                "        drawn = step.draw()\n"
                "        if len(drawn) == 0:\n"
                "            yield torch.zeros(num_parameters, dtype=torch.float64)\n"
                "            continue\n"
                "        for gradient in gradients(drawn):\n",
            ),
        ),
        (
            IN_STEPS + "test_a_step_that_draws_nobody_touches_nobody_and_is_noised",
            "tests/training/test_trainer.py::test_dp_step_without_patients_moves_by_noise",
        ),
    ),
    "only the last round counts": Bug(
        "accountant reset each round",
        ((EVENTS, CHARGED, CHARGED + "[-1:]"),),
        (
            IN_LEDGER + "test_the_account_outlives_restarts_jobs_and_experiments",
            IN_LEDGER + "test_the_data_set_budget_holds_over_all_jobs",
        ),
    ),
    "the noise has a key that never changes": Bug(
        "seeded noise",
        (
            (NOISE, "algorithms.AES(os.urandom(32))", "algorithms.AES(bytes(32))"),
            (NOISE, "modes.CTR(os.urandom(16))", "modes.CTR(bytes(16))"),
        ),
        (
            IN_NOISE + "test_no_seed_reaches_the_noise",
            "tests/training/test_trainer.py::test_dp_step_without_patients_moves_by_noise",
        ),
    ),
    "twice as many are drawn as charged": Bug(
        "wrong q",
        (
            (
                SUM,
                "PoissonSampler(mechanism.sample_rate)",
                "PoissonSampler(min(1.0, 2 * mechanism.sample_rate))",
            ),
        ),
        (IN_STEPS + "test_patients_are_drawn_as_the_accountant_assumes",),
    ),
    "half of q is accounted": Bug(
        "wrong q",
        ((ACCOUNTANT, "PoissonSampledDpEvent(q, step)", "PoissonSampledDpEvent(q / 2, step)"),),
        (IN_ACCOUNTANT + "test_prv_pin", IN_ACCOUNTANT + "test_prv_and_renyi_bound_it_from_above"),
    ),
    "half of q is charged": Bug(
        "wrong q",
        (
            (
                EVENTS,
                "self.noise_multiplier, self.sample_rate, self",
                "self.noise_multiplier, self.sample_rate / 2, self",
            ),
        ),
        (IN_SCHEDULES + "test_sampled_steps_are_charged_at_their_rate",),
    ),
    "half of q is planned": Bug(
        "wrong q",
        (("federation/planning.py", "batch_size / policy.num_patients)", "batch_size / policy.num_patients / 2)"),),
        (IN_PLANNING + "test_the_rate_is_the_batch_over_the_public_number_of_patients",),
    ),
    "sampled steps are approximated by a Gaussian": Bug(
        "GDP accountant",
        (
            (
                ACCOUNTANT,
                "    looser = renyi_epsilon(history, delta)\n",
                "    from opacus.accountants.analysis.gdp import compute_mu_poisson, eps_from_mu\n"
                "    mus = [compute_mu_poisson(steps=n, noise_multiplier=s, sample_rate=q) for s, q, n in history]\n"
                "    return float(eps_from_mu(mu=math.hypot(*mus), delta=delta))\n",
            ),
        ),
        (IN_ACCOUNTANT + "test_prv_pin", IN_ACCOUNTANT + "test_prv_and_renyi_bound_it_from_above"),
    ),
    "the accountant that understates may be asked for": Bug(
        "GDP accountant",
        (
            ("config/privacy.py", 'value.lower() in ("gdp", "clt")', "False"),
            ("config/privacy.py", 'accountant: Literal["pld"]', 'accountant: Literal["pld", "gdp"]'),
        ),
        ("tests/cli/test_bad_input.py::test_wrong_configuration[an accountant that understates]",),
    ),
    "a shuffled pass in training": Bug(
        "shuffle accounted as Poisson",
        (
            (
                SUM,
                "self._sampler = PoissonSampler(mechanism.sample_rate)",
                "from medfl_ray.training.batches import patient_batches\n"
                "        size = max(1, round(mechanism.sample_rate * num_patients))\n"
                "        self._shuffled = patient_batches(num_patients, size, np.random.default_rng())",
            ),
            (SUM, "self._sampler.draw(self._num_patients)", "next(self._shuffled)"),
        ),
        (
            IN_STEPS + "test_patients_are_drawn_as_the_accountant_assumes",
            IN_STEPS + "test_steps_of_one_round_are_drawn_anew",
        ),
    ),
    "batches of one size in the sampler": Bug(
        "shuffle accounted as Poisson",
        ((SAMPLER, INDICES, "return np.sort(np.argsort(uniform)[: round(self._sample_rate * num_patients)])"),),
        (IN_SAMPLER + "test_every_patient_comes_at_the_rate_and_sizes_are_binomial",),
    ),
    "somebody is drawn when nobody is": Bug(
        "random record on empty batch",
        (
            (
                SAMPLER,
                INDICES,
                "drawn = np.flatnonzero(uniform < self._sample_rate)\n"
                "        return drawn if len(drawn) or not num_patients else np.array([np.argmin(uniform)])",
            ),
        ),
        (
            IN_SAMPLER + "test_nobody_may_be_drawn_and_nobody_twice",
            IN_STEPS + "test_a_step_that_draws_nobody_touches_nobody_and_is_noised",
        ),
    ),
    "the sampler follows the global seed": Bug(
        "seeded sampler",
        ((SAMPLER, "os.urandom(8 * num_patients)", "np.random.bytes(8 * num_patients)"),),
        (IN_SAMPLER + "test_no_seed_reaches_the_sampler", IN_STEPS + "test_the_seed_does_not_tell_who_is_drawn"),
    ),
    "the sampler has a seed of its own": Bug(
        "seeded sampler",
        ((SAMPLER, "os.urandom(8 * num_patients)", "np.random.default_rng(0).bytes(8 * num_patients)"),),
        (IN_SAMPLER + "test_no_seed_reaches_the_sampler", IN_STEPS + "test_the_seed_does_not_tell_who_is_drawn"),
    ),
    "another job opens a new budget": Bug(
        "key and rows of the account",
        ((BUDGETS, "(*charged_segments(rows), segment)", "(*charged_segments(rows, wanted.job), segment)"),),
        (
            IN_LEDGER + "test_the_data_set_budget_holds_over_all_jobs",
            IN_LEDGER + "test_the_budget_is_the_data_sets_whatever_its_files_hold",
        ),
    ),
    "a row says what the data hold": Bug(
        "key and rows of the account",
        (
            (
                LEDGER,
                "reservation=reservation, **mechanism.model_dump())",
                "reservation=reservation, fingerprint=self._file.key.fingerprint(map(str, "
                "self._file.path.parent.iterdir())), **mechanism.model_dump())",
            ),
        ),
        (IN_LEDGER + "test_hole_no_new_row_tells_what_the_data_hold",),
    ),
    "a new history may leave charges out": Bug(
        "empty recovery",
        ((MIRROR, "    if problem:\n", "    if False:\n"),),
        (
            IN_KEYS + "test_hole_a_new_history_carries_over_every_charge_of_the_old_one",
            IN_KEYS + "test_hole_an_unprotected_account_does_not_become_finite_in_a_new_history",
        ),
    ),
    "what recovery has charged may be given back": Bug(
        "empty recovery",
        ((EVENTS, 'if state == "again" and event.kind == "release":', "if False:"),),
        (IN_KEYS + "test_hole_what_recovery_has_charged_again_is_never_given_back",),
    ),
    "rows are taken under whatever key they come": Bug(
        "unpinned key",
        ((MIRROR, "if pinned and pinned[-1] != rows.public_key:", "if False:"),),
        (
            IN_KEYS + "test_hole_a_recover_row_under_a_new_key_does_not_empty_the_account",
            IN_KEYS + "test_the_key_of_the_first_contact_is_pinned",
        ),
    ),
    "an export is verified under the key that it names itself": Bug(
        "unpinned key",
        (
            ("store/run/verification.py", "    if not compared:\n", "    if False:\n"),
            ("store/run/verification.py", "if public_key not in allowed:", "if False:"),
        ),
        (
            IN_VERIFICATION + "test_hole_an_added_export_of_a_hospital_that_nobody_knows_fails",
            IN_VERIFICATION + "test_an_export_with_nothing_to_pin_its_key_asks_for_something",
        ),
    ),
    "the series that all patients share name the channels": Bug(
        "coupled channels",
        (
            (
                "data/layouts/catalogue.py",
                "    if named is None:\n        from medfl_ray.data.layouts.dicom_folder",
                "    if True:\n        from medfl_ray.data.layouts.dicom_folder",
            ),
        ),
        ("tests/data/test_private_holes.py::test_hole_a_dicom_patient_with_other_series_or_segments_moves_nobody",),
    ),
    "a scoring that fails is answered with its failure": Bug(
        "leaking failure",
        (
            (
                "federation/hospital.py",
                "return suppressed_scores(self._parts, round, weights, pictures, self._score)",
                'return self._guarded(round, 0, "evaluate", False, lambda: self._score(round, weights, pictures))',
            ),
        ),
        (IN_BOUNDARY + "test_hole_a_scoring_that_raises_is_answered_like_one_that_succeeds",),
    ),
    "a spent budget lets raw updates pass": Bug(
        "unbound non-DP",
        ((PLANNING, "if policy.max_epsilon is not None or has_charges:", "if False:"),),
        (
            IN_BOUNDARY + "test_hole_a_declared_budget_binds_what_has_no_patient_level_privacy",
            IN_AGREEMENT + "test_hole_a_budget_or_a_charge_binds_runs_without_differential_privacy",
        ),
    ),
    "receipts of a secret cohort say when the round ended": Bug(
        "timestamps",
        (("federation/rounds.py", "clock_of(context.secret_cohorts)()", "clock_of(False)()"),),
        (TIMES_OF_SECRETS,),
    ),
    "the journal says when the rounds of a secret cohort began": Bug(
        "timestamps",
        (("store/run/journal.py", "clock_of(not plan.hospitals)()", "clock_of(False)()"),),
        (TIMES_OF_SECRETS,),
    ),
    "files say when the rounds of a secret cohort ended": Bug(
        "timestamps",
        (("round_times.py", "if rounded_ns != changed_ns:", "if False:"),),
        (
            "tests/federation/test_secret_cohorts.py::test_hole_files_of_a_secret_cohort_were_changed_at_full_hours",
            "tests/test_round_times.py::test_times_of_files_and_folders_are_rounded_up_and_a_link_is_not_followed",
        ),
    ),
    "rows are taken from whoever sends them": Bug(
        "foreign rows",
        (
            (
                "federation/round_context.py",
                "own = {sender, *members}",
                "own = {sender, *members, *(rows.hospital for rows in (spent.ledger_rows if spent else ()))}",
            ),
        ),
        (IN_MIRRORED + "test_hole_rows_of_another_hospital_are_not_taken_and_its_sender_takes_no_part",),
    ),
    "an error of private data leaves in its own words": Bug(
        "unfiltered error",
        (
            (
                ANSWERS,
                "if isinstance(error, PrivacyError) or (isinstance(error, MedflError) and not "
                "is_confidential(policy)):",
                "if isinstance(error, MedflError):",
            ),
        ),
        (IN_BOUNDARY + "test_hole_no_error_after_the_data_were_opened_tells_what_it_was",),
    ),
}


def test_planted_bugs_are_of_22_kinds() -> None:
    assert len({bug.kind for bug in BUGS.values()}) == 22


@pytest.fixture(scope="module")
def warm() -> Iterator[WarmParent]:
    """The parent of every process that tests a copy: it has imported libraries, and nothing of the package."""
    with warm_parent(LIBRARIES, environment(ROOT)) as parent:
        yield parent


@pytest.fixture(scope="module")
def sound(warm: WarmParent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of package and tests without a bug, compiled, in which every test that is to catch one passes."""
    folder = tmp_path_factory.mktemp("sound")
    for part in PARTS:
        copy(ROOT / part, folder / part, shutil.copy2)
    failed = run_tests(warm, folder, sorted({test for bug in BUGS.values() for test in bug.caught_by}))
    assert failed == {}
    return folder


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_caught(warm: WarmParent, sound: Path, tmp_path: Path, name: str) -> None:
    bug = BUGS[name]
    for part in PARTS:
        copy(sound / part, tmp_path / part, os.link)
    for file, old, new in bug.edits:
        replace_once(tmp_path / "medfl_ray" / file, old, new)
    failed = run_tests(warm, tmp_path, bug.caught_by)
    missed = [
        test for test in bug.caught_by if not any(found.split("[")[0] == test or found == test for found in failed)
    ]
    assert missed == []
    assert all(CAUGHT.search(why) for why in failed.values()), failed


def copy(source: Path, target: Path, copy_file: Callable[[Path, Path], object]) -> None:
    if source.is_dir():
        shutil.copytree(source, target, copy_function=copy_file)
    else:
        copy_file(source, target)


def replace_once(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, f"{path.name} holds {text.count(old)} times: {old}"
    path.unlink()  # the file may be a link to the sound one
    path.write_text(text.replace(old, new))


def environment(folder: Path) -> dict[str, str]:
    """Return what a copy's tests run in; they keep what they compile, so that a bug's copy finds it."""
    own = {"PYTHONPATH": str(folder), "COLUMNS": "1000", "OMP_NUM_THREADS": "1"}
    return {
        **{key: value for key, value in os.environ.items() if key not in ("PYTEST_ADDOPTS", "PYTHONDONTWRITEBYTECODE")},
        **own,
    }


def run_tests(warm: WarmParent, folder: Path, tests: Iterable[str]) -> dict[str, str]:
    """Return the failed tests with the first line of why; whatever else goes wrong fails the test itself."""
    command = ["pytest", "-q", "-rfE", "--tb=line", "-m", "", "-p", "no:cacheprovider", *tests]
    process = warm.start(*command, env=environment(folder), cwd=folder)
    out, err = process.communicate(timeout=500)
    assert process.returncode in (0, 1), out + err  # anything else is not a test that failed
    assert not re.search(r"^ERROR ", out, re.MULTILINE), out
    lines = re.findall(r"^FAILED (.*?) - (.*)$", out, re.MULTILINE)
    assert bool(lines) == bool(process.returncode), out
    return dict(lines)
