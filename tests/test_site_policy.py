"""hospital_config.yaml becomes the policy that wins over any job."""

import pytest

from medfl_ray.config.site import SitePolicy, default_delta, load_site_config


def test_every_limit_of_the_file_reaches_the_policy(tmp_path):
    path = tmp_path / "hospital_config.yaml"
    path.write_text(
        """
hospital: {id: north}
data: {directory: images, data_set: gliomas}
privacy:
  enable_dp: true
  epsilon: 8
  delta: 1.0e-6
  num_patients: 60
  num_cases: 90
  min_noise_multiplier: 1.5
  max_grad_norm: 0.5
  max_steps_per_round: 10
  max_total_steps: 200
  allowed_tasks: [segmentation]
"""
    )
    policy = load_site_config(path).policy
    assert policy == SitePolicy(
        hospital="north",
        data_set="gliomas",
        num_patients=60,
        num_cases=90,
        max_epsilon=8.0,
        delta=1e-6,
        min_noise_multiplier=1.5,
        max_grad_norm=0.5,
        max_steps_per_round=10,
        max_total_steps=200,
        allowed_tasks=("segmentation",),
        require_dp=True,
    )
    assert not {name for name in SitePolicy.model_fields if getattr(policy, name) is None}


@pytest.mark.parametrize(("num_patients", "delta"), [(1, 1e-5), (10_000, 1e-5), (20_000, 5e-6), (1_000_000, 1e-7)])
def test_the_default_delta_is_a_tenth_of_one_patient(num_patients, delta):
    assert default_delta(num_patients) == pytest.approx(delta, rel=1e-12)
    policy = SitePolicy(hospital="north", data_set="gliomas", num_patients=num_patients)
    assert policy.effective_delta == default_delta(num_patients)
