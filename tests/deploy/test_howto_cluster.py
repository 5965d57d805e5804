"""Every command of the how-to is executed by a test or by the rehearsal, or is marked with what it needs."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "howto" / "cluster.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^<!-- (test|not tested): ([^>]+) -->\n```sh\n(.*?)```$", re.MULTILINE | re.DOTALL)
BLOCKS = BLOCK.findall(TEXT)


def test_every_block_is_marked():
    assert len(BLOCKS) == len(re.findall(r"^```sh", TEXT, re.MULTILINE)) >= 9
    kinds = {(mark, what) for mark, what, _ in BLOCKS}
    assert {what for mark, what in kinds if mark == "test"} == {"laptop", "rehearsal", "job"}
    assert all(what.startswith("needs ") for mark, what in kinds if mark == "not tested")


def test_what_is_executed_elsewhere_is_executed_there():
    jobs = (ROOT / "tests" / "actors" / "test_jobs.py").read_text(encoding="utf-8")
    assert 'commands("laptop")' in jobs
    assert 'commands("job")' in jobs


def test_the_rehearsal_does_what_is_marked_as_rehearsed():
    script = (ROOT / "deploy" / "ray" / "rehearse.sh").read_text(encoding="utf-8")
    record = (ROOT / "deploy" / "ray" / "rehearsal.log").read_text(encoding="utf-8")
    lines = [line for mark, what, body in BLOCKS if what == "rehearsal" for line in body.splitlines()]
    assert len(lines) == 5
    for line in lines:
        words = line.split()
        if words[0] == "ray":
            assert f"ray {words[1]}" in record
            assert re.search(rf"^\s*ray {words[1]} .*onpremise\.yaml", script, re.MULTILINE), line
            assert (ROOT / words[2]).exists()
        elif words[0] == "make":
            assert f"run {line} first" in script
        else:
            assert re.search(rf"medfl_ray\.cli\.main {words[1]} {words[2]} \S+{re.escape(words[3])}", script), line


def test_files_that_it_names_exist():
    for name in re.findall(r"(?<![\w~])((?:deploy|cluster)[\w/.-]*\.(?:yaml|sh|log))", TEXT):
        assert (ROOT / name).exists(), name
