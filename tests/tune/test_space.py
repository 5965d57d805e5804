"""The schema of a search: what goes together, and what a trial's parameters change of its run."""

import pytest
from search_cases import RUN, plan_of, search_of

from medfl_ray.errors import ConfigError
from tune.space import base_run, trial_run, widened, with_parameters

ALL = {
    "noise_multiplier": {"low": 1, "high": 4},
    "learning_rate": {"low": 0.01, "high": 0.1},
    "clip_norm": {"low": 0.1, "high": 1},
    "local_steps": {"low": 1, "high": 3},
    "strategy": {"choices": ["fedavg", "fedadam"]},
    "width": {"low": 2, "high": 6},
}
POINT = {
    "noise_multiplier": 2.0,
    "learning_rate": 0.02,
    "clip_norm": 0.3,
    "local_steps": 3,
    "strategy": "fedadam",
    "width": 6,
}


def test_every_parameter_reaches_its_field_of_the_run(tmp_path):
    search = search_of(tmp_path, space=ALL)
    assert set(search.space.distributions()) == set(ALL) == set(POINT)
    run = with_parameters(search, base_run(search), POINT)
    assert (run.privacy.noise_multiplier, run.privacy.epsilon, run.privacy.max_grad_norm) == (2.0, None, 0.3)
    assert (run.training.learning_rate, run.federation.local_steps) == (0.02, 3)
    assert (run.aggregation.strategy, run.aggregation.server_learning_rate) == ("fedadam", 0.01)
    assert run.model.features == (6, 12)


def test_a_trial_has_the_searchs_data_and_nothing_beside_the_federation(tmp_path):
    phantom = {"phantom": {"preset": "balls", "num_hospitals": 5, "size_voxels": 16}, "spatial_dims": 2}
    final = {**RUN, "federation": {**RUN["federation"], "baselines": ["local"]}}
    search = search_of(tmp_path, final, data=phantom, pool="virtual", cpus_per_trial=2)
    run = trial_run(search, base_run(search), {"epsilon": 4.0})
    assert run.data.phantom.num_hospitals == 5
    assert (run.federation.baselines, run.federation.pool, run.federation.num_actors) == ((), "virtual", 2)
    assert with_parameters(search, base_run(search), {"epsilon": 4.0}).data.phantom.num_hospitals == 2


def test_a_networks_levels_keep_their_ratio():
    assert widened((4, 8, 16), 3) == (3, 6, 12)
    assert widened((8, 8), 1) == (1, 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"space": {}}, "space is empty"),
        ({"space": {"epsilon": {"low": 4, "high": 2}}}, "low must be the smaller"),
        ({"space": {**ALL, "epsilon": {"low": 1, "high": 2}}}, "keep one"),
        ({"space": {"learn_rate": {"low": 1, "high": 2}}}, "did you mean 'learning_rate'"),
        ({"space": {"strategy": {"choices": ["fedavg", "krum"]}}}, "fedadam"),
        ({"accounting": "select"}, "give num_trials instead of trials"),
        ({"accounting": "select", "num_trials": {"mean": 4}}, "sampler 'tpe' learns from earlier ones"),
        (
            {"accounting": "select", "num_trials": {"mean": 4}, "sampler": "random", "stopping": "median"},
            "stopping 'median' compares",
        ),
        ({"accounting": "select", "num_trials": {"mean": 4, "distribution": "uniform"}}, "num_trials.distribution"),
        ({"num_trials": {"mean": 4}}, "num_trials belongs to accounting: select"),
        ({"accounting": "compose", "max_concurrent": 2}, "one trial at a time"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_reason(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        search_of(tmp_path, **changes)


def test_selection_is_accepted_where_its_theorem_holds(tmp_path):
    sound = {"accounting": "select", "num_trials": {"distribution": "poisson", "mean": 4}, "sampler": "random"}
    assert search_of(tmp_path, **sound).num_trials.mean == 4


def test_the_noise_of_a_trial_is_written_out_so_that_an_interruption_does_not_end_it(tmp_path):
    run, policies = plan_of(tmp_path).run_for({"epsilon": 8.0, "learning_rate": 0.05})
    assert run.privacy.epsilon is None
    assert run.privacy.noise_multiplier > 0
    assert len(policies) == 2
