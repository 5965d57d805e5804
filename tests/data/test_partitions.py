from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfl_ray.config.data import PartitionConfig
from medfl_ray.data.cases import Case
from medfl_ray.data.layouts.partitions import partition_patients, split_holdout
from medfl_ray.errors import ConfigError, LayoutError


def cases_of(patients, **fields):
    return tuple(
        Case(p, f"{p}-{i}", (), None, fields={k: v(p) for k, v in fields.items()}) for i, p in enumerate(patients)
    )


@settings(deadline=None)
@given(
    patients=st.lists(st.integers(0, 30).map("p{}".format), min_size=20, max_size=60).filter(
        lambda p: len(set(p)) >= 8
    ),
    seed=st.integers(),
    by=st.sampled_from(["dirichlet", "iid"]),
    alpha=st.floats(0.05, 10),
)
def test_every_patient_is_at_one_hospital_on_one_side_whatever_the_order(patients, seed, by, alpha):
    cases = cases_of(patients)
    partition = PartitionConfig(by=by, num_hospitals=4, alpha=alpha)
    parts = partition_patients(cases, partition, seed)
    homes = {}
    for hospital, part in parts.items():
        train, holdout = split_holdout(part, 0.25, seed)
        assert {c.patient_id for c in train}.isdisjoint(c.patient_id for c in holdout)
        assert train
        assert holdout
        for case in part:
            assert homes.setdefault(case.patient_id, hospital) == hospital
    assert set(homes) == set(patients)
    assert sum(map(len, parts.values())) == len(cases)
    shuffled = list(cases)
    random.Random(1).shuffle(shuffled)
    again = partition_patients(tuple(shuffled), partition, seed)
    assert {h: {c.patient_id for c in part} for h, part in again.items()} == {
        h: {c.patient_id for c in part} for h, part in parts.items()
    }


def test_iid_sizes_differ_by_at_most_one():
    parts = partition_patients(cases_of([f"p{i}" for i in range(11)]), PartitionConfig(by="iid", num_hospitals=3), 0)
    assert sorted(map(len, parts.values())) == [3, 4, 4]


def test_small_alpha_skews_sizes():
    cases = cases_of([f"p{i}" for i in range(200)])
    sizes = {
        a: sorted(map(len, partition_patients(cases, PartitionConfig(by="dirichlet", alpha=a), 3).values()))
        for a in (0.2, 100)
    }
    assert sizes[0.2][-1] - sizes[0.2][0] > sizes[100][-1] - sizes[100][0]


def test_by_field_names_hospitals_after_its_values():
    parts = partition_patients(
        cases_of("abcd", site=lambda p: "St. Mary / 2" if p < "c" else "north"),
        PartitionConfig(by="field", field="site"),
        0,
    )
    assert {h: len(c) for h, c in parts.items()} == {"St.-Mary-2": 2, "north": 2}


def test_by_field_refuses_what_divides_a_patient():
    cases = (Case("p", "1", (), None, fields={"site": "a"}), Case("p", "2", (), None, fields={"site": "b"}))
    with pytest.raises(LayoutError, match="two values of 'site'"):
        partition_patients(cases, PartitionConfig(by="field", field="site"), 0)


def test_unknown_field_lists_the_known_ones():
    with pytest.raises(ConfigError, match="fields found: site"):
        partition_patients(cases_of("ab", site=str), PartitionConfig(by="field", field="ward"), 0)


def test_too_few_patients_for_the_hospitals():
    with pytest.raises(ConfigError, match="5 patients cannot be dealt to 3 hospitals"):
        partition_patients(cases_of("abcde"), PartitionConfig(by="iid", num_hospitals=3), 0)


def test_a_given_split_is_kept():
    cases = (Case("a", "1", (), None, "train"), Case("b", "2", (), None, "holdout"), Case("c", "3", (), None, None))
    train, holdout = split_holdout(cases, 0.9, 0)
    assert [c.patient_id for c in train] == ["a", "c"]
    assert [c.patient_id for c in holdout] == ["b"]


@pytest.mark.parametrize(("sides", "message"), [(("train", "train"), "evaluate"), (("holdout", "holdout"), "train")])
def test_a_split_with_an_empty_side_is_refused(sides, message):
    cases = tuple(Case(f"p{i}", str(i), (), None, side) for i, side in enumerate(sides))
    with pytest.raises(LayoutError, match=f"leaves no patient to {message} on"):
        split_holdout(cases, 0.5, 0)


def test_one_patient_more_never_moves_another_to_the_other_side():
    cases = [Case(f"p{i}", f"p{i}", (Path("x"),), None) for i in range(200)]
    _, before = split_holdout(cases[:-1], 0.25, 3, independently=True)
    train, after = split_holdout(cases, 0.25, 3, independently=True)
    assert {c.patient_id for c in after} - {"p199"} == {c.patient_id for c in before}
    assert 30 <= len(after) <= 70
    assert len(train) + len(after) == 200
