"""What the record of a version says of an evaluation on open images."""

import json

from medfl_ray.assembly.lineage import _public
from medfl_ray.data.cases import Case
from medfl_ray.data.fingerprints import fingerprint_of


def evaluation(path, **more):
    figures = {"patients": 12, "figures": {"dice": 0.8}, "intervals_95": {"dice": [0.75, 0.85]}, **more}
    path.write_text(json.dumps(figures))
    return _public(path)[1]


def test_the_name_of_an_evaluations_file_is_not_recorded(tmp_path):
    for more in ({}, {"images": "ab" * 32}):
        assert "Gray" not in evaluation(tmp_path / "Mrs-Gray.json", **more)


def test_the_same_images_are_known_by_their_hash_and_others_are_others(tmp_path):
    first = evaluation(tmp_path / "a.json", images="ab" * 32)
    assert first == "12 patients of the open images abababababababab"
    assert first == evaluation(tmp_path / "b.json", images="ab" * 32, cases=3)
    assert first != evaluation(tmp_path / "a.json", images="cd" * 32)


def test_figures_of_images_that_are_not_known_are_compared_with_no_others(tmp_path):
    assert evaluation(tmp_path / "a.json") != evaluation(tmp_path / "a.json", cases=3)


def test_the_hash_is_of_the_images_wherever_they_lie(tmp_path):
    def case(folder, content):
        (tmp_path / folder).mkdir()
        image, label = tmp_path / folder / "image.nii", tmp_path / folder / "label.nii"
        image.write_bytes(content)
        label.write_bytes(b"label")
        return Case("P0", "P0", (image,), label)

    one, same, other = (case(folder, content) for folder, content in (("a", b"1"), ("b", b"1"), ("c", b"2")))
    assert fingerprint_of([one]) == fingerprint_of([same]) != fingerprint_of([other])
