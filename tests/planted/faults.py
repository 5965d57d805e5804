"""Faults to plant: mistakes that somebody might make, each with the tests that have to catch it.

The text of a fault is looked for in all files of the packages, since files move; it must be there exactly once.
"""

from __future__ import annotations

from dataclasses import dataclass

ROOMS = (
    *("config", "data", "models", "privacy", "aggregation", "training", "federation"),
    *("store", "export", "analytics", "actors", "serve", "tune", "cli"),
)


@dataclass(frozen=True)
class Fault:
    """A mistake: `old` becomes `new`, and each of `tests`, functions by name, must fail."""

    name: str
    room: str
    old: str
    new: str
    tests: tuple[str, ...]


FAULTS = (
    Fault(
        "the default delta forgets the factor ten",
        "config",
        "return min(1e-5, 1.0 / (10 * num_patients))",
        "return min(1e-5, 1.0 / num_patients)",
        ("test_the_default_delta_is_a_tenth_of_one_patient",),
    ),
    Fault(
        "a limit of the hospital's file is not passed on",
        "config",
        "max_total_steps=self.privacy.max_total_steps,",
        "max_total_steps=None,",
        ("test_every_limit_of_the_file_reaches_the_policy",),
    ),
    Fault(
        "the hash of a configuration leaves out its privacy",
        "config",
        '                "evaluation": True,\n',
        '                "evaluation": True,\n                "privacy": True,\n',
        ("test_the_hash_of_a_configuration_follows_what_changes_the_result",),
    ),
    Fault(
        "a slice has its two spacings swapped",
        "data",
        "spacing = [volume.spacing_mm[axis] for axis in kept]",
        "spacing = [volume.spacing_mm[axis] for axis in reversed(kept)]",
        ("test_one_slice_keeps_the_spacing_of_each_of_its_axes",),
    ),
    Fault(
        "label values become classes in the order of their values",
        "data",
        "classes: Labels = order[place].astype(np.uint8)",
        "classes: Labels = place.astype(np.uint8)",
        ("test_classes_follow_the_order_of_the_labels_and_not_of_their_values",),
    ),
    Fault(
        "a label takes the voxel before it instead of the nearest",
        "data",
        "* np.arange(shape[axis]) + offset[here] + 0.5)",
        "* np.arange(shape[axis]) + offset[here])",
        ("test_parallel_axes",),
    ),
    Fault(
        "a small volume is padded on one side",
        "data",
        "*((m // 2, m - m // 2) for m in missing)",
        "*((0, m) for m in missing)",
        ("test_small_volumes_are_padded_with_zeros_all_round",),
    ),
    Fault(
        "group norm with groups of single channels",
        "models",
        "limit = max(1, min(MAX_GROUPS, num_channels // MIN_CHANNELS_PER_GROUP))",
        "limit = max(1, min(MAX_GROUPS, num_channels))",
        ("test_groups_hold_four_channels_at_least",),
    ),
    Fault(
        "the gradient of a maximum goes to the last of equal voxels",
        "models",
        "torch.mul(gradient, torch.ge(*_pair(level, axis)), out=first)",
        "torch.mul(gradient, torch.gt(*_pair(level, axis)), out=first)",
        ("test_halving_takes_the_first_of_equal_voxels",),
    ),
    Fault(
        "the sample rate is squared",
        "privacy",
        "return np.flatnonzero(uniform < self._sample_rate)",
        "return np.flatnonzero(uniform < self._sample_rate**2)",
        ("test_patients_are_drawn_as_the_accountant_assumes",),
    ),
    Fault(
        "the noise of a tree adds what it should take back",
        "privacy",
        "return node - np.sum(closed, axis=0) if closed else node.copy()",
        "return node + np.sum(closed, axis=0) if closed else node.copy()",
        ("test_a_tree_pays_per_set_bit",),
    ),
    Fault(
        "a search's worst case counts one trial",
        "privacy",
        "num_trials * max(kind.num_steps for kind in kinds),",
        "max(kind.num_steps for kind in kinds),",
        ("test_a_search_begins_where_the_worst_case_of_all_its_trials_fits",),
    ),
    Fault(
        "FedYogi with the wrong sign",
        "aggregation",
        "squared * np.sign(before - squared)",
        "squared * np.sign(squared - before)",
        ("test_yogi_by_hand",),
    ),
    Fault(
        "FedNova forgets the accumulated steps",
        "aggregation",
        "return state, weights + np.float32(rate * steps) * change",
        "return state, weights + np.float32(rate) * change",
        ("test_fednova_scales_the_mean_normalised_change_by_the_mean_steps",),
    ),
    Fault(
        "SCAFFOLD's control ignores who took part",
        "aggregation",
        "control = state[CONTROL] + np.float32(share) * control_change",
        "control = state[CONTROL] + control_change",
        ("test_scaffold_sends_its_control_and_moves_it_by_the_share_that_took_part",),
    ),
    Fault(
        "the mean is divided by the number of updates",
        "aggregation",
        "(_SCALE * partial.weight)).astype(np.float32)",
        "(_SCALE * partial.num_updates)).astype(np.float32)",
        ("test_two_hospitals_by_hand",),
    ),
    Fault(
        "the schedule is one round ahead",
        "training",
        "done = max(round_number - 1, 0)",
        "done = round_number",
        ("test_rates_of_four_rounds", "test_steps_and_a_warm_up_by_hand"),
    ),
    Fault(
        "an area is counted in the unit of volumes",
        "training",
        "unit = MM3_PER_ML if truth.ndim == 3 else MM2_PER_CM2",
        "unit = MM3_PER_ML",
        ("test_two_dimensions_count_areas",),
    ),
    Fault(
        "surface distances take the spacings in reverse",
        "training",
        "include_background=True, percentile=95, spacing=list(spacing)",
        "include_background=True, percentile=95, spacing=list(spacing)[::-1]",
        ("test_a_shifted_bar_by_hand",),
    ),
    Fault(
        "an update is not shortened to what is allowed",
        "training",
        "update, behind = given.shortened(change).astype(",
        "update, behind = change.astype(",
        ("test_no_update_is_longer_than_is_allowed",),
    ),
    Fault(
        "the round of an update is not looked at",
        "federation",
        "if (update.round, update.attempt) != (plan.round, plan.attempt):",
        "if update.attempt != plan.attempt:",
        ("test_a_bad_update_is_refused_with_its_reason",),
    ),
    Fault(
        "an update that came twice is added twice",
        "federation",
        "if update.hospital in delivered:",
        "if update.hospital in delivered and update.round != plan.round:",
        ("test_a_bad_update_is_refused_with_its_reason",),
    ),
    Fault(
        "patience lasts one evaluation longer",
        "federation",
        "    if since < patience:\n",
        "    if since <= patience:\n",
        ("test_early_stopping_ends_the_run_and_resumes_to_the_same",),
    ),
    Fault(
        "a marginal contribution is counted from the empty coalition",
        "federation",
        "gains[o][orders[o][size - 1]] = value - reached[o]",
        "gains[o][orders[o][size - 1]] = value - known[frozenset()]",
        ("test_the_glove_game",),
    ),
    Fault(
        "a file is renamed before it is on the disk",
        "store",
        "            os.fsync(stream.fileno())\n    except OSError as error:\n        path.unlink",
        "    except OSError as error:\n        path.unlink",
        ("test_a_file_is_on_the_disk_before_it_takes_its_name",),
    ),
    Fault(
        "a checkpoint's checksums are not compared",
        "store",
        "if manifest.get(name) != sha256(content)]",
        "if name not in manifest]",
        ("test_a_damaged_checkpoint_is_passed_over_and_said",),
    ),
    Fault(
        "files of a state folder may be read by others",
        "store",
        "FILE_MODE = 0o600",
        "FILE_MODE = 0o644",
        ("test_hole_files_of_a_state_folder_are_its_owners_alone_whatever_the_umask",),
    ),
    Fault(
        "windows overlap by what they should advance",
        "export",
        "max(1, int(edge * (1 - overlap)))",
        "max(1, int(edge * overlap))",
        ("test_scan_positions_are_monais",),
    ),
    Fault(
        "the Gaussian of a window forgets to square its width",
        "export",
        "np.exp(from_middle**2 / np.float32(-2 * sigma**2))",
        "np.exp(from_middle**2 / np.float32(-2 * sigma))",
        ("test_weights_are_monais",),
    ),
    Fault(
        "only the way down is counted as traffic",
        "analytics",
        "sum(len(r.receipt.asked) + len(r.receipt.trained) for r in results)",
        "sum(len(r.receipt.asked) for r in results)",
        ("test_bytes_are_weights_times_transfers",),
    ),
    Fault(
        "pictures show the patient's right on the right",
        "analytics",
        "flips = (bool(steps[1, down] > 0), bool(steps[0, across] > 0))",
        "flips = (bool(steps[1, down] > 0), bool(steps[0, across] < 0))",
        ("test_the_affine_finds_the_axial_axis_and_the_sides",),
    ),
    Fault(
        "actors ask for parts of two GPUs",
        "actors",
        "return math.floor(10_000 / math.ceil(num_actors / num_gpus)) / 10_000",
        "return math.floor(10_000 * num_gpus / num_actors) / 10_000",
        ("test_no_actor_needs_parts_of_two_gpus",),
    ),
    Fault(
        "hospitals are dealt to actors twice or not at all",
        "actors",
        "tuple(names[start::count])",
        "tuple(names[start : start + count])",
        ("test_hospitals_are_dealt_to_actors_in_turn",),
    ),
    Fault(
        "a token's role is not checked",
        "serve",
        "    if role not in token.roles:\n",
        "    if not token.roles:\n",
        ("test_a_scrapers_token_reads_the_figures_and_nothing_else",),
    ),
    Fault(
        "a rate per minute is taken per second",
        "serve",
        "self._per_second, self._burst, self._clock = per_minute / 60, float(burst), clock",
        "self._per_second, self._burst, self._clock = per_minute, float(burst), clock",
        ("test_a_caller_may_send_a_burst_and_then_as_many_as_come_back_with_time",),
    ),
    Fault(
        "lost work is sent once more than is counted",
        "serve",
        "for attempt in range(ATTEMPTS):\n            try:\n                return await work()",
        "for attempt in range(ATTEMPTS + 1):\n            try:\n                return await work()",
        ("test_work_that_is_lost_again_and_again_is_given_up_with_a_sentence",),
    ),
    Fault(
        "a smaller Dice counts as better",
        "tune",
        "return self.epsilon, -self.dice, self.size_bytes",
        "return self.epsilon, self.dice, self.size_bytes",
        ("test_traffic_keeps_a_point_on_the_front_and_out_of_the_line",),
    ),
    Fault(
        "epsilon between two trials lies on a straight line",
        "tune",
        "between = math.exp(math.log(lower.epsilon) + part * (math.log(upper.epsilon) - math.log(lower.epsilon)))",
        "between = lower.epsilon + part * (upper.epsilon - lower.epsilon)",
        ("test_between_two_trials_the_epsilon_lies_on_the_line_over_its_logarithm",),
    ),
    Fault(
        "the time left is that of all rounds",
        "cli",
        "(self._total - self._done) * sum(recent) / len(recent)",
        "self._total * sum(recent) / len(recent)",
        ("test_a_log_gets_at_most_one_line_per_round_and_no_control_codes",),
    ),
    Fault(
        "the summary of a simulation counts the first round",
        "cli",
        "rounds = self._timed[1:] or self._timed",
        "rounds = self._timed",
        ("test_the_summary_is_the_median_of_the_rounds_after_the_first",),
    ),
)
