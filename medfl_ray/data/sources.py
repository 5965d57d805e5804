"""Which hospitals a run has, what they declare in public, and their data."""

from __future__ import annotations

from pathlib import Path

from medfl_ray.config.base import DataKind
from medfl_ray.config.data import DataConfig, HospitalConfig
from medfl_ray.config.files import parse_model
from medfl_ray.config.run import RunConfig
from medfl_ray.config.site import SiteConfig, SitePolicy, load_site_config
from medfl_ray.data.cases import Case, CaseIndex
from medfl_ray.data.layouts.catalogue import discover_cases
from medfl_ray.data.layouts.partitions import partition_patients, split_holdout
from medfl_ray.data.opening import Site, check_one_network, is_private, open_cases
from medfl_ray.data.phantoms.source import open_phantom_hospital, phantom_hospital_names, split_phantoms
from medfl_ray.data.prepare.attacked_patches import alteration_of
from medfl_ray.data.prepare.cache import MemoryBudget
from medfl_ray.data.prepare.cache_folders import sweep_caches
from medfl_ray.data.prepare.dataset import HospitalCases, HospitalData, PatchSampling
from medfl_ray.errors import ConfigError


def list_hospitals(run: RunConfig) -> list[SitePolicy]:
    """Return the hospitals of a run and their public declarations, in the order of the configuration.

    Files are counted only where the data are public or synthetic. A hospital's own policy file wins.

    Raises:
      ConfigError: private data do not declare num_patients, or a site file contradicts the run.
    """
    if run.data.phantom is not None:
        phantom = run.data.phantom
        names = phantom_hospital_names(phantom)
        counts = [len(split_phantoms(run, phantom, i)[0]) for i in range(len(names))]
        return [_policy(run, name, "synthetic", count) for name, count in zip(names, counts, strict=True)]
    if run.data.directory is not None:
        return _partitioned_policies(run)
    check_folders(run)
    return [_hospital_policy(run, hospital) for hospital in run.data.hospitals]


def open_hospital_data(
    run: RunConfig,
    hospital_ids: tuple[str, ...],
    budget: MemoryBudget | None = None,
    cache_root: Path | None = None,
) -> HospitalData:
    """Open one hospital's data, or the union of several inside one trust domain.

    Nothing is decoded before it is needed, unless training.num_workers asks for it. Prepared volumes count towards
    `budget`, which several hospitals of one process may share. Private data are not decoded here:
    `HospitalData.check_cases` does that, and leaves out what cannot be used.

    Args:
      cache_root: folder below which prepared volumes lie with data.cache: disk; a temporary folder when None.

    Raises:
      ConfigError: a hospital is not in the run, its folder does not exist, or private data are not named.
      DataError: the folder or a case is not usable; the message says which case and why.
    """
    if cache_root is not None:
        sweep_caches(cache_root)  # whatever this run keeps, an earlier one may have been killed with volumes on disk
    opened = [_open(run, hospital_id) for hospital_id in hospital_ids]
    if not opened:
        raise ConfigError("no hospital was asked for; expected at least one of the run's")
    check_one_network(opened)
    sampling = PatchSampling.from_config(run.training, run.patch_size)
    data = HospitalData(
        opened,
        sampling,
        run.data,
        budget,
        alteration_of(run.attack, opened),
        cache_root=cache_root,
        num_workers=_num_workers(run, hospital_ids),
        blanks_unreadable=run.privacy.patient_level,
    )
    if data.declared != "private":
        data.decode()
    return data


def _policy(run: RunConfig, hospital: str, declared: DataKind, num_patients: int) -> SitePolicy:
    return SitePolicy(hospital=hospital, data_set=run.data.name, declared=declared, num_patients=num_patients)


def _partitioned_policies(run: RunConfig) -> list[SitePolicy]:
    if run.data.declared == "private":
        raise ConfigError(
            "data.directory holds private data without a declared number of patients. List the folder under "
            "data.hospitals "
            "with num_patients (rounded, public), or set data.declared to 'public' or 'synthetic' if that is what "
            "they are"
        )
    return [
        _policy(run, hospital, run.data.declared, _num_train_patients(run, cases))
        for hospital, cases in _partition(run).items()
    ]


def _partition(run: RunConfig) -> dict[str, tuple[Case, ...]]:
    index = discover_cases(Path(str(run.data.directory)), run.data.format)
    return partition_patients(index.cases, run.data.partition, run.federation.seed)


def _num_train_patients(run: RunConfig, cases: tuple[Case, ...]) -> int:
    train, _ = split_holdout(cases, run.data.holdout_fraction, run.federation.seed)
    return len({case.patient_id for case in train})


def _hospital_policy(run: RunConfig, hospital: HospitalConfig) -> SitePolicy:
    site = _site_config(hospital)
    if site is not None:
        _refuse_other_ledger(run, hospital)
        return site.policy
    declared = hospital.declared or run.data.declared
    num_patients = hospital.num_patients
    if num_patients is None:
        if declared == "private":
            raise ConfigError(
                f"hospital {hospital.id!r} has private data and no num_patients; declare its rounded, public number of "
                "training patients (it sets sample rate, delta and the hospital's weight)"
            )
        place = _locate(run, hospital)
        num_patients = _num_train_patients(run, discover_cases(place.directory, place.data.format).cases)
    return SitePolicy(
        hospital=hospital.id,
        data_set=hospital.data_set or run.data.name,
        declared=declared,
        num_patients=num_patients,
        num_cases=hospital.num_cases,
        max_epsilon=hospital.max_epsilon,
    )


