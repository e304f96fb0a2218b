"""Surveys: native columns, missing values and quality cuts of a catalog, as TOML files.

A survey is a file and no code. `load_survey` reads a built-in definition or a user's own; the
models below are its tables, and every key is checked. `passing` evaluates a cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    computed_field,
    field_validator,
    model_validator,
)

from sos_dask import schema, settings
from sos_dask.columns import BoolArray, Values, is_text, split
from sos_dask.errors import SurveyError
from sos_dask.schema import CANONICAL, YEARS, Column, nearest
from sos_dask.settings import Settings, explained, is_column, is_name, parse_toml

SURVEY_FORMAT = 1
COLUMN_HEADINGS = ("column", "native", "unit", "dtype", "UCD", "description")
CUT_HEADINGS = ("cut", "test", "reason", "bit")
_FOLDER = Path(__file__).parent


def _name(text: str) -> str:
    if not is_name(text):
        raise ValueError(f"'{text}' cannot be the name of a survey: {settings.NAME_RULE}")
    return text


def _sources(names: tuple[str, ...]) -> tuple[str, ...]:
    if not names or "" in names or len(set(names)) < len(names):
        raise ValueError("give names of native columns, each once")
    return names


def _values(values: tuple[Any, ...]) -> tuple[Any, ...]:
    kinds = {str if isinstance(value, str) else type(value) for value in values}
    if not (kinds <= {str} or kinds <= {int, float}):
        raise ValueError("the values must be all numbers or all text")
    return values


_Lax = Field(strict=False)  # TOML has lists and no tuples
_Numbers = Annotated[tuple[float, ...], _Lax]
_Texts = Annotated[tuple[str, ...], _Lax]
_Sources = Annotated[_Texts, AfterValidator(_sources)]


def _check_limits(low: float | None, high: float | None) -> None:
    if low is not None and high is not None and low > high:
        raise ValueError(f"min {plain(low)} is above max {plain(high)}")


class SourceColumn(Settings):
    """Recipe of one column of the product: a table ``[columns.NAME]``.

    The first of the native columns ``source`` that a file has is used (releases differ); a name
    that the file has in another case only counts as the same. With ``join`` the value is the text
    of all of them, joined by dots; a null is empty text there. A number counts with its text in the
    file, or its shortest text where the file is binary.
    """

    name: str = Field(exclude=True)
    source: Annotated[
        _Sources, BeforeValidator(lambda given: (given,) if isinstance(given, str) else given)
    ] = Field((), description="native columns, of which the first that is there is used")
    join: _Sources = Field((), description="native columns whose texts are joined by dots")
    unit: str = Field("", description="unit of the native column, as astropy writes it")
    dtype: Literal["int64", "float32", "float64", "string"] = "float32"
    missing: _Numbers = Field((), description="numbers that mean null here, beside the survey's")
    element: int | None = Field(None, ge=0, description="element of a vector column, from 0")

    @computed_field  # type: ignore[prop-decorator]
    @property
    def column(self) -> Column:
        """Column of the product that is made."""
        return CANONICAL[self.name]

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the native columns, chosen from or joined."""
        return self.join or self.source

    @computed_field  # type: ignore[prop-decorator]
    @cached_property
    def factor(self) -> float:
        """Product value = native value * ``factor``, by the two units."""
        native, product = self.unit, self.column.unit
        if native == product:
            return 1.0
        problem = f"unit '{native}' does not convert to '{product}': write "
        if native in schema.TEXT_UNITS or product in schema.TEXT_UNITS:
            raise ValueError(f'{problem}unit = "{product}" where it is the same')
        from astropy import units  # half a second, which most definitions never need

        try:
            return float(units.Unit(native).to(units.Unit(product)))
        except (ValueError, TypeError, AttributeError):
            raise ValueError(f"{problem}units as astropy does, for example mas/yr") from None

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, raw: Any) -> Any:
        """Unit and type that the column has where its table gives none."""
        if not isinstance(raw, Mapping):
            return raw
        column = CANONICAL.get(raw["name"], Column("", "float32"))
        dtype = "string" if "join" in raw else column.dtype
        return {"unit": column.unit, "dtype": dtype, **raw}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        column, dtype = self.column, self.dtype
        possible = ("int64", "string") if column.name == "obs_id" else (column.dtype,)
        limited = column.minimum is not None or column.maximum is not None
        is_id, of_text = schema.is_gaia_id(self.name), dtype == "string"
        problems = {
            "the table needs either 'source' or 'join'": bool(self.source) == bool(self.join),
            f"{column.name} is {' or '.join(possible)}, not {dtype}": dtype not in possible,
            f"joined columns are strings, not {dtype}": self.join and not of_text,
            f"a 19-digit id loses digits as {dtype}: use int64": is_id and dtype[:5] == "float",
            "a string has no unit, limits or missing numbers; words that mean null go to "
            "'missing_text' of the survey": of_text and (self.unit or self.missing or limited),
            "joined columns have no 'element'": self.join and self.element is not None,
        }
        for problem, is_there in problems.items():
            if is_there:
                raise ValueError(problem)
        _ = self.factor
        return self


