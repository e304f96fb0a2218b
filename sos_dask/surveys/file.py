"""Survey definitions as TOML files: a survey is a file and no code.

`load_survey` reads a built-in definition or a user's own, and checks every key of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from sos_dask.errors import SurveyError
from sos_dask.schema import (
    CANONICAL,
    DTYPES,
    LABELS,
    REQUIRED,
    RESERVED,
    TEXT_UNITS,
    Column,
    is_gaia_id,
    nearest,
)
from sos_dask.settings import COLUMN_RULE, NAME_RULE, is_column, is_name, parse_toml
from sos_dask.surveys.definition import ALLOWANCES, Cut, SourceColumn, Survey, plain

SURVEY_FORMAT = 1


def builtin_surveys() -> list[str]:
    """Names of the surveys that come with the package, sorted."""
    folder = resources.files("sos_dask") / "surveys"
    return sorted(item.name[:-5] for item in folder.iterdir() if item.name.endswith(".toml"))


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
        Unknown name, unreadable file, unknown key, value of a wrong type, missing column, a bit
        used twice. The message begins with ``name_or_path``.
    """
    name_or_path = str(name_or_path)
    if name_or_path.endswith(".toml") or "/" in name_or_path:
        path = Path(name_or_path)
        if not path.is_file():
            raise SurveyError(
                f"survey definition {path} does not exist",
                "'sos-dask surveys' lists the built-in ones, which have no path.",
            )
        source = path.read_bytes
    else:
        if name_or_path not in builtin_surveys():
            raise SurveyError(
                f"there is no survey '{name_or_path}'",
                nearest(name_or_path, builtin_surveys())
                or "'sos-dask surveys' lists them; a path of a TOML file works too.",
            )
        source = (resources.files("sos_dask") / "surveys" / f"{name_or_path}.toml").read_bytes
    try:
        _, raw = parse_toml(source(), SurveyError)
        merged = _merged(raw, _table(overrides or {}, "the overrides"))
        survey = parse_survey(merged, json.dumps(merged, default=str))
    except OSError as error:
        raise SurveyError(f"{name_or_path}: cannot be read: {error.strerror}") from None
    except SurveyError as error:
        raise SurveyError(f"{name_or_path}: {error.message}", error.hint) from None
    return survey


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


_SURVEY_KEYS = (
    "format", "name", "title", "reference", "hdu", "position_epoch", "missing", "missing_text",
    "expected_error", "notes", "max_rejected_fraction", "allow", "columns", "extra",
    "cuts",
)  # fmt: skip
_COLUMN_KEYS = ("source", "join", "unit", "dtype", "missing", "element")
_EXTRA_KEYS = (*_COLUMN_KEYS, "ucd", "description", "min", "max")
_CUT_KEYS = (
    "bit", "column", "min", "max", "bits_unset", "values", "null_passes", "optional", "reason",
)  # fmt: skip


