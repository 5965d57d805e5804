"""The report: self-contained, true to the folder, and silent about what was suppressed."""

import html
import json
import re
import stat
from html.parser import HTMLParser

import pytest

from medfl_ray.analytics.report import config_text, export_facts, write_local_report, write_report
from medfl_ray.analytics.summary import summarise_run
from medfl_ray.config.files import load_run_config, parse_run_config
from medfl_ray.messages import PrivacySpent
from medfl_ray.privacy.account import epsilon_words

PNG = bytes.fromhex("89504e470d0a1a0a") + b"picture"


class Page(HTMLParser):
    """Collects a page's images, links, text and whether its tags are balanced."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, text):
        super().__init__()
        self.images, self.outside, self.words, self.open = [], [], [], []
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag == "img":
            self.images.append(values)
        self.outside += [v for k, v in attrs if k in ("src", "href", "srcset") and not v.startswith("data:")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "pre"):
            self.words.append(data)


def page_of(folder):
    text = write_report(folder).read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    return page, text


def test_it_is_one_file_that_loads_nothing_and_every_picture_has_words(make_run):
    page, text = page_of(make_run(pictures={"oslo-1.png": PNG, "leuven-2.png": PNG}))
    assert page.outside == []
    assert "url(" not in text
    assert "<script" not in text
    assert len(page.images) == 6  # four charts, two pictures
    assert all(len(image["alt"]) > 20 for image in page.images)
    assert "leuven, held-out case 2" in page.text


def test_the_headline_says_difference_and_spread(make_run):
    page, _ = page_of(make_run())
    assert "reaches a mean Dice of 0.730" in page.text
    assert "reach 0.645" in page.text
    assert "0.085 above local training (standard deviation 0.025 over 4 hospitals)" in page.text
    assert "better at 4 of 4 hospitals" in page.text


def test_the_headline_does_not_hide_what_the_baselines_cost(make_run):
    folder = make_run()
    page, account = page_of(folder)[0], summarise_run(folder).hospitals[0].account
    total, own, beside = (epsilon_words(part.epsilon) for part in (account.total, account.run, account.extra))
    assert (
        f"In all, no hospital's data have spent more than epsilon = {total} (patient-level, delta = 1e-5," in page.text
    )
    bounds = f"the run's rounds {own} of their budget 8; the baselines {beside}; lifetime budget 20, of which"
    assert page.text.count(bounds) == 2
    assert float(total) > float(own) > 0


def test_an_infinite_epsilon_is_said_and_no_number(make_run):
    folder = make_run()
    ledgers = json.loads((folder / "ledger.json").read_text())
    row = {"kind": "unprotected", "job": "another", "reason": "trained without differential privacy"}
    for name in ("oslo", "porto"):
        ledgers[name]["events"].append(row)
        ledgers[name]["spent"]["epsilon"] = "Infinity"
    (folder / "ledger.json").write_text(json.dumps(ledgers))
    page = page_of(folder)[0]
    words = "Data of oslo, porto were used without patient-level protection"
    assert page.text.count(f"{words}: the patient-level epsilon is infinite (unprotected).") == 3
    assert page.text.count("infinite (unprotected)") >= 8
    assert not re.search(r"\binf\b|\bnan\b", page.text)


def test_a_baseline_that_was_refused_is_not_a_failed_round(make_run):
    folder = make_run()
    baselines = json.loads((folder / "baselines.json").read_text())
    failure = {"hospital": "porto", "round": 2, "attempt": 1, "stage": "reserve", "reason": "over budget"}
    baselines["failures"] = [failure]
    (folder / "baselines.json").write_text(json.dumps(baselines))
    page, _ = page_of(folder)
    assert "porto, baseline, reserve, round 2: over budget" in page.text
    assert summarise_run(folder).hospitals[-1].failures == ()


def test_every_epsilon_has_unit_delta_and_adjacency_in_its_section(make_run):
    _, text = page_of(make_run())
    text = re.sub(r"<pre>.*?</pre>", "", text, flags=re.S)  # the configuration as it was written
    sections = re.findall(r"<section>.*?</section>", text, flags=re.S)
    with_epsilon = [s for s in sections if re.search(r"[Ee]psilon[^<]*\d\.\d\d|7\.90", s)]
    assert len(with_epsilon) >= 2
    for section in with_epsilon:
        assert "patient-level" in section or "patient, add/remove" in section
        assert "add/remove" in section
        assert "delta = 1e-5" in section or "add/remove)" in section


def test_text_from_outside_is_escaped(make_run):
    _, text = page_of(make_run())
    assert "&lt;together&gt;" in text
    assert "<b>Ray</b>" not in text


def test_private_data_are_suppressed_everywhere(make_run):
    page, text = page_of(make_run(private=True, pictures={"oslo-1.png": PNG}))
    assert "suppressed for charite, leuven, oslo, porto" in page.text
    assert "data:image/png" not in text
    assert not re.search(r"\b0\.(7[0-9]|6[0-9])\d\b", page.text), "no score of any hospital"
    assert "somewhere/images" not in text


def test_a_hospital_that_never_took_part_is_said_on_top(make_run):
    page, _ = page_of(make_run(absent="oslo"))
    assert page.text.index("never took part") < page.text.index("In short")
    assert "3 hospitals trained" in page.text


def test_a_run_that_stopped_early_is_reported(make_run):
    page, _ = page_of(make_run(complete=False))
    assert "The run stopped early: 4 of 8 rounds were published." in page.text
    assert "No model.onnx was written" in page.text
    assert "Local only" not in page.text


def test_without_privacy_the_report_says_so(make_run):
    page, _ = page_of(make_run(dp=False))
    assert "Differential privacy was off" in page.text
    assert "How to read epsilon" not in page.text


def test_an_audit_of_fewer_rounds_is_out_of_date(make_run):
    folder = make_run(rounds=8)
    record = {"rounds": 7, "mechanism": None, "membership": None, "membership_note": "not computed: a test"}
    (folder / "audit.json").write_text(json.dumps(record))
    assert "not computed: a test" not in page_of(folder)[0].text
    (folder / "audit.json").write_text(json.dumps(record | {"rounds": 8}))
    assert "not computed: a test" in page_of(folder)[0].text


def test_it_never_claims_compliance(make_run):
    _, text = page_of(make_run())
    assert "complian" not in text.lower()


def test_pictures_of_unknown_hospitals_are_left_out(make_run):
    _, text = page_of(make_run(pictures={"stranger-1.png": PNG, "oslo.png": PNG, "oslo-x.png": PNG}))
    assert "data:image/png" not in text


def test_the_configuration_shows_folders_by_name_and_is_otherwise_whole(make_run):
    folder = make_run(private=True)
    run = load_run_config(folder / "config.yaml")
    assert "directory: images" in config_text(run)
    assert summarise_run(folder).config.config_hash in (write_report(folder).read_text())


def test_the_export_is_shown_with_its_parity():
    parity = {"agreement": 0.9995, "max_abs_difference": 3.1e-6, "num_patches": 5, "images": "2 phantoms"}
    manifest = {
        "opset": 20,
        "variants": {"float32": {"file": "model.onnx", "size_bytes": 48178, "sha256": "ab"}},
        "parity": parity,
        "labels": {"1": "core"},
        "patch_size": [32, 32, 32],
    }
    facts = dict(export_facts(manifest))
    words = "99.95 % of labels equal, largest difference of the logits 3.1e-6, on 5 patches of 2 phantoms"
    assert facts["Parity with PyTorch"] == words
    assert facts["File"] == "model.onnx, 48.2 kB, opset 20"
    assert facts["Takes"] == "the patch size; trained on 32 x 32 x 32 voxels"
    assert dict(export_facts({})) == {"Parity with PyTorch": "not measured", "File": "model.onnx was not written"}


@pytest.fixture
def local_run():
    return parse_run_config({"name": "study", "data": {"directory": "x"}, "privacy": {"epsilon": 2}})


def test_the_local_report_is_readable_by_its_owner_alone(tmp_path, local_run):
    spent = PrivacySpent(epsilon=1.5, delta=1e-6, budget=2)
    path = write_local_report(tmp_path, "A", local_run, 3, {"dice": 0.61}, [0.5, 0.72], [PNG], spent)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    page = Page(path.read_text())
    assert page.outside == []
    assert "0.610" in page.text
    assert "0.720" in page.text
    assert "delta = 1e-6, add/remove" in page.text
    assert "Keep it inside the hospital" in page.text
    assert len(page.images) == 1
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_attempts_that_published_nothing_are_named_with_their_reason(make_run):
    folder = make_run(rounds=3)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    reason = "the run ended while the round was collecting updates"
    first["receipt"] |= {"published": False, "weights_after": None, "reason": reason, "attempt": 9}
    (folder / "metrics.jsonl").write_text("\n".join([json.dumps(first), *lines]) + "\n")
    page = html.unescape(write_report(folder).read_text())
    assert f"round 1, attempt 9, published nothing: {reason}" in page
