"""The pairs as the coverage sees them: parameters, held-out residuals, half-widths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sos_dask.columns import floats, floats32, floats_or_nan, key_numbers
from sos_dask.evidence.coverage_fit import Overlap
from sos_dask.evidence.error_tables import load_errors
from sos_dask.evidence.widening import Target
from sos_dask.problem import PARAMETERS, features
from sos_dask.schema import LABELS
from sos_dask.stages.evidence import (
    DIFFERENCES,
    held_out_pairs,
    single_observations,
    training_pairs,
)
from sos_dask.storage.catalog import Catalog


def read_overlap(model: Path, pairs: Catalog, errors: Path | None = None) -> Overlap:
    """Pairs fit for training, with the residuals of those that a model held out.

    Parameters
    ----------
    errors : Path, optional
        Output of uncertainty for this model.

    Raises
    ------
    CatalogError
        The held-out pairs of the model are not those of these pairs.
    """
    stated = [f"{label}_err_ref" for label in LABELS]
    wanted = pairs.columns([*PARAMETERS, *stated, "n_obs"])
    table = training_pairs(pairs, ["fold", "reference_star_id", *DIFFERENCES, *wanted])
    fold = table["fold"].to_numpy()
    difference = [floats32(table, name) for name in DIFFERENCES]
    rows, predicted = held_out_pairs(model, fold, difference)
    residual = np.full((len(fold), len(LABELS)), np.nan)
    residual[rows] = np.stack(difference, axis=1)[rows] - predicted
    columns = parameter_columns(table)
    half_width = error_class = None
    if errors is not None:
        x = features(*(columns[label] for label in LABELS))
        model_of_errors = load_errors(errors)
        half_width = model_of_errors.half_width(x, columns.get("snr")).astype(np.float64)
        error_class = model_of_errors.is_sparse(x).astype(np.int8)
        half_width[~single_observations(table, rows)] = np.nan
    known = [floats_or_nan(table, name) for name in stated]
    star = key_numbers(table["reference_star_id"], 0).view(np.int64)
    return Overlap(columns, fold, residual, np.stack(known, axis=1), half_width, error_class, star)


def read_target(sample: pa.Table, errors: Path) -> Target:
    """Rows of a sample of the target that pass the cuts, with their class in the error model.

    Parameters
    ----------
    sample : pyarrow.Table
        Parameters, and ``quality`` where the catalog has it.
    errors : Path
        Output of uncertainty.
    """
    if "quality" in sample.schema.names:
        sample = sample.filter(pc.equal(sample["quality"], 0))
    columns = parameter_columns(sample)
    x = features(*(columns[label] for label in LABELS))
    return Target(columns, load_errors(errors).is_sparse(x).astype(np.int8))


def parameter_columns(table: pa.Table) -> dict[str, NDArray[np.float64]]:
    """Parameters that a table has, nan where unknown."""
    return {name: floats(table, name) for name in PARAMETERS if name in table.schema.names}
