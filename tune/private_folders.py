"""Folders of private images, which a search may neither be judged on nor take for public ones."""

from __future__ import annotations

from pathlib import Path

from medfl_ray.config.run import RunConfig
from medfl_ray.data.sources import declared_folders
from medfl_ray.errors import PrivacyConfigError


def refuse_private_folders(trial: RunConfig, final: RunConfig, score_data: Path | None) -> None:
    """Refuse a folder that the final run or the trials declare private where it is elsewhere declared otherwise.

    Scores on `score_data` are shown without a charge, as are those of a hospital that is declared public.

    Raises:
      PrivacyConfigError: names the hospital whose folder it is.
    """
    known = [*declared_folders(final), *declared_folders(trial)]
    private = {folder: hospital for hospital, declared, folder in known if declared == "private"}
    for hospital, declared, folder in declared_folders(trial):
        owner = _owner(private, folder) if declared != "private" else None
        if owner is not None:
            raise PrivacyConfigError(
                f"the trials declare the data of {hospital!r} {declared}, and their folder, or one inside or around "
                f"it, is private data of hospital {owner!r}; declare them private in both, with accounting: compose, "
                "or give the search other data"
            )
    owner = _owner(private, score_data.resolve()) if score_data is not None else None
    if owner is not None:
        raise PrivacyConfigError(
            f"score_data is the folder of the private data of hospital {owner!r}, or one inside or around it; scores "
            "on it are shown without a charge: give a folder of public images"
        )


def _owner(private: dict[Path, str], folder: Path) -> str | None:
    return next(
        (
            hospital
            for place, hospital in private.items()
            if folder == place or folder in place.parents or place in folder.parents
        ),
        None,
    )