class ExtraColumn(SourceColumn):
    """A native column that is kept under a name of its own: a table ``[extra.NAME]``."""

    ucd: str = Field("", description="Unified Content Descriptor (IVOA UCD1+)")
    description: str = Field("", description="meaning of the column")
    min: float | None = Field(None, description="smallest possible value; lower ones become null")
    max: float | None = Field(None, description="largest possible value; higher ones become null")

    @computed_field  # type: ignore[prop-decorator]
    @property
    def column(self) -> Column:
        """Column of the product that is made."""
        about = (self.unit, self.ucd, self.description, self.min, self.max)
        return Column(self.name, self.dtype, *about)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _check_limits(self.min, self.max)
        return self


class Cut(Settings):
    """One quality cut, a table ``[cuts.NAME]``: a row that fails it gets its bit of ``quality``.

    There is exactly one test: limits (one or both, inclusive), ``bits_unset`` or ``values``, of
    which a text that ends with ``*`` is how texts begin. ``column`` is a native column, with its
    native values in the unit that the survey says; where the file has none of that name, the column
    of the product of that name. Sentinels and impossible values are nulls, but not in a flag whose
    bits are tested.
    """

    name: str = Field(exclude=True)
    bit: int = Field(ge=0, le=62, description="bit of quality, unique in the survey")
    column: str = Field(min_length=1, description="column that is tested")
    min: float | None = Field(None, description="smallest value that passes")
    max: float | None = Field(None, description="largest value that passes")
    bits_unset: Annotated[tuple[Annotated[int, Field(ge=0, le=63)], ...], _Lax] = Field(
        (), description="numbers (0 is the lowest) of the bits that must be 0 in an integer flag"
    )
    values: Annotated[tuple[Any, ...], _Lax, AfterValidator(_values)] = ()
    null_passes: bool = Field(False, description="a null passes; by default it fails")
    optional: bool = Field(False, description="a file without the column passes")
    reason: str = Field("", exclude=True, description="why, with the source")

    @model_validator(mode="after")
    def _one_test(self) -> Self:
        keys = ("min", "max", "bits_unset", "values")
        tests = [key for key in keys if getattr(self, key) not in (None, ())]
        if len(tests) != 1 and tests != ["min", "max"]:
            raise ValueError(
                f"a cut needs one test, and has {' and '.join(tests) or 'none'}: give min, max or "
                "both, or bits_unset, or values; in a job, false removes a key"
            )
        _check_limits(self.min, self.max)
        return self

    def test_text(self) -> str:
        """The test in words, for example ``snrg >= 20`` or ``ASPCAPFLAG bit 23 unset``."""
        numbers = ", ".join(map(plain, self.bits_unset or self.values))
        is_one = len(self.bits_unset or self.values) == 1
        if self.bits_unset:
            text = f"{self.column} {'bit' if is_one else 'bits'} {numbers} unset"
        elif self.values:
            text = f"{self.column} {'=' if is_one else 'is one of'} {numbers}"
        elif self.min is None:
            text = f"{self.column} <= {plain(self.max or 0.0)}"
        elif self.max is None:
            text = f"{self.column} >= {plain(self.min)}"
        else:
            text = f"{plain(self.min)} <= {self.column} <= {plain(self.max)}"
        return text + (" or null" if self.null_passes else "")


