"""Hostile and broken configurations: each is one clear sentence, exit code 2, and nothing is left behind."""

from __future__ import annotations

import pytest
from cli_runs import (
    DP,
    assert_one_clear_error,
    configuration,
    hospital_data,
    run_folders,
    write_config,
    write_patients,
)

PHANTOM = configuration()["data"]["phantom"]
PRIVATE = {"hospitals": [{"id": "north", "directory": "patients", "num_patients": 20}], "labels": {1: "box"}}

WRONG_SECTIONS = {
    "misspelt key": ({"federation": {"round": 3}}, ["federation.round", "did you mean 'rounds'"]),
    "misspelt section": ({"fedration": {"rounds": 3}}, ["fedration", "did you mean 'federation'"]),
    "misspelt key deep inside": (
        {"data": {"phantom": {**PHANTOM, "num_hospital": 2}}}, ["data.phantom.num_hospital", "'num_hospitals'"],
    ),
    "misspelt key in a list": (
        {"data": {"hospitals": [{"id": "a", "directry": "x"}]}}, ["data.hospitals.0.directry", "'directory'"],
    ),
    "words for a number": ({"federation": {"rounds": "many"}}, ["federation.rounds", "integer", "'many'"]),
    "no round": ({"federation": {"rounds": 0}}, ["federation.rounds", "greater than 0"]),
    "a list for a section": ({"model": [1, 2]}, ["model", "dictionary", "[1, 2]"]),
    "not a number": ({"training": {"learning_rate": float("nan")}}, ["training.learning_rate", "finite"]),
    "a name that climbs": ({"name": "../../etc"}, ["name", "pattern"]),
    "a hospital called after a path": (
        {"data": {"hospitals": [{"id": "../a", "directory": "x"}]}}, ["data.hospitals.0.id", "pattern"],
    ),
    "folder and phantom": (
        {"data": {"directory": "x", "phantom": PHANTOM}}, ["exactly one of", "directory, phantom, hospitals"],
    ),
    "no data at all": ({"data": {}}, ["exactly one of"]),
    "one hospital twice": (
        {"data": {"hospitals": [{"id": "a", "directory": "x"}, {"id": "a", "directory": "y"}]}},
        ["names a hospital twice", "'a'"],
    ),
    "steps and epochs": (
        {"federation": {"local_epochs": 1, "local_steps": 1}}, ["local_epochs and local_steps", "keep one"],
    ),
    "more updates than hospitals present": (
        {"federation": {"min_clients": 3, "min_available_clients": 2}}, ["min_clients exceeds"],
    ),
    "more updates than hospitals": ({"federation": {"min_clients": 9}}, ["min_clients", "9 hospitals", "has 2"]),
    "patches of another dimension": (
        {"training": {"patch_size_voxels": [16, 16]}}, ["training.patch_size_voxels has 2 values", "1 or 3"],
    ),
    "a classifier for segmentation": ({"model": {"type": "densenet"}}, ["densenet", "classifies", "unet3d"]),
    "unknown network": ({"model": {"type": "unet4d"}}, ["model.type", "unet3d", "'unet4d'"]),
    "unknown device": ({"training": {"device": "gpu"}}, ["training.device", "cuda"]),
    "unknown phantom preset": (
        {"data": {"phantom": {**PHANTOM, "preset": "brian_tumour"}}}, ["'brian_tumour'", "brain_tumour"],
    ),
    "field without a name": (
        {"data": {"directory": "x", "declared": "public", "partition": {"by": "field"}}}, ["partition.field"],
    ),
    "window upside down": (
        {"data": {"directory": "x", "intensity": "window", "window": [400, -100]}}, ["lower < upper"],
    ),
    "epsilon below zero": ({"privacy": {"enable_dp": True, "epsilon": -1}}, ["privacy.epsilon", "greater than 0"]),
    "privacy without epsilon": ({"privacy": {"enable_dp": True}}, ["privacy.epsilon or privacy.noise_multiplier"]),
    "delta of one": ({"privacy": {**DP, "delta": 1}}, ["privacy.delta", "less than 1"]),
    "an accountant that understates": (
        {"privacy": {**DP, "accountant": "gdp"}}, ["privacy.accountant", "'gdp' understates epsilon", "use 'pld'"],
    ),
    "delta above one in N": (
        {"privacy": {**DP, "delta": 0.5}}, ["delta=0.5", "1 / num_patients", "lower privacy.delta"],
    ),
    "epsilon that no noise gives": (
        {"privacy": {**DP, "epsilon": 1e-12, "delta": 1e-60}}, ["no noise multiplier", "epsilon=1e-12", "Raise"],
    ),
    "private data without num_patients": (
        {"data": {"hospitals": [{"id": "a", "directory": "x"}]}}, ["hospital 'a'", "num_patients", "rounded, public"],
    ),
    "one folder of private data": (
        {"data": {"directory": "patients"}}, ["data.directory", "data.hospitals", "num_patients"],
    ),
    "a hospital without a folder": (
        {"data": {"hospitals": [{"id": "a", "declared": "public"}]}}, ["hospital 'a'", "directory", "site_config"],
    ),
    "central baseline of separate hospitals": (
        {"data": PRIVATE, "federation": {"baselines": ["central"]}}, ["central baseline", "trust_domain: single"],
    ),
    "public folder that is not there": (
        {"data": {"directory": "nowhere", "declared": "public"}}, ["'nowhere' does not exist", "data.directory"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_SECTIONS)
def test_wrong_configuration(name, medfl, tmp_path):
    sections, words = WRONG_SECTIONS[name]
    config = write_config(tmp_path / "config.yaml", configuration(**sections))
    assert_one_clear_error(medfl("run", config), 2, *words)
    assert run_folders() == []


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}]\n"
    for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)  # nine levels of nine aliases: 400 million values if anybody writes them out

