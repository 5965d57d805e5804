"""The house stands as docs/architecture.md says: walls, sizes, start-up time and documentation."""

import ast
import importlib.util
import os
import re
import resource
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("medfl_ray", "actors", "serve", "tune")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_FOLDER_FILES = 400, 60, 20
PROSE = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "configs/*.yaml", "benchmarks/*", "Makefile", "*.toml", "mkdocs.yml")
    for path in ROOT.glob(pattern)
    if path.is_file()
)
PRIVATE_PATH = re.compile(r"(?<![\w.])/(?:home|root|Users)/\w")


def name_of(path):
    return str(path.relative_to(ROOT))


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def test_imports_go_down_only():
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    result = run_python(code)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]


def test_every_package_stands_in_the_contract_of_layers():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = " ".join(next(c for c in contracts if c["type"] == "layers")["layers"])
    core = set(next(c for c in contracts if c["type"] == "forbidden")["source_modules"])
    rooms = {
        f"medfl_ray.{path.stem}"
        for path in (ROOT / "medfl_ray").iterdir()
        if (path.is_dir() and (path / "__init__.py").exists()) or (path.suffix == ".py" and path.stem != "__init__")
    }
    assert rooms == set(re.findall(r"medfl_ray\.\w+", layers))
    assert rooms - {"medfl_ray.cli"} == core


def test_flower_is_imported_in_its_own_package_alone():
    importers = [
        name_of(path) for path in FILES if re.search(r"^\s*(import|from) flwr", path.read_text(), re.MULTILINE)
    ]
    assert importers
    assert all(name.startswith("actors/flower/") for name in importers)


def test_no_folder_is_too_full_to_find_a_file_in():
    counts = Counter(path.parent for path in FILES if path.name != "__init__.py")
    limits = {ROOT / "medfl_ray" / "cli": 30}  # one file per noun of the command line
    assert not {name_of(folder): n for folder, n in counts.items() if n > limits.get(folder, MAX_FOLDER_FILES)}


@pytest.mark.parametrize("path", [p for p in FILES if p.name == "__init__.py"], ids=name_of)
def test_a_package_does_not_re_export(path):
    statements = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not statements or path == ROOT / "medfl_ray" / "__init__.py"


def test_the_public_names_are_the_curated_ones():
    import medfl_ray

    assert set(medfl_ray.__all__) == {"MedflError", "RunConfig", "__version__", "load_run_config"}
    assert all(hasattr(medfl_ray, name) for name in medfl_ray.__all__)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert _code_lines(node) <= MAX_FUNCTION_LINES, node.name


def _code_lines(node):
    first = node.body[0]
    has_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = first.end_lineno - first.lineno + 1 if has_docstring else 0
    return node.end_lineno - node.lineno + 1 - docstring


@pytest.mark.parametrize("package", ["utils", "common", "helpers", "manager"])
def test_no_room_is_named_after_nothing(package):
    assert not [name_of(path) for path in FILES if package in (path.stem, *path.relative_to(ROOT).parts)]


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        (
            "medfl_ray.cli.main",
            ("torch", "monai", "ray", "matplotlib", "flwr", "onnx", "sqlalchemy", "scipy", "actors"),
        ),
        ("medfl_ray.store.ledger.account", ("torch", "monai", "ray")),
        ("actors.simulation.run, actors.simulation.pool", ("torch", "monai", "matplotlib")),
        (
            "medfl_ray.privacy.accountant, medfl_ray.privacy.planner, "
            "medfl_ray.privacy.noise, medfl_ray.privacy.sampler",
            ("torch", "monai", "ray"),
        ),
    ],
)
def test_heavy_libraries_are_not_reached(modules, heavy):
    result = run_python(f"import sys, {modules}; print([m for m in {heavy!r} if m in sys.modules])")
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_help_answers_at_once():
    best = min(_cpu_seconds_of_help() for _ in range(5))
    assert best < 0.5, f"{best:.2f} s of processor time"


def _cpu_seconds_of_help():
    # Processor time, not the clock: other programs on the machine do not make it longer. Nor must coverage.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "medfl_ray.cli.main", "--help"]
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@pytest.mark.parametrize("path", [*FILES, *PROSE], ids=name_of)
def test_no_private_path_and_no_claim_of_compliance(path):
    text = path.read_text(encoding="utf-8")
    assert not PRIVATE_PATH.search(text)
    assert not re.search(r"\bcompliant\b", text, re.IGNORECASE)


@pytest.fixture(scope="module")
def reference():
    """The generator of docs/reference, loaded from its file."""
    spec = importlib.util.spec_from_file_location("gen_reference", ROOT / "docs" / "gen_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["config.md", "cli.md"])
def test_the_reference_is_up_to_date(reference, page):
    written = (ROOT / "docs" / "reference" / page).read_text(encoding="utf-8")
    assert written == reference.pages()[page], "run make reference"


def test_every_section_of_the_configuration_is_documented():
    from medfl_ray.config.run import RunConfig

    text = (ROOT / "docs" / "reference" / "config.md").read_text(encoding="utf-8")
    for name, field in RunConfig.model_fields.items():
        assert f"`{name}`" in text
        for inner in getattr(field.annotation, "model_fields", {}):
            assert f"`{name}.{inner}`" in text


def test_every_field_has_a_sentence():
    from medfl_ray.config.run import RunConfig

    sections = [RunConfig, *(f.annotation for f in RunConfig.model_fields.values() if isinstance(f.annotation, type))]
    for section in sections:
        for name, field in getattr(section, "model_fields", {}).items():
            assert field.description, f"{section.__name__}.{name}"


def test_every_command_is_documented_outside_the_reference(reference):
    pages = [p for p in (ROOT / "docs").rglob("*.md") if "reference" not in p.parts] + [ROOT / "README.md"]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    missing = [path for path, _ in reference.commands() if path not in text]
    assert not missing


def test_documented_commands_exist(reference):
    known = {path for path, _ in reference.commands()}
    groups = {path.rpartition(" ")[0] for path in known}
    example = re.compile(r"(?:^|`|bin/)(medfl-ray(?: [a-z][a-z-]*){1,3})", re.MULTILINE)
    for page in [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        for text in example.findall(page.read_text(encoding="utf-8")):
            words = text.split()
            prefixes = {" ".join(words[:length]) for length in range(2, len(words) + 1)}
            assert prefixes & known or text in groups, (name_of(page), text)


def test_every_benchmark_is_listed_with_its_figures():
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    scripts = [path.name for path in (ROOT / "benchmarks").glob("*.py")]
    assert not [script for script in scripts if f"`{script}`" not in text]


def test_links_between_pages_lead_somewhere():
    for page in [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http://", "https://", "mailto:")):
                assert (page.parent / target).exists(), f"{name_of(page)} -> {target}"