def parse_survey(raw: Mapping[str, Any], definition: str = "") -> Survey:
    """Make a `Survey` of a decoded TOML document (see `load_survey`).

    Raises
    ------
    SurveyError
        The message names the table and key.
    """
    raw = _table(raw, "the survey")
    _check_keys(raw, "the survey", _SURVEY_KEYS)
    if type(raw.get("format")) is not int or raw["format"] != SURVEY_FORMAT:
        raise SurveyError(
            f"survey format {raw.get('format')!r} is not {SURVEY_FORMAT}",
            f"Write format = {SURVEY_FORMAT}, or install the version that made the file.",
        )
    for key in ("name", "title", "columns"):
        if key not in raw:
            raise SurveyError(f"'{key}' is missing")
    name = _text(raw, "name", "the survey")
    if not is_name(name):
        raise SurveyError(f"name '{name}' is no name of a survey: {NAME_RULE}")
    hdu = _integer(raw, "hdu", "the survey", 1) if "hdu" in raw else None
    if hdu is not None and hdu < 1:
        raise SurveyError(f"hdu {hdu} holds no table", "Table extensions count from 1.")
    position_epoch = _number(raw, "position_epoch", "the survey")
    if position_epoch is not None and not 1800 <= position_epoch <= 2100:
        raise SurveyError(f"position_epoch {position_epoch} is not a Julian year such as 2016.0")
    max_rejected = _number(raw, "max_rejected_fraction", "the survey")
    if max_rejected is not None and not 0 <= max_rejected <= 1:
        raise SurveyError(f"max_rejected_fraction {max_rejected} is outside 0..1")
    allow = _texts(raw, "allow", "the survey")
    for item in allow:
        if item not in ALLOWANCES:
            raise SurveyError(
                f"'allow' in the survey names no check: '{item}'",
                f"Known are: {', '.join(ALLOWANCES)}.",
            )
    return Survey(
        name=name,
        title=_text(raw, "title", "the survey"),
        columns=_all_columns(raw),
        reference=_text(raw, "reference", "the survey"),
        hdu=hdu,
        position_epoch=position_epoch,
        missing=_numbers(raw, "missing", "the survey"),
        missing_text=_texts(raw, "missing_text", "the survey"),
        cuts=_all_cuts(raw),
        expected_error=_expected_error(raw),
        notes=_text(raw, "notes", "the survey"),
        max_rejected_fraction=0.01 if max_rejected is None else max_rejected,
        allow=allow,
        definition=definition,
    )


def _all_columns(raw: Mapping[str, Any]) -> dict[str, SourceColumn]:
    columns: dict[str, SourceColumn] = {}
    for name, value in _table(raw["columns"], "[columns]").items():
        if name not in CANONICAL:
            raise SurveyError(
                f"[columns.{name}] is not a canonical column",
                nearest(name, CANONICAL) or f"Native extras go to [extra.{name}].",
            )
        where = f"[columns.{name}]"
        columns[name] = _source(where, CANONICAL[name], _entry(value, where, _COLUMN_KEYS))
    for name in REQUIRED:
        if name not in columns:
            raise SurveyError(f"[columns.{name}] is missing")
    taken = {name.lower() for name in (*CANONICAL, *RESERVED)}
    for name, value in _table(raw.get("extra", {}), "[extra]").items():
        where = f"[extra.{name}]"
        entry = _entry(value, where, _EXTRA_KEYS)
        if not is_column(name):
            raise SurveyError(f"{where}: '{name}' is no name of a column: {COLUMN_RULE}")
        if name.lower() in taken:  # SQL and FITS ignore the case of names
            raise SurveyError(f"{where} has a name that is taken", "Choose another name.")
        taken.add(name.lower())
        column = Column(
            name,
            _dtype(entry, where, "string" if "join" in entry else "float32"),
            _text(entry, "unit", where),
            _text(entry, "ucd", where),
            _text(entry, "description", where),
            *_limits(entry, where),
        )
        columns[name] = _source(where, column, entry)
    return columns


def _source(where: str, column: Column, entry: Mapping[str, Any]) -> SourceColumn:
    if ("source" in entry) == ("join" in entry):
        raise SurveyError(f"{where} needs either 'source' or 'join'")
    join = "join" in entry
    sources = _texts(entry, "join" if join else "source", where, one=True)
    if not sources or "" in sources or len(set(sources)) < len(sources):
        raise SurveyError(f"{where}: 'source' and 'join' take column names, each once")
    dtype = _dtype(entry, where, "string" if join else column.dtype)
    if column.name == "obs_id":
        if dtype not in ("int64", "string"):
            raise SurveyError(f"{where}: obs_id is int64 or string, not {dtype}")
    elif dtype != column.dtype:
        raise SurveyError(f"{where}: {column.name} is {column.dtype}, not {dtype}")
    if join and dtype != "string":
        raise SurveyError(f"{where}: joined columns are strings, not {dtype}")
    if is_gaia_id(column.name) and dtype.startswith("float"):
        raise SurveyError(f"{where}: a 19-digit id loses digits as {dtype}", "Use int64.")
    unit = _text(entry, "unit", where, column.unit)
    limited = column.minimum is not None or column.maximum is not None
    if dtype == "string" and (unit or entry.get("missing") or limited):
        raise SurveyError(
            f"{where}: a string has no unit, limits or missing numbers",
            "'missing_text' of the survey holds the words that mean null.",
        )
    element = _integer(entry, "element", where, -1) if "element" in entry else None
    if element is not None and (element < 0 or join):
        raise SurveyError(f"{where}: 'element' counts from 0, and joined columns have none")
    return SourceColumn(
        column=column,
        sources=sources,
        join=join,
        unit=unit,
        dtype=dtype,
        missing=_numbers(entry, "missing", where),
        element=element,
        factor=_factor(where, unit, column.unit),
    )