WRONG_FILES = {
    "not YAML": (b"name: [a\ndata: {", ["not valid YAML", "line 2"]),
    "a tab": (b"name: a\n\tdata: 1\n", ["not valid YAML", "line 2"]),
    "a list": (b"- a\n- b\n", ["holds list", "mapping"]),
    "empty": (b"", ["holds NoneType", "mapping"]),
    "binary": (bytes(range(256)), ["'config.yaml'", "UTF-8"]),
    "control characters": (b"name: a\x07b\n", ["'config.yaml'", "not valid YAML"]),
    "code": (b"name: !!python/object/apply:os.system ['touch hacked']\n", ["not valid YAML", "constructor"]),
    "nested without end": (b"[" * 20_000, ["'config.yaml'", "nested too deeply"]),
    "aliases that multiply": (BOMB.encode() + b"name: *i\n", ["unknown key 'a'", "name"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_FILES)
def test_wrong_file(name, medfl, tmp_path):
    content, words = WRONG_FILES[name]
    (tmp_path / "config.yaml").write_bytes(content)
    answer = medfl("run", "config.yaml")
    assert_one_clear_error(answer, 2, *words)
    assert len(answer.err) < 4000
    assert not (tmp_path / "hacked").exists()
    assert run_folders() == []


WRONG_ARGUMENTS = {
    "missing file": (["run", "nowhere.yaml"], ["no configuration file 'nowhere.yaml'", "check the path"]),
    "a folder as file": (["run", "."], ["cannot read", "YAML file"]),
    "no configuration": (["run"], ["YAML file of a new run", "--resume"]),
    "configuration and resume": (["run", "config.yaml", "--resume", "x"], ["either", "--resume"]),
    "resume of what is no run": (["run", "--resume", "empty"], ["'empty'", "not the folder of a run"]),
    "resume of a missing folder": (["run", "--resume", "gone"], ["'gone'", "not the folder of a run"]),
    "resume with another setting": (
        ["run", "--resume", "empty", "--set", "federation.rounds=9"], ["keeps its configuration", "--set"],
    ),
    "override of an unknown key": (
        ["run", "config.yaml", "--set", "federation.roundz=3"], ["federation.roundz", "'rounds'"],
    ),
    "override without a value": (["run", "config.yaml", "--set", "rounds"], ["'rounds'", "section.key=value"]),
    "override through a value": (["run", "config.yaml", "--set", "name.first=a"], ["'name'", "not a section"]),
    "override that is not YAML": (["run", "config.yaml", "--set", "name=[a"], ["'name'", "quote it"]),
    "unknown pool": (["run", "config.yaml", "--pool", "cloud"], ["federation.pool", "'ray', 'local' or 'virtual'"]),
    "unknown baseline": (["run", "config.yaml", "--baseline", "best"], ["federation.baselines", "'best'"]),
    "no actor": (["run", "config.yaml", "--actors", "0"], ["federation.num_actors", "greater than 0"]),
    "evaluate what is no run": (["evaluate", "empty", "--data", "patients"], ["'empty'", "not the folder of a run"]),
    "export what is no run": (["export", "empty"], ["'empty'", "not the folder of a run"]),
    "inspect an empty folder": (["data", "inspect", "empty"], ["'empty' is empty", "expected"]),
    "inspect a missing folder": (["data", "inspect", "gone"], ["'gone' does not exist"]),
    "inspect unknown files": (["data", "inspect", "."], ["no known layout", "manifest.csv"]),
    "inspect with a nameless label": (["data", "inspect", "patients", "--label", "tumour"], ["'tumour'", "1=tumour"]),
    "hold everything out": (["data", "split", "patients", "--holdout", "1"], ["--holdout", "between 0 and 1"]),
    "more hospitals than patients": (
        ["data", "split", "patients", "--hospitals", "30"], ["4 patients", "30"],
    ),
    "split by an unknown field": (
        ["data", "split", "patients", "--by", "field", "--field", "site"], ["no field 'site'", "fields found"],
    ),
    "make over what is there": (["data", "make", "patients", "--size", "16"], ["'patients'", "empty"]),
    "make of an unknown preset": (["data", "make", "new", "--preset", "leg"], ["'leg'", "brain_tumour"]),
    "make DICOM as Decathlon": (
        ["data", "make", "new", "--format", "dicom", "--layout", "decathlon"], ["'decathlon'", "--layout manifest"],
    ),
    "fetch of an unknown set": (["data", "fetch", "everything"], ["'everything'", "hippocampus"]),
    "fetch from a missing archive": (["data", "fetch", "hippocampus", "--archive", "gone.tar"], ["gone.tar"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_ARGUMENTS)
def test_wrong_arguments(name, medfl, tmp_path):
    arguments, words = WRONG_ARGUMENTS[name]
    (tmp_path / "empty").mkdir()
    write_patients(tmp_path / "patients")
    write_config(tmp_path / "config.yaml", configuration())
    before = {path: path.read_bytes() for path in (tmp_path / "patients").iterdir()}
    assert_one_clear_error(medfl(*arguments), 2, *words)
    assert run_folders() == []
    assert {path: path.read_bytes() for path in (tmp_path / "patients").iterdir()} == before


SITE = "hospital: {{id: {id}}}\ndata: {{directory: patients}}\nprivacy: {{num_patients: 20, {privacy}}}\n"
WRONG_SITES = {
    "policy asks for privacy": (SITE.format(id="north", privacy="epsilon: 8"), ["hospital 'north'", "enable_dp: true"]),
    "file of another hospital": (SITE.format(id="south", privacy="epsilon: 8"), ["'north'", "hospital 'south'"]),
    "misspelt policy": (SITE.format(id="north", privacy="epsilom: 8"), ["site.yaml", "'epsilon'"]),
    "no num_patients": ("hospital: {id: north}\ndata: {directory: x}\nprivacy: {}\n", ["privacy.num_patients"]),
    "missing": (None, ["no configuration file 'site.yaml'"]),
}


@pytest.mark.parametrize("name", WRONG_SITES)
def test_wrong_site_policy(name, medfl, tmp_path):
    content, words = WRONG_SITES[name]
    write_patients(tmp_path / "patients")
    if content is not None:
        (tmp_path / "site.yaml").write_text(content)
    data = {"hospitals": [{"id": "north", "site_config": str(tmp_path / "site.yaml")}], "labels": {1: "box"}}
    config = write_config(tmp_path / "config.yaml", configuration(data=data))
    assert_one_clear_error(medfl("run", config), 2, *words)
    assert run_folders() == []


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (
            {"training": {"patch_size_voxels": 15}},
            ["multiples of 2 voxels", "training.patch_size_voxels", "[15, 15, 15]"],
        ),
        ({"training": {"device": "cuda:77"}}, ["training.device is 'cuda:77'", "'auto' or 'cpu'"]),
        ({"model": {"features": [4] * 12}}, ["model", "levels"]),
    ],
    ids=["patch that does not fit the network", "no such GPU", "too deep a network"],
)
def test_what_no_hospital_can_build(section, words, medfl, tmp_path):
    config = write_config(tmp_path / "config.yaml", configuration(**section))
    assert_one_clear_error(medfl("run", config), 2, "0 hospitals are present", *words)
    assert run_folders() == []


def test_output_directory_is_a_file(medfl, tmp_path):
    (tmp_path / "runs").write_text("mine")
    config = write_config(tmp_path / "config.yaml", configuration())
    assert_one_clear_error(medfl("run", config), 1, "output.directory 'runs'", "Choose a folder")
    assert (tmp_path / "runs").read_text() == "mine"


def test_state_directory_is_a_file(medfl, tmp_path):
    (tmp_path / "ledgers").write_text("mine")
    data = hospital_data(write_patients(tmp_path / "patients"))
    output = {"state_directory": str(tmp_path / "ledgers")}
    config = write_config(tmp_path / "config.yaml", configuration(data=data, privacy=DP, output=output))
    assert_one_clear_error(medfl("run", config), 1, "state folder", "output.state_directory")
    assert run_folders() == []


def test_an_unknown_option_is_named(medfl):
    answer = medfl("run", "--rounds", "3")
    assert answer.code == 2
    assert "--rounds" in answer.err
    assert "Traceback" not in answer.err