class Survey(Settings):
    """One source catalog and release, as its TOML file describes it.

    ``columns`` has canonical and extra columns, in the order of the product. Sentinels of
    ``missing`` are compared in the column's own type (the float32 nearest to -9999.99 is another
    number than the float64).
    """

    TABLE_HINTS: ClassVar[Mapping[str, str]] = {
        table: f"The name goes into single brackets: [{table}.{name}], not [[{table}]]."
        for table, name in (("columns", "teff"), ("extra", "flag"), ("cuts", "snr"))
    }

    name: Annotated[str, AfterValidator(_name)] = Field(description="name of the survey")
    title: str = Field(exclude=True, description="what it is, in one line")
    columns: dict[str, SourceColumn] = Field(description="canonical columns")
    extra: dict[str, ExtraColumn] = Field({}, exclude=True, description="further native columns")
    reference: str = Field("", exclude=True, description="where it is described")
    citation: Annotated[tuple[Annotated[str, Field(pattern=r"^\d{4}\S{15}$")], ...], _Lax] = Field(
        (), exclude=True, description="bibcodes of the papers to cite"
    )
    hdu: int | None = Field(None, ge=1, description="which table of a FITS file or VOTable, from 1")
    # Their columns are named EXTNAME.COLUMN; all have as many rows, and the same ids.
    beside: _Texts = Field((), description="further tables of a FITS file, row by row, by EXTNAME")
    # Julian year of ra and dec where no column states it.
    position_epoch: float | None = Field(None, ge=YEARS[0], le=YEARS[1])
    missing: _Numbers = Field((), description="numbers that mean null in every numeric column")
    missing_text: _Texts = Field((), description="words that mean null, beside the empty one")
    cuts: dict[str, Cut] = Field({}, description="quality cuts")
    expected_error: dict[Literal["teff", "logg", "feh", "rv"], Annotated[float, Field(gt=0)]] = (
        Field({}, description="typical error where the survey states none, in canonical units")
    )
    notes: str = Field("", exclude=True, description="what a user must know")
    max_rejected_fraction: float = Field(
        0.01, ge=0, le=1, exclude=True, description="more unusable rows: it is another file"
    )
    # Right ascensions in deg that look like hours; a VOTable that its service has cut off; a unit
    # that astropy cannot read, taken for the survey's.
    allow: Annotated[tuple[Literal["ra_below_24", "overflow", "unknown_unit"], ...], _Lax] = Field(
        (), exclude=True, description="odd data that is right for this survey"
    )

    @field_validator("columns", "extra", "cuts", mode="before")
    @classmethod
    def _named(cls, table: Any, info: ValidationInfo) -> Any:
        """Entries with their names, which are the keys of the table."""
        if not isinstance(table, Mapping):
            return table
        entries = {}
        for name, entry in table.items():
            if info.field_name == "columns" and name not in CANONICAL:
                raise SurveyError(
                    f"[columns.{name}] is not a canonical column",
                    nearest(name, CANONICAL) or f"Native extras go to [extra.{name}].",
                )
            if isinstance(entry, Mapping) and "name" in entry:
                raise SurveyError(f"unknown key '{info.field_name}.{name}.name'")
            entries[name] = {**entry, "name": name} if isinstance(entry, Mapping) else entry
        return entries

    @model_validator(mode="after")
    def _united(self) -> Self:
        for name in schema.REQUIRED:
            if name not in self.columns:
                raise SurveyError(f"[columns.{name}] is missing")
        taken = {name.lower() for name in (*CANONICAL, *schema.RESERVED)}
        for name in self.extra:
            if not is_column(name):
                problem = f"'{name}' cannot be the name of a column: {settings.COLUMN_RULE}"
                raise SurveyError(f"[extra.{name}]: {problem}")
            if name.lower() in taken:  # SQL and FITS ignore the case of names
                raise SurveyError(
                    f"[extra.{name}] has a name that is taken", "Choose another name."
                )
            taken.add(name.lower())
        for one, other in combinations(self.cuts.values(), 2):
            if one.bit == other.bit:
                raise SurveyError(
                    f"bit {one.bit} is used by [cuts.{one.name}] and [cuts.{other.name}]",
                    "Give each cut a bit of its own, 0 to 62.",
                )
        self.columns.update(self.extra)
        return self

    @computed_field  # type: ignore[prop-decorator]
    @property
    def column_order(self) -> list[str]:
        """Names of the columns: a mapping loses its order in JSON, and it decides the product."""
        return list(self.columns)

    @property
    def constant_epoch(self) -> float | None:
        """Epoch of all positions; None where a column has it or nothing states it."""
        return None if "position_epoch" in self.columns else self.position_epoch

    def arrow_schema(self) -> pa.Schema:
        """Schema of the observations: ``_healpix_29``, the survey's columns, then ``quality``.

        ``position_epoch`` stands before ``quality`` where it is one value for the whole survey.
        """
        fields = [
            source.column.arrow(source.dtype, nullable=name not in ("obs_id", "ra", "dec"))
            for name, source in self.columns.items()
        ]
        if self.constant_epoch is not None:
            fields.append(CANONICAL["position_epoch"].arrow())
        ends = (column.arrow(nullable=False) for column in (schema.HEALPIX, schema.QUALITY))
        return pa.schema([next(ends), *fields, *ends])