def _factor(where: str, native: str, product: str) -> float:
    if native == product:
        return 1.0
    problem = f"{where}: unit '{native}' does not convert to '{product}'"
    if native in TEXT_UNITS or product in TEXT_UNITS:
        raise SurveyError(problem, f'Write unit = "{product}" where it is the same.')
    from astropy import units  # half a second, which most definitions never need

    try:
        return float(units.Unit(native).to(units.Unit(product)))
    except (ValueError, TypeError, AttributeError):
        raise SurveyError(problem, "Write units as astropy does, for example mas/yr.") from None


def _dtype(entry: Mapping[str, Any], where: str, default: str) -> str:
    dtype = _text(entry, "dtype", where, default)
    if dtype not in DTYPES:
        raise SurveyError(f"{where}: dtype '{dtype}' is not one of {', '.join(DTYPES)}")
    return dtype


def _all_cuts(raw: Mapping[str, Any]) -> tuple[Cut, ...]:
    cuts = tuple(_cut(name, value) for name, value in _table(raw.get("cuts", {}), "[cuts]").items())
    users: dict[int, str] = {}
    for cut in cuts:
        if cut.bit in users:
            raise SurveyError(
                f"bit {cut.bit} is used by [cuts.{users[cut.bit]}] and [cuts.{cut.name}]",
                "Give each cut a bit of its own, 0 to 62.",
            )
        users[cut.bit] = cut.name
    return cuts


def _cut(name: str, value: object) -> Cut:
    where = f"[cuts.{name}]"
    entry = _entry(value, where, _CUT_KEYS)
    for key in ("bit", "column"):
        if key not in entry:
            raise SurveyError(f"{where} needs '{key}'")
    bit = _integer(entry, "bit", where, -1)
    if not 0 <= bit <= 62:
        raise SurveyError(f"{where}: bit {bit} is outside 0..62")
    tests = [key for key in ("min", "max", "bits_unset", "values") if key in entry]
    if len(tests) != 1 and tests != ["min", "max"]:
        raise SurveyError(
            f"{where} needs one test, and has {' and '.join(tests) or 'none'}",
            "Give min, max or both, or bits_unset, or values. In a job, false removes a key.",
        )
    minimum, maximum = _limits(entry, where)
    bits_unset = _list(entry, "bits_unset", where)
    if not all(type(item) is int and 0 <= item <= 63 for item in bits_unset):
        raise SurveyError(f"{where}: 'bits_unset' must be bit numbers, 0 to 63")
    values = _list(entry, "values", where)
    if not (all(isinstance(item, str) for item in values) or all(map(_is_number, values))):
        raise SurveyError(f"{where}: 'values' must be all numbers or all text")
    if tests[0] in ("bits_unset", "values") and not entry[tests[0]]:
        raise SurveyError(f"{where}: '{tests[0]}' is empty")
    if not _text(entry, "column", where):
        raise SurveyError(f"{where}: 'column' is empty")
    return Cut(
        name=name,
        bit=bit,
        column=_text(entry, "column", where),
        minimum=minimum,
        maximum=maximum,
        bits_unset=bits_unset,
        values=values,
        null_passes=_flag(entry, "null_passes", where),
        optional=_flag(entry, "optional", where),
        reason=_text(entry, "reason", where),
    )