def _refuse_other_ledger(run: RunConfig, hospital: HospitalConfig) -> None:
    """A run that chose the folder of the ledger would choose an empty one, and the hospital's budget would be new."""
    if run.output.state_directory is not None:
        raise ConfigError(
            f"output.state_directory does not go with hospital {hospital.id!r}, whose own file declares its budget: "
            "where its ledger lies is not for a run to say. Leave it out; MEDFL_STATE_DIR of the hospital's machine "
            "names the folder"
        )


def check_folders(run: RunConfig) -> None:
    """Refuse one folder as two hospitals: its patients would have two accounts, and be charged twice or half.

    Raises:
      ConfigError: two hospitals have the same folder, or one has a folder inside the other's.
    """
    known: list[tuple[str, Path]] = []
    for name, _, folder in declared_folders(run):
        for other, place in known:
            if folder == place or folder in place.parents or place in folder.parents:
                raise ConfigError(
                    f"hospitals {other!r} and {name!r} name one folder, or one inside the other; a patient "
                    "belongs to one hospital: give each its own folder, or deal one folder of public data with "
                    "data.directory and data.partition"
                )
        known.append((name, folder))


def declared_folders(run: RunConfig) -> list[tuple[str, DataKind, Path]]:
    """Return hospital, declaration and resolved folder of whatever folders of images a run names and are found here."""
    if run.data.directory is not None:
        return [(run.data.name, run.data.declared, run.data.directory.resolve())]
    found: list[tuple[str, DataKind, Path]] = []
    for hospital in run.data.hospitals:
        if hospital.directory is None and hospital.site_config is None:
            continue
        try:
            site = _locate(run, hospital)
            found.append((hospital.id, site.declared, site.directory.resolve()))
        except (ConfigError, OSError):  # the file lies on another machine, or says itself what is wrong with it
            continue
    return found


def own_policy(run: RunConfig, hospital_id: str) -> SitePolicy | None:
    """Return what the hospital's own file says where it is read, at the hospital; None where it has none."""
    site = next((_site_config(hospital) for hospital in run.data.hospitals if hospital.id == hospital_id), None)
    return site.policy if site is not None else None


def _site_config(hospital: HospitalConfig) -> SiteConfig | None:
    if hospital.site_config is None:
        return None
    site = load_site_config(hospital.site_config)
    if site.hospital.id != hospital.id:
        raise ConfigError(
            f"the site file of hospital {hospital.id!r} is of hospital {site.hospital.id!r}; correct data.hospitals"
        )
    return site


def _locate(run: RunConfig, hospital: HospitalConfig) -> Site:
    """Combine a run's wishes with a hospital's own file; paths in the file are relative to it."""
    site = _site_config(hospital)
    if site is None:
        if hospital.directory is None:
            raise ConfigError(f"hospital {hospital.id!r} has neither directory nor site_config; give one")
        return Site(
            hospital.id, hospital.declared or run.data.declared, run.data, hospital.directory, run.training.num_workers
        )
    changes = dict(site.data.preprocessing)
    if "format" in site.data.model_fields_set:
        changes["format"] = site.data.format
    unknown = set(site.data.preprocessing) - {"spacing_mm", "intensity", "window"}
    if unknown:
        raise ConfigError(
            f"data.preprocessing of hospital {hospital.id!r} has {sorted(unknown)}; known are spacing_mm, intensity, "
            "window"
        )
    if site.data.labels:
        changes["labels"] = site.data.labels
    data = parse_model(
        DataConfig, {**run.data.model_dump(exclude_unset=True), **changes}, "the hospital's data section"
    )
    directory = Path(str(hospital.site_config)).parent / site.data.directory
    if hospital.directory is not None and hospital.directory.resolve() != directory.resolve():
        raise ConfigError(
            f"the run and the site file of hospital {hospital.id!r} name different folders; the site file decides, "
            "remove the directory from data.hospitals"
        )
    return Site(hospital.id, site.data.declared, data, directory, run.training.num_workers or site.training.num_workers)


def _open(run: RunConfig, hospital_id: str) -> HospitalCases:
    if run.data.phantom is not None:
        names = phantom_hospital_names(run.data.phantom)
        return open_phantom_hospital(run, run.data.phantom, names.index(_known(hospital_id, names)))
    return open_cases(run, *_find(run, hospital_id))


def cases_of(run: RunConfig, hospital_id: str) -> tuple[Case, ...]:
    """Return what a hospital's folder lists, training and held-out cases; not for phantoms.

    Raises:
      ConfigError: the hospital is not in the run, or its folder does not exist.
      LayoutError: the folder is not of the given layout.
    """
    return _find(run, hospital_id)[2]


def _find(run: RunConfig, hospital_id: str) -> tuple[Site, CaseIndex, tuple[Case, ...]]:
    if run.data.directory is not None:
        index = discover_cases(run.data.directory, run.data.format)
        parts = partition_patients(index.cases, run.data.partition, run.federation.seed)
        site = Site(hospital_id, run.data.declared, run.data, run.data.directory, run.training.num_workers)
        return site, index, parts[_known(hospital_id, tuple(parts))]
    hospitals = {hospital.id: hospital for hospital in run.data.hospitals}
    site = _locate(run, hospitals[_known(hospital_id, tuple(hospitals))])
    named = site.data.channels if is_private(site) else None
    index = discover_cases(site.directory, site.data.format, named)
    return site, index, index.cases


def _known(hospital_id: str, names: tuple[str, ...]) -> str:
    if hospital_id not in names:
        raise ConfigError(f"hospital {hospital_id!r} is not in the run; its hospitals are {', '.join(names)}")
    return hospital_id


def _num_workers(run: RunConfig, hospital_ids: tuple[str, ...]) -> int:
    sites = [_locate(run, hospital) for hospital in run.data.hospitals if hospital.id in hospital_ids]
    return max([run.training.num_workers, *(site.num_workers for site in sites)])