def builtin_surveys() -> list[str]:
    """Names of the surveys that come with the package, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def load_survey(name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> Survey:
    """Read a survey definition.

    Parameters
    ----------
    name_or_path : str or Path
        Name of a built-in survey, or path of a TOML file (it ends in ``.toml`` or has a ``/``).
    overrides : mapping, optional
        Settings of a job merged over the file, for example ``{"cuts": {"snr": {"min": 30}}}``.
        ``False`` removes what the file has: ``{"cuts": {"snr": False}}``.

    Raises
    ------
    SurveyError
        What is wrong, or with which name or file, after ``name_or_path``.
    """
    text = str(name_or_path)
    path = Path(text)
    if text in builtin_surveys():
        path = _FOLDER / f"{text}.toml"
    elif not (text.endswith(".toml") or "/" in text):
        hint = "'sos-dask surveys' lists them; a path of a TOML file works too."
        raise SurveyError(f"there is no survey '{text}'", nearest(text, builtin_surveys()) or hint)
    elif "://" in text:
        raise SurveyError(f"survey definition {text} is a URL", "Give a path on this machine.")
    elif not path.is_file():
        raise SurveyError(
            f"survey definition {path} does not exist",
            "'sos-dask surveys' lists the built-in ones, which have no path.",
        )
    try:
        _, raw = parse_toml(path.read_bytes(), SurveyError)
        return parse_survey(raw, overrides)
    except OSError as error:
        raise SurveyError(f"{text}: cannot be read: {error.strerror}") from None
    except SurveyError as error:
        raise SurveyError(f"{text}: {error.message}", error.hint) from None


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = _merged(merged[key], value)
        elif value is False:
            merged.pop(key, None)  # every flag is false by default
        else:
            merged[key] = value
    return merged


def parse_survey(raw: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> Survey:
    """Make a `Survey` of a decoded TOML document: see `load_survey`."""
    for where, table in (("the survey", raw), ("the overrides", overrides or {})):
        if not isinstance(table, Mapping):
            raise SurveyError(f"{where} must be a table, not {table!r:.60}")
    content = _merged(raw, overrides or {})
    stated = content.pop("format", None)
    if type(stated) is not int or stated != SURVEY_FORMAT:
        raise SurveyError(
            f"survey format {stated!r} is not {SURVEY_FORMAT}",
            f"Write format = {SURVEY_FORMAT}, or install the version that made the file.",
        )
    try:
        return Survey.model_validate(content)
    except ValidationError as error:
        found = explained(Survey, error)
        raise SurveyError(found.message, found.hint) from None


def describe_columns(survey: Survey) -> list[tuple[str, ...]]:
    """One row a column, as text under ``COLUMN_HEADINGS``.

    Native names are ``a or b`` (the first in the file), ``a + b`` (joined) or ``a[2]`` (an
    element); ``a in kpc`` is converted.
    """
    rows: list[tuple[Column, str, str]] = []
    for source in survey.columns.values():
        native = (" + " if source.join else " or ").join(source.sources)
        native += "" if source.element is None else f"[{source.element}]"
        native += f" in {source.unit}" if source.factor != 1.0 else ""
        rows.append((source.column, native, source.dtype))
    if survey.constant_epoch is not None:
        epoch = CANONICAL["position_epoch"]
        rows.append((epoch, f"= {plain(survey.constant_epoch)}", epoch.dtype))
    return [(of.name, native, of.unit, dtype, of.ucd, of.description) for of, native, dtype in rows]


def describe_cuts(survey: Survey) -> list[tuple[str, ...]]:
    """One row a cut, as text under ``CUT_HEADINGS``; ``bit`` is its number in ``quality``."""
    return [(cut.name, cut.test_text(), cut.reason, str(cut.bit)) for cut in survey.cuts.values()]


def plain(value: float | str) -> str:
    """A value as text, whole numbers without a point."""
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 1e15
    return str(int(value) if whole else value)


# --- cuts ----------------------------------------------------------------------------------------


def passing(cut: Cut, column: Values, survey: Survey) -> BoolArray:
    """Tell which rows pass a cut of a survey, by the column that it tests.

    NaN, infinity, Arrow nulls and the survey's sentinels are nulls, and a null fails unless the cut
    has ``null_passes``. In a flag whose bits are tested a sentinel is a value as any other.

    Raises `SurveyError`: the column holds values that the cut cannot test.
    """
    try:
        passes, null = (_text_passes if is_text(column) else _passes)(cut, column, survey)
    except ValueError as error:
        raise SurveyError(
            f"survey {survey.name}: cut '{cut.name}' ({cut.test_text()}): column '{cut.column}' "
            f"contains {error}",
            f"Correct [cuts.{cut.name}] of the survey.",
        ) from None
    return np.where(null, cut.null_passes, passes)


def _passes(cut: Cut, column: Values, survey: Survey) -> tuple[BoolArray, BoolArray]:
    """Rows whose number passes, and those without one."""
    values, missing = split(column)
    is_float = values.dtype.kind == "f"
    if any(isinstance(value, str) for value in cut.values):
        raise ValueError("numbers, and the cut lists text")
    null = ~np.isfinite(values) | (False if missing is None else missing)
    if cut.bits_unset:
        values = np.where(null, 0, values)
        if is_float and ((values != np.rint(values)) | (np.abs(values) >= 2.0**53)).any():
            raise ValueError("fractions, which have no bits")
        mask = np.uint64(sum(1 << bit for bit in set(cut.bits_unset)))
        # Sign extension of a narrow negative flag sets its higher bits as well, as in its own type.
        return (values.astype(np.int64).view(np.uint64) & mask) == 0, null

    def stored(value: Any) -> Any:
        """A limit as the column would hold it: 0.1 as float32 is not below the limit 0.1."""
        return values.dtype.type(value) if is_float else value

    for value in survey.missing:
        null |= values == stored(value)
    passes = np.ones(len(values), dtype=bool)
    if cut.values:
        passes = np.isin(values, [stored(value) for value in cut.values])
    if cut.min is not None:
        passes &= values >= stored(cut.min)
    if cut.max is not None:
        passes &= values <= stored(cut.max)
    return passes, null


def _text_passes(cut: Cut, column: Values, survey: Survey) -> tuple[BoolArray, BoolArray]:
    """Rows whose text passes, and the others without one: "" may be an accepted value."""
    if not all(isinstance(value, str) for value in cut.values) or not cut.values:
        raise ValueError("text")
    text = pc.fill_null(pc.ascii_trim_whitespace(column), "")
    words = [value.strip() for value in cut.values], ["", *survey.missing_text]
    passes, null = (
        pc.is_in(text, value_set=pa.array(some)).to_numpy(zero_copy_only=False) for some in words
    )
    for begin in (value[:-1] for value in words[0] if value.endswith("*")):
        passes |= pc.starts_with(text, begin).to_numpy(zero_copy_only=False)
    return passes, null & ~passes
