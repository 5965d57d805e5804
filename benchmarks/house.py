"""The code base in figures, each beside its limit: sizes, imports in circles, shapes of functions and classes.

Tests are not measured. `--places` names what lies beyond a limit.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness import STANDARD_OUTPUT, Goal, benchmark, report
from house_measures import (
    Class,
    Function,
    Source,
    at_share,
    circles,
    files_per_folder,
    imports_among,
    read_sources,
    two_way_pairs,
)

PACKAGES = ("medfl_ray", "actors", "serve", "tune")
CLI = "medfl_ray/cli"
MAX_PARAMETERS = 6
MAX_METHODS = 15
NUM_FILES_SHOWN = 15

GLOSSARY = (
    # names that had more than one meaning
    *("Answer", "Baselines", "Decision", "Done", "Given", "Kept", "LOSSES", "Memory", "Parcel", "Pass", "Passes"),
    *("Piece", "RULES", "Request", "Select", "Stage", "Tally", "Unit", "deal", "failure_of", "rule_of"),
    # names of the glossary that are to keep the one meaning they have
    *("ActorGroup", "AssignmentResult", "EvaluationJob", "GroupedTrainer", "HospitalReply", "HospitalTurn"),
    *("JobResult", "NetworkSpec", "OneShotVolume", "OngoingRound", "RoundProgress", "RuleInput", "RuleResult"),
    *("RuleSteps", "RunHistory", "SavedResult", "SegmentRequest", "SegmentationService", "StudyStore"),
    *("TrainingAnswer", "TrainingPass", "UnitInterval", "WireMessage", "WorkItem", "WorkLost"),
)

GOALS = (
    Goal("file_lines_max", at_most=400),
    Goal("function_lines_max", at_most=60),
    Goal("functions_above_6_parameters", at_most=5),
    Goal("classes_above_15_methods", at_most=8),
    Goal("largest_folder_files", at_most=20),
    Goal("cli_files", at_most=30),
    Goal("two_way_pairs", at_most=0),
    Goal("circles", at_most=0),
    Goal("any_per_1000_lines", at_most=8),
    Goal("todo_per_1000_lines", at_most=0),
    Goal("public_return_annotated", at_least=1),
    Goal("names_with_several_meanings", at_most=0),
)


def measure(sources: Sequence[Source]) -> dict[str, float]:
    """Return every figure of the code base."""
    imports = imports_among(sources)
    groups = circles(imports)
    folders = files_per_folder(sources)
    return {
        **_sizes(sources),
        "functions_above_6_parameters": len(functions_above(sources)),
        "classes_above_12_methods": len(classes_above(sources, 12)),
        "classes_above_15_methods": len(classes_above(sources)),
        "largest_folder_files": max((num for folder, num in folders.items() if folder != CLI), default=0),
        "cli_files": folders[CLI],
        "two_way_pairs": len(two_way_pairs(sources, imports)),
        "circles": len(groups),
        "files_in_circles": sum(map(len, groups)),
        **_per_1000_lines(sources),
        **_public_shares(sources),
        "names_with_several_meanings": len(names_with_several_meanings(sources)),
    }


def _sizes(sources: Sequence[Source]) -> dict[str, float]:
    files = [source.num_lines for source in sources if source.num_lines]  # an empty __init__ has no size
    functions = [function.num_lines for source in sources for function in source.functions]
    return {
        "num_files": len(files),
        "num_lines": sum(files),
        "file_lines_median": at_share(files, 0.5),
        "file_lines_p90": at_share(files, 0.9),
        "file_lines_max": max(files, default=0),
        "num_functions": len(functions),
        "function_lines_median": at_share(functions, 0.5),
        "function_lines_p90": at_share(functions, 0.9),
        "function_lines_p99": at_share(functions, 0.99),
        "function_lines_max": max(functions, default=0),
    }


def _per_1000_lines(sources: Sequence[Source]) -> dict[str, float]:
    thousands = sum(source.num_lines for source in sources) / 1000
    counts = sum((Counter(source.counts) for source in sources), Counter[str]())
    kinds = ("any", "type_ignore", "noqa", "except_exception", "assert", "todo")
    return {f"{kind}_per_1000_lines": counts[kind] / thousands if thousands else 0.0 for kind in kinds}


def _public_shares(sources: Sequence[Source]) -> dict[str, float]:
    functions = [function for source in sources for function in source.functions if function.is_public]
    classes = [found for source in sources for found in source.classes if found.is_public]
    documented = [found.has_docstring for found in (*functions, *classes)]
    annotated = [function.has_return_annotation for function in functions]
    return {
        "public_documented": sum(documented) / len(documented) if documented else 1.0,
        "public_return_annotated": sum(annotated) / len(annotated) if annotated else 1.0,
    }


def functions_above(sources: Sequence[Source], limit: int = MAX_PARAMETERS) -> list[Function]:
    """Return the functions of more parameters than the limit; commands and HTTP routes name their users' options."""
    return sorted(
        (
            function
            for source in sources
            for function in source.functions
            if function.num_parameters > limit and not function.is_route and not function.file.startswith(f"{CLI}/")
        ),
        key=lambda function: (-function.num_parameters, function.file, function.line),
    )


def classes_above(sources: Sequence[Source], limit: int = MAX_METHODS) -> list[Class]:
    """Return the classes of more methods than the limit, the largest first."""
    found = (one for source in sources for one in source.classes if one.num_methods > limit)
    return sorted(found, key=lambda one: (-one.num_methods, one.file))


def names_with_several_meanings(sources: Sequence[Source]) -> dict[str, list[str]]:
    """Return the glossary's names that more than one module defines at its top, with these modules' files."""
    places = {name: [source.file for source in sources if name in source.defined_names] for name in GLOSSARY}
    return {name: files for name, files in places.items() if len(files) > 1}


def places(sources: Sequence[Source]) -> Iterator[str]:
    """Yield a line for each place that a figure above its limit counts, and the files with most `Any`."""
    for function in functions_above(sources):
        yield f"{function.file}:{function.line}: {function.name} takes {function.num_parameters} parameters"
    for found in classes_above(sources):
        yield f"{found.file}:{found.line}: {found.name} has {found.num_methods} methods"
    imports = imports_among(sources)
    for one, other in two_way_pairs(sources, imports):
        yield f"two-way: {one} and {other}"
    for group in circles(imports):
        yield f"circle of {len(group)}: {', '.join(sorted(group))}"
        inside = (found for found in imports if {found.importer, found.imported} <= group)
        for importer, imported, line, lazy in sorted({(i.importer, i.imported, i.line, i.lazy) for i in inside}):
            yield f"  {importer}:{line} imports {imported}{' (lazy)' if lazy else ''}"
    for name, files in names_with_several_meanings(sources).items():
        yield f"{name}: {', '.join(files)}"
    for source in sorted(sources, key=lambda source: -source.counts["any"])[:NUM_FILES_SHOWN]:
        yield f"{source.file}: Any {source.counts['any']} times"


def _add_options(parser: argparse.ArgumentParser) -> None:
    root = Path(__file__).parents[1]
    parser.add_argument("--root", type=Path, default=root, help="the folder of the packages (this repository)")
    parser.add_argument("--places", action="store_true", help="also name the places behind the figures")


if __name__ == "__main__":
    with benchmark(__doc__, add_options=_add_options) as options:
        # --quick changes nothing: the whole takes seconds.
        read = read_sources(options.own.root, PACKAGES)
        report(options, measure(read), GOALS)
        if options.own.places:
            print(*places(read), sep="\n", file=sys.stderr if options.json == STANDARD_OUTPUT else sys.stdout)
