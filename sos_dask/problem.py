"""The question that corrections answer: labels, by inputs; values that travel."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Self, TypeAlias

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray
from pydantic import AfterValidator, Field, model_validator

from sos_dask.columns import BoolArray, Float32Array, FloatArray, floats32
from sos_dask.schema import CANONICAL, LABELS
from sos_dask.settings import COLUMN_RULE, Settings, is_column

TEFF_UNIT_K = 5040.0
SNR = "snr"
# Rows of one block: the few arrays of a block that are alive at once fit the second-level cache.
BLOCK_ROWS = 8192

Columns: TypeAlias = pa.Table | Mapping[str, ArrayLike]


def _column_name(text: str) -> str:
    if not is_column(text):
        raise ValueError(f"'{text}' cannot name a column: {COLUMN_RULE}")
    return text


ColumnName = Annotated[str, AfterValidator(_column_name)]


class Label(Settings):
    """A quantity that is homogenised, and the names of the columns made of it."""

    name: ColumnName = Field(description="Column of the label in a catalog")
    unit: str = Field("", description="Unit, as in the metadata of columns")
    error: ColumnName = Field(
        default_factory=lambda given: f"{given['name']}_err",
        description="Column of its error; default: <name>_err",
    )

    @property
    def diff(self) -> str:
        """Column of the difference target - reference."""
        return f"{self.name}_diff"

    @property
    def delta(self) -> str:
        """Column of the predicted difference."""
        return f"{self.name}_delta"

    @property
    def sos(self) -> str:
        """Column of the corrected label."""
        return f"{self.name}_sos"

    @property
    def sos_err(self) -> str:
        """Column of the error of the corrected label."""
        return f"{self.name}_sos_err"

    @property
    def sos_err_pair(self) -> str:
        """Column of the error of corrected - reference."""
        return f"{self.name}_sos_err_pair"


class Input(Settings):
    """A column, with its transform, that a correction sees."""

    column: ColumnName = Field(description="Column of a catalog")
    scale: float = Field(1.0, gt=0, description="The column is divided by it")
    log10: bool = Field(
        False, description="Take the decimal logarithm; unknown where the column is not positive"
    )
    name: ColumnName = Field(
        default_factory=lambda given: given["column"],
        description="Name in models and formulas; default: the column",
    )

    def values(self, column: ArrayLike) -> NDArray[np.floating]:
        """Transform a column, shape (n,), in its own precision (logarithms in double).

        NaN where unknown.
        """
        values: NDArray[np.floating] = np.asarray(column)
        if self.scale != 1.0:
            values = values / values.dtype.type(self.scale)
        if self.log10:
            values = np.log10(np.where(values > 0, values, np.nan), dtype=np.float64)
        return values


def parameter_matrix(parameters: Iterable[Input], columns: Mapping[str, ArrayLike]) -> FloatArray:
    """Make some parameters of rows, in double precision, shape (n, k); nan where unknown."""
    values = [one.values(np.asarray(columns[one.column], np.float64)) for one in parameters]
    return np.stack(values, axis=1)


KNOWN_INPUTS = (
    Input(column="teff", scale=TEFF_UNIT_K, name="teff_5040"),
    Input(column="logg"),
    Input(column="feh"),
    Input(column="snr", log10=True),
    Input(column="rv"),
    Input(column="phot_g_mean_mag"),
    Input(column="distance", log10=True),
    Input(column="ebv"),
)
"""All that is known of a row, where the survey or a companion catalog has it."""


class Problem(Settings):
    """Labels that are corrected, and the inputs that a correction sees.

    The default is (teff, logg, feh) by (Teff / 5040 K, log g, [Fe/H]).
    """

    labels: Annotated[tuple[Label, ...], Field(strict=False, min_length=1)] = tuple(
        Label(name=name, unit=CANONICAL[name].unit) for name in LABELS
    )
    inputs: Annotated[tuple[Input, ...], Field(strict=False, min_length=1)] = KNOWN_INPUTS[:3]

    @model_validator(mode="after")
    def _check(self) -> Self:
        for kind, names in (("label", self.names), ("input", self.features)):
            if len(set(names)) < len(names):
                raise ValueError(f"two {kind}s have one name: {', '.join(names)}")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the labels."""
        return tuple(label.name for label in self.labels)

    @property
    def features(self) -> tuple[str, ...]:
        """Names of the inputs."""
        return tuple(item.name for item in self.inputs)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of a catalog that the inputs are made of, each once."""
        return tuple(dict.fromkeys(item.column for item in self.inputs))

    @property
    def of_star(self) -> tuple[Input, ...]:
        """Inputs that tell of the star, not of its observation: all but the signal to noise."""
        return tuple(one for one in self.inputs if one.column != SNR) or self.inputs

    @property
    def star_places(self) -> list[int]:
        """Columns of `matrix` that `star_matrix` has."""
        return [place for place, one in enumerate(self.inputs) if one in self.of_star]

    @property
    def words(self) -> str:
        """What is corrected by what, in words."""
        inputs = (
            f"{'log10 ' * one.log10}{one.column}{f' / {one.scale:g}' if one.scale != 1 else ''}"
            for one in self.inputs
        )
        return f"{', '.join(self.names)} by {', '.join(inputs)}"

    @property
    def parameters(self) -> tuple[Input, ...]:
        """Inputs that coverage and projections look at: these, and all else that is known."""
        of_star = self.of_star
        inputs = (*of_star, *(one for one in self.inputs if one not in of_star))
        known = tuple(item for item in KNOWN_INPUTS if item.column not in self.columns)
        return (*inputs, *known)

    def matrix(self, columns: Columns) -> Float32Array:
        """Make the inputs of a correction, float32 of shape (n, k); each column is contiguous.

        Columns of shape (n,) are null or NaN where unknown.
        """
        return _matrix(self.inputs, columns)

    def star_matrix(self, columns: Columns) -> Float32Array:
        """Make the inputs ``of_star``, which say where a row lies among stars: see `matrix`."""
        return _matrix(self.of_star, columns)

    def fit_for_training(self, pairs: pa.Table) -> BoolArray:
        """Tell which pairs are in ``use`` and know some difference, shape (n,)."""
        known = np.isfinite(self.differences(pairs)).any(axis=1)
        return np.asarray(known & pairs["use"].to_numpy())

    def differences(self, columns: Columns) -> Float32Array:
        """Collect the differences target - reference of pairs, shape (n, l)."""
        return np.stack([_column(columns, label.diff) for label in self.labels], axis=1)


def _matrix(inputs: Iterable[Input], columns: Columns) -> Float32Array:
    parts = [item.values(_column(columns, item.column)) for item in inputs]
    return np.stack(parts, dtype=np.float32).T


def _column(columns: Columns, name: str) -> Float32Array:
    if isinstance(columns, pa.Table):
        return floats32(columns, name)
    return np.asarray(columns[name], dtype=np.float32)


def input_of(column: str) -> Input:
    """Input of a column: with the transform of `KNOWN_INPUTS`, or as it is."""
    return next((one for one in KNOWN_INPUTS if one.column == column), Input(column=column))


DEFAULT = Problem()
RV = Problem(
    labels=(Label(name="rv", unit=CANONICAL["rv"].unit),),
    inputs=tuple(map(input_of, ("phot_g_mean_mag", "teff", "logg", "feh", "snr"))),
)
"""Radial velocity by what its zero point was seen to depend on (Tsantaki et al. 2022, A&A 659, A95,
who put six surveys on one scale)."""
BUILT_IN = {"labels": DEFAULT, "rv": RV}
