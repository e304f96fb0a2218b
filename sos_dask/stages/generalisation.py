"""Stage generalisation: every method trained without a region, a reference or the sparse pairs.

A task is one fit: a method without one group of pairs. It runs in one process, so that all fits
run beside each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sos_dask import corrections as models
from sos_dask.columns import floats, matrix32
from sos_dask.errors import ConfigError, ModelError
from sos_dask.evidence.figures import scatter
from sos_dask.evidence.left_out import (
    DENSITY,
    RANDOM,
    REFERENCE,
    REGION,
    density_groups,
    left_out_groups,
    region_groups,
)
from sos_dask.evidence.projection import chosen_rows
from sos_dask.problem import DEFAULT, PARAMETERS, Problem, features, parameters_of
from sos_dask.run.cluster import Cluster, Report, silent
from sos_dask.schema import HEALPIX_COLUMN, LABELS
from sos_dask.stages.evidence import DIFFERENCES, training_pairs
from sos_dask.stages.parts import records, run_parts, unless_complete
from sos_dask.stages.pieces import read_piece, write_piece
from sos_dask.stages.train import VERSION as TRAIN_VERSION
from sos_dask.storage.artifact import Manifest, Output, Recipe, Rows
from sos_dask.storage.catalog import Catalog, write_parquet

VERSION = 3
TABLE = "generalisation.parquet"
_NONE = "none"


@dataclass(frozen=True)
class GeneralisationSettings:
    """Settings of the stage.

    Parameters
    ----------
    max_pairs : int
        Of more pairs, a sample of about as many is used, chosen by a hash of their places.
    min_pairs : int
        Smallest group that is left out, and smallest rest that trains.
    seed : int

    Raises
    ------
    ConfigError
        A number is not positive.
    """

    max_pairs: int = 20_000
    min_pairs: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_pairs", "min_pairs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)} is not positive")


@dataclass(frozen=True)
class _Part:
    output: Output
    method: str
    params: Mapping[str, Any]
    split: str
    group: str

    @property
    def key(self) -> str:
        return f"{self.method}-{self.split}-{self.group}".replace("/", " per ")


@dataclass(frozen=True)
class _Source:
    """All pairs as one batch; fold 1 is left out."""

    batch: models.Batch
    problem: Problem = DEFAULT

    @property
    def n_batches(self) -> int:
        return 1

    def load(self, index: int) -> models.Batch:
        return self.batch


def generalisation_recipe(
    pairs: str, methods: Mapping[str, Mapping[str, Any]], settings: GeneralisationSettings
) -> Recipe:
    """Recipe of `generalisation` for pairs of this fingerprint."""
    params = {
        "methods": {name: dict(p) for name, p in methods.items()},
        "train_version": TRAIN_VERSION,  # what the methods make of their parameters
        "settings": asdict(settings),
    }
    return Recipe("generalisation", VERSION, params, {"pairs": pairs})


def generalisation(
    pairs: Catalog,
    directory: Path,
    methods: Mapping[str, Mapping[str, Any]],
    settings: GeneralisationSettings | None = None,
    *,
    overwrite: bool = False,
    cluster: Cluster | None = None,
    report: Report = silent,
) -> Manifest:
    """Train every method without one group of pairs after the other, and predict that group.

    Groups are the sparse 5 % of the pairs in the parameters they have, cells of the Kiel diagram,
    and the pairs of each reference survey.

    Parameters
    ----------
    pairs : Catalog
        Output of crossmatch.
    directory : Path
        Gets ``generalisation.parquet``: of each split, group, method and label the pairs trained on
        and left out, and median and scatter (1.4826 MAD) of the left-out pairs, corrected by a
        model that never saw their group (``median``, ``mad``), and by one that was trained on a
        random four fifths of all pairs (``median_random``, ``mad_random``, of those pairs of the
        group that it was not trained on, ``n_random``). Method ``none`` is the bare difference.
    methods : mapping of str to mapping
        Hyper-parameters of each method.
    settings : GeneralisationSettings, optional

    Returns
    -------
    Manifest
        ``summary``: parameters of the density, groups left out, fits that were refused with the
        reason.

    Raises
    ------
    CatalogError
        A column is missing, or the directory holds something else.
    ModelError
        There are too few pairs for any group.
    """
    settings = settings or GeneralisationSettings()
    pairs.require(HEALPIX_COLUMN, "use", "fold", *LABELS, *DIFFERENCES)
    complete = {name: models.check_params(name, params) for name, params in methods.items()}
    output = Output.prepare(
        directory,
        generalisation_recipe(pairs.fingerprint, complete, settings),
        overwrite,
        [pairs.path],
    )
    if output.complete:
        return output.load_manifest()
    with unless_complete(output):
        table, names = _pairs(pairs, settings)
        splits = {name: tuple(table[name].to_pylist()) for name in (DENSITY, REGION, REFERENCE)}
        groups = left_out_groups(splits, settings.min_pairs)
        if not groups:
            raise ModelError(
                f"{pairs.path}: no group of {table.num_rows} pairs can be left out of training: "
                f"each and its rest need {settings.min_pairs}",
                "Match more stars, or lower [generalisation] min_pairs.",
            )
        write_piece(output.work / "pairs.arrow", table)
        parts = [
            _Part(output, method, params, split, group)
            for method, params in complete.items()
            for split, group in [(RANDOM, ""), *groups]
        ]
        by_key = {part.key: part for part in parts}
        run_parts(output, "fits", by_key, _fit, cluster or Cluster(), "generalisation", report)
        done = records(output, "fits", list(by_key))
        refused = {part.key: r["refused"] for part, r in zip(parts, done, strict=True)}
        record = output.write_file(TABLE, partial(write_parquet, _figures(table, parts, groups)))
        n_used = table.num_rows
        output.commit(
            Rows(pairs.n_rows, n_used, 0, {"not used": pairs.n_rows - n_used}),
            (record,),
            {
                "density_in": list(names),
                "groups": [list(group) for group in groups],
                "refused": {key: why for key, why in refused.items() if why},
            },
        )
    return output.load_manifest()


def _pairs(pairs: Catalog, settings: GeneralisationSettings) -> tuple[pa.Table, tuple[str, ...]]:
    """Pairs fit for training with their groups, and the parameters that their density is in."""
    wanted = [*PARAMETERS, HEALPIX_COLUMN, "fold", "survey_ref", *DIFFERENCES]
    columns = pairs.columns(wanted)
    table = training_pairs(pairs, columns).combine_chunks()
    if table.num_rows > settings.max_pairs:
        places = table[HEALPIX_COLUMN].to_numpy()
        rate = {0: settings.max_pairs / table.num_rows}
        kept = chosen_rows(places, np.zeros(len(places), np.int64), rate, settings.seed)
        table = table.filter(pa.array(kept))
    known = {name: floats(table, name) for name in PARAMETERS if name in table.column_names}
    # A parameter that few pairs have would leave few pairs.
    names = tuple(n for n, values in known.items() if np.isfinite(values).mean() > 0.5)
    survey = (
        table["survey_ref"].fill_null("")
        if "survey_ref" in table.column_names
        else pa.array([""] * table.num_rows)
    )
    groups = {
        DENSITY: density_groups(parameters_of(known, names)),
        REGION: region_groups(known["teff"], known["logg"]),
    }
    kept_columns = table.select([*LABELS, *DIFFERENCES, "fold"])
    for name, values in groups.items():
        kept_columns = kept_columns.append_column(name, pa.array(values, pa.string()))
    return kept_columns.append_column(REFERENCE, survey.cast(pa.string())), names


def _fit(part: _Part) -> None:
    """Fit without the group, and keep the predictions of all pairs that were left out."""
    table = read_piece(part.output.work / "pairs.arrow")
    fold = _folds(table, part.split, part.group)
    x = features(*(floats(table, label) for label in LABELS))
    differences = matrix32(table, DIFFERENCES)
    batch = models.Batch(x, differences, fold, np.ones(len(x), np.float32))
    predicted, refused = np.full((len(x), len(LABELS)), np.nan, np.float32), ""
    try:
        fitted = models.fit(part.method, _Source(batch), train_folds=[0], params=part.params)
        predicted[fold == 1] = fitted.predict(x[fold == 1])
    except ModelError as error:
        refused = error.message
    write_piece(
        _piece(part),
        pa.table({label: predicted[:, number] for number, label in enumerate(LABELS)}),
    )
    part.output.put_record("fits", part.key, {"refused": refused})


def _folds(table: pa.Table, split: str, group: str) -> NDArray[np.int8]:
    """Train (0), left out (1), or neither (2): pairs that a split gives to no group."""
    if split == RANDOM:
        return np.asarray(table["fold"].to_numpy() == 0, dtype=np.int8)
    is_group = pc.equal(table[split], group).to_numpy(zero_copy_only=False)
    in_none = pc.equal(table[split], "").to_numpy(zero_copy_only=False)
    return np.where(in_none, 2, is_group).astype(np.int8)


def _piece(part: _Part) -> Path:
    return part.output.work / "predictions" / f"{part.key}.arrow"


def _figures(table: pa.Table, parts: list[_Part], groups: list[tuple[str, str]]) -> pa.Table:
    by_place = {(part.method, part.split, part.group): part for part in parts}
    rows = []
    for method in [_NONE, *dict.fromkeys(part.method for part in parts)]:
        for split, group in groups:
            fold = _folds(table, split, group)
            chosen, n_train = fold == 1, int(np.count_nonzero(fold == 0))
            for label, name in zip(LABELS, DIFFERENCES, strict=True):
                bare = floats(table, name)
                residual, random = bare, bare
                if method != _NONE:
                    residual = bare - _predicted(by_place[method, split, group], label)
                    random = bare - _predicted(by_place[method, RANDOM, ""], label)
                one, other = _spread(residual[chosen]), _spread(random[chosen])
                rows.append((split, group, method, label, n_train, *one, *other))
    names = ("split", "group", "method", "label", "n_train", "n", "median", "mad",
             "n_random", "median_random", "mad_random")  # fmt: skip
    return pa.table(dict(zip(names, map(list, zip(*rows, strict=True)), strict=True)))


def _predicted(part: _Part, label: str) -> NDArray[np.float64]:
    return np.asarray(read_piece(_piece(part))[label].to_numpy(), dtype=np.float64)


def _spread(values: NDArray[np.float64]) -> tuple[int, float | None, float | None]:
    values = values[np.isfinite(values)]
    if not len(values):
        return 0, None, None
    return len(values), float(np.median(values)), scatter(values)
