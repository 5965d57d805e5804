"""One patient more, less or other in a folder of private data changes nothing of any other patient."""

import os
from collections import Counter

import pytest
from neighbours import LAYOUTS, differences, neighbours, opened

NUM_PAIRS = 300
SAMPLE = 30


@pytest.mark.ci
@pytest.mark.timeout(600)
def test_hole_one_patient_moves_no_other(tmp_path):
    first = SAMPLE * (int(os.environ.get("MEDFL_SAMPLE", "0")) % (NUM_PAIRS // SAMPLE))
    assert _differing(tmp_path, range(first, first + SAMPLE)) == {}


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_hole_one_patient_moves_no_other_in_300_pairs(tmp_path):
    assert _differing(tmp_path, range(NUM_PAIRS)) == {}


def _differing(folder, seeds):
    found, layouts, usable = {}, Counter(), 0
    for seed in seeds:
        pair = neighbours(folder / str(seed), seed)
        layouts[pair.layout] += 1
        usable += sum(name.startswith("patient") for name in opened(pair.runs[0]))
        wrong = differences(pair)
        if wrong:
            found[seed, pair.layout] = wrong
    assert set(layouts) == set(LAYOUTS), "every layout has its turn"
    assert usable > 7 * len(seeds), "most patients are usable, else nothing was compared"
    return found