def _expected_error(raw: Mapping[str, Any]) -> dict[str, float]:
    where = "[expected_error]"
    entry = _entry(raw.get("expected_error", {}), where, (*LABELS, "rv"))
    errors = {}
    for label in entry:
        error = _number(entry, label, where)
        if error is None or error <= 0:
            raise SurveyError(f"{where}: '{label}' must be above 0, not {entry[label]!r}")
        errors[label] = error
    return errors


def _limits(entry: Mapping[str, Any], where: str) -> tuple[float | None, float | None]:
    minimum, maximum = _number(entry, "min", where), _number(entry, "max", where)
    if minimum is not None and maximum is not None and minimum > maximum:
        raise SurveyError(f"{where}: min {plain(minimum)} is above max {plain(maximum)}")
    return minimum, maximum


def _check_keys(given: Mapping[str, Any], where: str, known: tuple[str, ...]) -> None:
    for key in given:
        if key not in known:
            raise SurveyError(
                f"unknown key '{key}' in {where}",
                nearest(str(key), known) or f"Known are: {', '.join(known)}.",
            )


def _entry(value: object, where: str, known: tuple[str, ...]) -> Mapping[str, Any]:
    entry = _table(value, where)
    _check_keys(entry, where, known)
    return entry


def _table(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        hint = "The name goes into single brackets: [cuts.snr], not [[cuts]]."
        raise SurveyError(
            f"{where} must be a table, not {value!r:.60}", hint if isinstance(value, list) else ""
        )
    return value


def _text(entry: Mapping[str, Any], key: str, where: str, default: str = "") -> str:
    value = entry.get(key, default)
    if not isinstance(value, str):
        raise SurveyError(f"'{key}' in {where} must be text, not {value!r:.60}")
    return value


def _integer(entry: Mapping[str, Any], key: str, where: str, default: int) -> int:
    value = entry.get(key, default)
    if type(value) is not int:  # bool is an int
        raise SurveyError(f"'{key}' in {where} must be a whole number, not {value!r:.60}")
    return value


def _flag(entry: Mapping[str, Any], key: str, where: str) -> bool:
    value = entry.get(key, False)
    if not isinstance(value, bool):
        raise SurveyError(f"'{key}' in {where} must be true or false, not {value!r:.60}")
    return value


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 1e300  # false for NaN; an int of any size is compared


def _number(entry: Mapping[str, Any], key: str, where: str) -> float | None:
    if key not in entry:
        return None
    if not _is_number(entry[key]):
        raise SurveyError(f"'{key}' in {where} must be a number, not {entry[key]!r:.60}")
    return float(entry[key])


def _list(entry: Mapping[str, Any], key: str, where: str) -> tuple[Any, ...]:
    value = entry.get(key, [])
    if not isinstance(value, (list, tuple)):
        raise SurveyError(f"'{key}' in {where} must be a list, not {value!r:.60}")
    return tuple(value)


def _numbers(entry: Mapping[str, Any], key: str, where: str) -> tuple[float, ...]:
    values = _list(entry, key, where)
    for value in values:
        if not _is_number(value):
            raise SurveyError(
                f"'{key}' in {where} must hold numbers, not {value!r:.60}",
                "NaN is null always; words go to 'missing_text' of the survey.",
            )
    return tuple(float(value) for value in values)


def _texts(entry: Mapping[str, Any], key: str, where: str, one: bool = False) -> tuple[str, ...]:
    if one and isinstance(entry.get(key), str):
        return (entry[key],)
    values = _list(entry, key, where)
    for value in values:
        if not isinstance(value, str):
            raise SurveyError(f"'{key}' in {where} must hold text, not {value!r:.60}")
    return values
