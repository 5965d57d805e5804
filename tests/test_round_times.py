"""The grid of times: rounding up by hand, whose times it is for, and files."""

import os
from datetime import UTC, datetime, timedelta, timezone

import pytest
from small_runs import small_run

from medfl_ray.round_times import GRID_S, clock_of, has_secret_cohorts, round_file_times, rounded_up, stamp


@pytest.mark.parametrize(
    ("moment", "expected"),
    [
        (datetime(2026, 3, 1, 10, 0, 0, tzinfo=UTC), "2026-03-01T10:00:00+00:00"),
        (datetime(2026, 3, 1, 10, 0, 0, 1, tzinfo=UTC), "2026-03-01T11:00:00+00:00"),
        (datetime(2026, 3, 1, 10, 59, 59, tzinfo=UTC), "2026-03-01T11:00:00+00:00"),
        (datetime(2026, 12, 31, 23, 30, tzinfo=UTC), "2027-01-01T00:00:00+00:00"),
        (datetime(2026, 3, 1, 10, 40, tzinfo=timezone(timedelta(hours=5, minutes=30))), "2026-03-01T06:00:00+00:00"),
    ],
)
def test_a_moment_is_rounded_up_to_a_full_hour_in_utc(moment, expected):
    assert stamp(rounded_up(moment)) == expected


def test_only_the_clock_of_a_secret_is_coarse():
    before = datetime.now(UTC)
    assert before <= clock_of(False)() <= datetime.now(UTC)
    assert clock_of(True)() in (rounded_up(before), rounded_up(datetime.now(UTC)))
    assert clock_of(True)().timestamp() % GRID_S == 0


@pytest.mark.parametrize(
    ("unit", "fraction", "level", "secret"),
    [
        ("hospital", 0.5, {}, True),
        ("hospital", 1.0, {}, False),
        ("hospital", 1.0, {"mechanism": "tree", "rounds_per_tree": 1}, False),
        ("patient", 0.5, None, False),
    ],
)
def test_cohorts_are_secret_where_sampling_amplifies(unit, fraction, level, secret):
    privacy = {"enable_dp": True, "unit": unit, "noise_multiplier": 2.0}
    if level is not None:
        privacy["hospital_level"] = level
    assert has_secret_cohorts(small_run(privacy=privacy, federation={"fraction": fraction, "rounds": 1})) is secret


def test_times_of_files_and_folders_are_rounded_up_and_a_link_is_not_followed(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    file, outside, link = folder / "file", tmp_path / "outside", folder / "link"
    for path in (file, outside):
        path.write_text("")
    link.symlink_to(outside)
    os.utime(file, (7201.5, 7201.5))
    os.utime(outside, (10.0, 10.0))
    round_file_times([file, link, folder, folder / "gone"])
    assert file.stat().st_mtime_ns == 3 * GRID_S * 10**9
    assert [path.lstat().st_mtime_ns % (GRID_S * 10**9) for path in (link, folder)] == [0, 0]
    assert outside.stat().st_mtime == 10.0
