"""What a default installation brings is under licences that an MIT product can be shipped with: no GPL, no AGPL."""

import re
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PRODUCT = "medfl-ray"
PERMISSIVE = re.compile(
    r"\b(MIT|BSD|0BSD|Apache|ISC|PSF|Python Software Foundation|Zlib|CC0|Public Domain|Unlicense|BSL-1\.0|HPND)\b",
    re.IGNORECASE,
)
# Its terms reach the package's own files alone, which we do not change.
FILE_LEVEL = re.compile(r"\b(MPL|Mozilla Public License)\b", re.IGNORECASE)
LESSER = re.compile(r"\bLGPL|\bLesser General Public", re.IGNORECASE)
STRONG = re.compile(r"\bA?GPL|(?<!Lesser )\bGeneral Public License|\bGNU (Affero )?GPL", re.IGNORECASE)
NO_LICENCE_BUT = {
    # name: reason, of a package whose metadata name no licence although its text is known
}
LESSER_BECAUSE = {
    # name: reason; only a library that is loaded as a file of its own, which its user can replace
}


def licences_of(distribution):
    """What the metadata say: the SPDX expression, else the classifiers, else the first line of the free text."""
    fields = distribution.metadata
    if expression := fields.get("License-Expression"):
        return [expression]
    classifiers = [line for line in fields.get_all("Classifier") or [] if line.startswith("License ::")]
    named = [line.rpartition("::")[2].strip() for line in classifiers if line != "License :: OSI Approved"]
    text = next((line.strip() for line in (fields.get("License") or "").splitlines() if line.strip()), "")
    return named + ([text] if text and text.upper() != "UNKNOWN" else [])


def verdict(name, licences):
    """Why a package may not be in the default installation; empty where it may."""
    said = "; ".join(licences)
    if STRONG.search(said) and not all(_has_a_choice(line) for line in licences if STRONG.search(line)):
        return f"{name} is under {said}; replace it, or make it an extra that nobody gets without asking"
    if LESSER.search(said):
        return "" if name in LESSER_BECAUSE else f"{name} is under {said}; see LESSER_BECAUSE"
    if PERMISSIVE.search(said) or FILE_LEVEL.search(said) or name in NO_LICENCE_BUT:
        return ""
    return f"{name} names no licence that is known here ({said or 'nothing'}); see NO_LICENCE_BUT"


def _has_a_choice(line):
    return any(PERMISSIVE.search(part) and not STRONG.search(part) for part in re.split(r"\bOR\b", line))


def default_install(installed=metadata.distribution):
    """Every distribution that `pip install medfl-ray` brings on this machine, by its name."""
    found, seen, waiting = {}, set(), [(PRODUCT, frozenset())]
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        found[name] = installed(name)
        for requirement in map(Requirement, found[name].requires or ()):
            wanted = requirement.marker is None or any(
                requirement.marker.evaluate({"extra": extra}) for extra in (*extras, "")
            )
            if wanted:
                waiting.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return found


INSTALLED = default_install()


def test_the_walk_reaches_what_the_product_is_made_of():
    assert {"torch", "ray", "flwr", "pydicom", "imagecodecs", "typer", "numpy"} <= set(INSTALLED)
    assert {"uvicorn", "smart-open", "pyjpegls", "tomli-w"} <= set(INSTALLED)  # of extras, and of requirements
    assert not {"pytest", "mkdocs-material", "psycopg", "moto", "pylibjpeg-libjpeg"} & set(INSTALLED)


@pytest.mark.parametrize("name", sorted(INSTALLED))
def test_a_package_of_the_default_installation_has_a_licence_that_fits(name):
    assert verdict(name, licences_of(INSTALLED[name])) == ""


@pytest.mark.parametrize("table", [NO_LICENCE_BUT, LESSER_BECAUSE])
def test_an_exception_is_needed_and_has_a_reason(table):
    assert set(table) <= set(INSTALLED)
    assert all(len(reason) > 20 for reason in table.values())


@pytest.mark.parametrize(
    "licence",
    [
        "GPL-3.0-only", "GPLv3", "GPLv3+", "GNU General Public License v3 (GPLv3)", "AGPL-3.0-or-later", "GNU GPL v2",
        "GNU Affero General Public License v3", "MIT AND GPL-2.0-only", "", "Dual License", "Proprietary",
        "LGPL-3.0-only", "GNU Lesser General Public License v3 (LGPLv3)", "see LICENSE",
    ],
)  # fmt: skip
def test_a_licence_that_does_not_fit_is_refused(licence):
    assert verdict("package", [licence] if licence else [])


@pytest.mark.parametrize(
    "licences",
    [
        ["MIT"], ["BSD-3-Clause AND 0BSD AND MIT AND Zlib AND CC0-1.0"], ["Apache Software License"],
        ["MPL-2.0 AND MIT"],
        ["MIT OR GPL-2.0-only"], ["BSD License", "Dual License"], ["Python Software Foundation License"],
        ["Apache-2.0 WITH LLVM-exception"],
    ],
)  # fmt: skip
def test_a_licence_that_fits_is_taken(licences):
    assert verdict("package", licences) == ""


def test_the_gpl_is_found_through_another_package():
    """A walk over made metadata: what the product does not name itself counts too."""

    class Made:
        def __init__(self, licence, requires=()):
            self.metadata, self.requires = _fields(licence), list(requires)

    made = {
        PRODUCT: Made("MIT", ["outer[fast]; python_version >= '3'", "never; extra == 'dev'"]),
        "outer": Made("MIT", ["inner; extra == 'fast'", "Other_One"]),
        "inner": Made("GPL-3.0-only"),
        "other-one": Made("BSD-3-Clause"),
    }
    found = default_install(made.__getitem__)
    assert set(found) == set(made)
    assert [name for name in found if verdict(name, licences_of(found[name]))] == ["inner"]


def _fields(licence):
    from email.message import Message

    fields = Message()
    fields["License-Expression"] = licence
    return fields
