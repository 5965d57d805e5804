"""Every command of the how-to is executed by a test or by the rehearsal, or is marked with what it needs."""

import re
from pathlib import Path

from howto_commands import HOWTO, blocks, commands

ROOT = Path(__file__).parents[2]
TEXT = HOWTO.read_text(encoding="utf-8")


def test_every_block_says_what_executes_it_or_what_it_needs():
    assert len(blocks()) == len(re.findall(r"^```", TEXT, re.MULTILINE)) / 2 >= 9
    assert {what for mark, what, _ in blocks() if mark == "test"} == {"laptop", "rehearsal", "job"}
    needs = {what for mark, what, _ in blocks() if mark == "not tested"}
    assert needs == {"needs a cloud account", "needs Docker", "needs a Kubernetes cluster"}


def test_no_block_hides_behind_its_mark():
    for mark, what, body in blocks():
        if (mark, what) == ("not tested", "needs a cloud account"):
            assert all(
                re.fullmatch(r"ray up (cluster|deploy/ray/(aws|gcp|azure))\.yaml", line) for line in body.splitlines()
            )
        elif mark == "not tested":
            program = {"needs Docker": "docker ", "needs a Kubernetes cluster": "kubectl "}[what]
            assert all(line.startswith((program, "medfl-ray cluster secrets ")) for line in body.splitlines())


def test_what_is_executed_elsewhere_is_executed_there():
    jobs = (ROOT / "tests" / "actors" / "test_jobs.py").read_text(encoding="utf-8")
    for kind in ("laptop", "job"):
        assert commands(kind)
        assert f'commands("{kind}")' in jobs


def test_the_rehearsal_does_what_is_marked_as_rehearsed():
    script = (ROOT / "deploy" / "ray" / "rehearse.sh").read_text(encoding="utf-8")
    record = (ROOT / "deploy" / "ray" / "rehearsal.log").read_text(encoding="utf-8")
    lines = commands("rehearsal")
    assert len(lines) == 5
    for line in lines:
        words = line.split()
        if words[0] == "ray":
            assert f"=== ray {words[1]} onpremise.yaml" in record
            assert re.search(rf"^\s*ray {words[1]} .*onpremise\.yaml", script, re.MULTILINE), line
            assert (ROOT / words[2]).exists()
        elif words[0] == "make":
            assert f"run {line} first" in script
        else:
            assert re.search(rf"medfl_ray\.cli\.main {words[1]} {words[2]} \S+{re.escape(words[3])}", script), line


def test_files_that_it_names_exist():
    for name in re.findall(r"(?<![\w~])((?:deploy|cluster)[\w/.-]*\.(?:yaml|sh|log))", TEXT):
        assert (ROOT / name).exists(), name
