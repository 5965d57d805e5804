"""What an adversary in the coordinator's place learns of one private patient beside charged updates.

Plays the game of tests/oracle_game.py, 400 pairs of neighbouring data sets and 13 adversaries, and opens the 300 pairs
of neighbouring folders of tests/neighbours.py. With --out every game is kept as a line of JSON, and a second call goes
on where the first one ended.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from harness import Goal, Options, benchmark, report
from neighbours import differences, neighbours
from oracle_game import Played, interval, play, right_guesses

SEED = 20261201
NUM_GAMES, NUM_FOLDERS = 400, 300
GOALS = (
    Goal("adversaries_that_win", at_most=0),
    Goal("games", at_least=NUM_GAMES),
    Goal("neighbouring_folders", at_least=NUM_FOLDERS),
    Goal("folders_with_differences", at_most=0),
)


def play_all(options: Options, num_games: int) -> list[Played]:
    """Play the games that the kept ones lack."""
    kept = options.out / "games.jsonl"
    lines = kept.read_text(encoding="utf-8").splitlines() if kept.exists() else []
    games = [Played(raw["is_in"], tuple(raw["signs"]), tuple(raw["features"])) for raw in map(json.loads, lines)]
    for number in range(len(games), num_games):
        folder = options.out / "game"
        shutil.rmtree(folder, ignore_errors=True)
        games.append(play(folder, SEED + number))
        with kept.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(asdict(games[-1])) + "\n")
        shutil.rmtree(folder)
    return games[:num_games]


def folders_that_differ(options: Options, num_folders: int) -> int:
    """Count pairs of neighbouring folders in which another patient than the differing one shows a difference."""
    found = 0
    for seed in range(num_folders):
        folder = options.out / "pair"
        shutil.rmtree(folder, ignore_errors=True)
        found += bool(differences(neighbours(folder, seed)))
        shutil.rmtree(folder)
    return found


def main() -> None:
    """Play, compare and report."""
    import logging

    import structlog
    import torch

    torch.set_num_threads(1)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    with benchmark(__doc__ or "") as options:
        num_games, num_folders = (24, 20) if options.quick else (NUM_GAMES, NUM_FOLDERS)
        games = play_all(options, num_games)
        figures: dict[str, float] = {"games": len(games)}
        bounds = {name: interval(right, len(games)) for name, right in right_guesses(games, SEED).items()}
        figures["adversaries_that_win"] = sum(not low <= 0.5 <= high for low, high in bounds.values())
        for name, right in right_guesses(games, SEED).items():
            figures[f"rate[{name}]"] = right / len(games)
            figures[f"low[{name}]"], figures[f"high[{name}]"] = bounds[name]
        figures["neighbouring_folders"] = num_folders
        figures["folders_with_differences"] = folders_that_differ(options, num_folders)
        report(options, figures, GOALS)


if __name__ == "__main__":
    main()
