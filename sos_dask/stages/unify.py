"""Stage unify: one row a star over all surveys, with labels on one scale."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import combinations
from types import MappingProxyType
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from sos_dask import correct
from sos_dask.columns import BoolArray, FloatArray, IntArray, floats_or_nan, mixed
from sos_dask.errors import CatalogError, ConfigError
from sos_dask.evidence.trends import three_cornered_hat
from sos_dask.problem import ColumnName
from sos_dask.schema import CANONICAL, HEALPIX_COLUMN, KEYS, LABELS
from sos_dask.sky.healpix import HealpixPixel, separation_arcsec
from sos_dask.sky.neighbours import starts
from sos_dask.stages.base import Made, Role, Run, by_pixel, partition_record
from sos_dask.stages.united import United, UnitedSettings, enough, together, with_key
from sos_dask.stars.average import (
    MIN_COMMON,
    Average,
    Means,
    average,
    floors,
    improbable,
    some_of,
    survey_means,
)
from sos_dask.stars.group import GAIA_IDS
from sos_dask.stars.match import MOTION
from sos_dask.stars.repeats import normalisation
from sos_dask.stars.union import Given, Members, in_order, leaders_of, star_columns, with_survey
from sos_dask.storage.artifact import Output
from sos_dask.storage.manifest import Manifest, Rows

logger = logging.getLogger(__name__)
GOOD, UNCOVERED, FAILS = range(3)  # grades of rows
FLAG_FAILS, FLAG_UNCOVERED, FLAG_DISAGREE, FLAG_REJECTED, FLAG_VARIABLE = 1, 2, 4, 8, 16
MEANINGS = {
    FLAG_FAILS: "a label is of rows that fail a quality cut: there is no other",
    FLAG_UNCOVERED: "a label is of rows outside the coverage: it may be on no common scale",
    FLAG_DISAGREE: "surveys disagree in a label by more than their errors",
    FLAG_REJECTED: "a measurement was left out as an outlier",
    FLAG_VARIABLE: "the radial velocity varies: suspected binary",
}
_CHANCE = 1e-4  # of a flag where errors are right
_OF_STARS = ("ra", "dec", "position_epoch", *GAIA_IDS.values(), "pmra", "pmdec",
             "phot_g_mean_mag", "parallax", "distance", "ebv")  # fmt: skip
_MOST_HATS = 20_000  # stars of a three-cornered hat
_MOST_IDS = 5_000_000  # rows from which on Gaia ids are looked at in part
_ENOUGH = 50_000  # rows of each two surveys where they may have stars in common


class UnifySettings(UnitedSettings):
    """How surveys become one catalog."""

    labels: Annotated[tuple[ColumnName, ...], Field(strict=False)] = Field(
        (*LABELS, "rv"),
        min_length=1,
        description="What is averaged: columns, corrected where *_sos is there.",
    )
    flags: Mapping[str, Mapping[str, str]] = Field(
        {},
        description="By survey and label: column of its flags; default flag_sos_<label>, or else "
        "flag_sos.",
    )
    expected_error: Mapping[str, Mapping[str, float]] = Field(
        {}, description="By survey and label: error where none is stated; default: the survey's."
    )
    clip: float = Field(
        5.0, gt=1, le=1e9, description="Measurements farther off, in errors, are left out."
    )


class Unify(United[UnifySettings]):
    """Make one row a star of the rows of all surveys.

    Corrected labels come with their own errors, and of a survey that has any no other label counts:
    it is on no common scale. Labels of others are taken less the zero point of their survey (of
    ``reference``), with stated errors normalised by repeats (of ``stars``).
    """

    name = "unify"
    version = 4
    Settings = UnifySettings
    of_surveys = "rows"
    roles = (
        Role("rows", "Corrected rows or observations of a survey, by its name.", many=True),
        Role("stars", "Its stars, whose repeats tell its errors.", "output", True, many=True),
        Role("reference", "The united references, with their zero points.", "output", True),
    )
    floor: Mapping[str, FloatArray] = MappingProxyType({})
    together: Mapping[str, FloatArray] = MappingProxyType({})

    @property
    def names(self) -> list[str]:
        """Surveys in their order."""
        return in_order(self.surveys(), self.settings.order)

    def check(self) -> None:
        """Refuse catalogs that lack a column, or a label that none has."""
        surveys = self.surveys()
        ends = [*map(_of, surveys), "err", "chi2", "n", "scatter"]
        for one in surveys:
            if ends.count(_of(one)) > 1:
                what = f"columns of the survey '{one}' would have the names of others"
                raise ConfigError(what, "Give it another name.")
        for survey, catalog in surveys.items():
            names = catalog.schema.names
            corrected = [one for one in self.settings.labels if f"{one}_sos" in names]
            flags = [self._flags(survey, one, names) for one in corrected]
            errors = [f"{one}_sos_err" for one in corrected]
            catalog.require("ra", "dec", HEALPIX_COLUMN, "quality", *flags, *errors)
        self.targets = {*self.settings.flags} | {
            survey
            for survey, one in surveys.items()
            if any(name.endswith("_sos") and name != "flag_sos" for name in one.schema.names)
        }
        for label in self.settings.labels:
            if not any(self._gives(survey, label) for survey in surveys):
                what = f"no survey has the label '{label}' on a common scale"
                raise CatalogError(what, "Leave it out of the labels, or correct it.")
        self.factors = {
            name: Manifest.load(self.path(f"stars.{name}")).summary.get("error_factors", [])
            for name in self.many("stars")
        }
        self.expected = {}
        for name, catalog in surveys.items():
            told = catalog.manifest.summary.get("expected_error", {}) if catalog.manifest else {}
            self.expected[name] = {**told, **self.settings.expected_error.get(name, {})}
        self.offsets: Mapping[str, Mapping[str, float]] = {}
        if "reference" in self.inputs:
            self.offsets = self.manifest("reference").summary["offsets"]

    def make(self, run: Run) -> Made:
        """Plan the partitions, compare the surveys, and average the stars of each partition."""
        catalogs, labels = self.surveys(), self.settings.labels
        pixels, counts = self.plan(run, "unify")
        parts = by_pixel(pixels)
        some = by_pixel(enough(pixels, counts, _ENOUGH))
        run.parts("common", some, self.compare_surveys, "stars in common")
        common = [run.output.read_piece(f"common-{key}") for key in some]
        sample = pa.concat_tables(common) if common else None
        self.floor, self.together, told = {}, {}, []
        for label in labels:
            self.floor[label] = np.zeros(len(self.names))
            if sample is not None:
                value, error = (_matrix(sample, label, kind) for kind in ("value", "error"))
                self.floor[label], self.together[label], found = floors(value, error, self.names)
                told += [{"label": label, **one} for one in [*found, *self._hats(value)]]
        compared = {one[x] for one in told if "offset" in one for x in ("survey", "other")}
        for name in self.names if len(self.names) > 1 else ():
            if name not in compared:
                text = "%s has fewer than %d good stars in common with any other survey: nothing "
                logger.warning(text + "tells whether it is on their scale", name, MIN_COMMON)
        done = run.parts("stars", parts, self.stars_of_pixel, "unify")
        nobody = {
            survey: self.as_read(
                survey, one.schema.empty_table().select(with_key(one, self.columns))
            )
            for survey, one in catalogs.items()
        }
        schema = self._averaged(together(nobody), np.empty(0, dtype=np.int64)).schema
        n_out = run.write_catalog(self.product, pixels, done, schema)
        apart = 0
        for name in (one for one in GAIA_IDS.values() if one in schema.names):
            pieces = [run.output.read_piece(f"{name}-{key}") for key in parts]
            apart += self._warn_of_ids(name, pieces) if pieces else 0
        run.write("errors.parquet", _as_table(told))
        merged = sum(record["n_members"] for record in done) - n_out
        n_in = sum(one.n_rows for one in catalogs.values())
        return Rows(n_in, n_out, 0, {"merged": merged}), {
            "stars_in_several_surveys": sum(record["n_several"] for record in done),
            "rows": {survey: catalog.n_rows for survey, catalog in catalogs.items()},
            "errors": told,
            "ids_apart": apart,
            "flags": {
                text: sum(record["flags"][str(bit)] for record in done)
                for bit, text in MEANINGS.items()
            },
        }

    def _hats(self, value: FloatArray) -> Iterator[dict[str, Any]]:
        """Errors of three surveys by the three-cornered hat, for every three with common stars."""
        for three in combinations(range(len(self.names)), 3):
            rows = some_of(np.flatnonzero(np.isfinite(value[:, three]).all(axis=1)), _MOST_HATS)
            columns = value[rows][:, three].T
            if columns.shape[1] < MIN_COMMON:
                continue
            names = [self.names[one] for one in three]
            for one in three_cornered_hat(list(columns), names):
                others = " ".join(name for name in names if name != one["survey"])
                found = {x: one[x] for x in ("survey", "n", "low", "high", "negative")}
                yield {**found, "other": others, "hat": one["sigma"]}

    @property
    def columns(self) -> list[str]:
        """Columns that are read of a survey's rows, where it has them."""
        names = [HEALPIX_COLUMN, *_OF_STARS, *MOTION, "quality", "snr", "logg"]
        for label in self.settings.labels:
            names += [label, f"{label}_err", f"{label}_sos", f"{label}_sos_err"]
            names += [f"flag_sos_{label}", "flag_sos"]
            names += [of[label] for of in self.settings.flags.values() if label in of]
        return list(dict.fromkeys(names))

    def _gives(self, survey: str, label: str) -> bool:
        names = self.surveys()[survey].schema.names
        return f"{label}_sos" in names or (label in names and survey not in self.targets)

    def _unit(self, label: str, surveys: Collection[str]) -> str:
        schema = self.surveys()[next(iter(surveys))].schema
        item = schema.field(f"{label}_sos" if f"{label}_sos" in schema.names else label)
        return str((item.metadata or {}).get(b"unit", b"").decode())

    def _flags(self, survey: str, label: str, names: Collection[str]) -> str:
        own = f"flag_sos_{label}" if f"flag_sos_{label}" in names else "flag_sos"
        return self.settings.flags.get(survey, {}).get(label, own)

    def as_read(self, survey: str, table: pa.Table) -> pa.Table:
        """Rows of a survey with value, error and grade of each label."""
        names = set(table.schema.names)
        out = table.select(
            [x for x in (HEALPIX_COLUMN, *KEYS, *_OF_STARS, "quality") if x in names]
        )
        fails = pc.not_equal(table["quality"], 0).to_numpy()
        for label in self.settings.labels:
            if f"{label}_sos" in names:
                value, error = (floats_or_nan(table, f"{label}_{x}") for x in ("sos", "sos_err"))
                flags = table[self._flags(survey, label, names)].to_numpy()
                uncovered = flags & correct.NOT_COVERED != 0
            elif label in names and survey not in self.targets:
                value = floats_or_nan(table, label) - self.offsets.get(survey, {}).get(label, 0.0)
                error = floats_or_nan(table, f"{label}_err")
                error = np.where(error > 0, error, self.expected[survey].get(label, np.nan))
                about = floats_or_nan(table, "logg"), floats_or_nan(table, "snr")
                error = error * normalisation(self.factors.get(survey, ()), label, *about)
                uncovered = np.zeros(len(value), dtype=np.bool_)
            else:
                continue
            grade = np.where(fails, FAILS, np.where(uncovered, UNCOVERED, GOOD)).astype(np.int8)
            for kind, values in (("value", value), ("error", error), ("grade", grade)):
                out = out.append_column(f"{label}:{kind}", pa.array(values))
        return out

    def compare_surveys(self, output: Output, key: str, pixel: HealpixPixel) -> dict[str, Any]:
        """Keep the means of the surveys of stars of one partition that several surveys have."""
        table, primary = self.members(pixel, self.columns)
        stars = _Stars.of(table, primary, self.names)
        chosen = stars.n_surveys > 1
        columns = {}
        for label in self.settings.labels:
            means, grade = self._means(stars, label)
            value = np.where((grade == GOOD)[:, None], means.value, np.nan)
            for number, survey in enumerate(self.names):
                columns[f"{label}:{survey}:value"] = value[chosen, number]
                columns[f"{label}:{survey}:error"] = means.error[chosen, number]
        output.write_piece(f"common-{key}", pa.table(columns))
        return {}

    def _drawn(self, numbers: IntArray) -> BoolArray:
        """Rows that are drawn by a number of theirs, all where they are not too many."""
        n_rows = sum(one.n_rows for one in self.surveys().values())
        if n_rows <= _MOST_IDS:
            return np.ones(len(numbers), dtype=np.bool_)
        return mixed(numbers.astype(np.uint64)) < np.uint64(_MOST_IDS / n_rows * 2.0**64)

    def _warn_of_ids(self, name: str, pieces: Sequence[pa.Table]) -> int:
        """Count ids of Gaia on several stars, which are too far apart to be one, and say it."""
        rows = pa.concat_tables(pieces).sort_by([(name, "ascending"), ("star_id", "ascending")])
        ids = rows[name].to_numpy()
        again = np.flatnonzero(ids[1:] == ids[:-1])
        if len(again):
            one, other = rows.slice(int(again[0]), 2).to_pylist()
            places = (np.array([x[y]]) for x in (one, other) for y in ("ra", "dec"))
            text = (
                "%s: %d of %d ids are of stars farther apart than id_radius_arcsec, which stay "
                "apart; %d of %s and %s, %.0f arcsec apart, is the first"
            )
            known = one[name], one["star_id"], other["star_id"], *separation_arcsec(*places)
            logger.warning(text, name, len(again), len(ids), *known)
        return len(again)

    def _means(self, stars: _Stars, label: str) -> tuple[Means, IntArray]:
        """Means of a label by star and survey, and the grade of each star's rows that count."""
        value, error = (stars.rows(f"{label}:{kind}") for kind in ("value", "error"))
        grade = np.nan_to_num(stars.rows(f"{label}:grade"), nan=FAILS).astype(np.int64)
        best = np.full(len(stars.leaders), FAILS)
        has = np.isfinite(value)
        np.minimum.at(best, stars.star[has], grade[has])
        value = np.where(grade == best[stars.star], value, np.nan)
        shape = len(stars.leaders), len(self.names)
        means = survey_means(value, error, stars.star, stars.survey, shape, self.settings.clip)
        return means, best

    def stars_of_pixel(self, output: Output, key: str, pixel: HealpixPixel) -> dict[str, Any]:
        """Write the stars whose primary lies in one partition, at the common epoch."""
        table, primary = self.members(pixel, self.columns)
        stars = self._averaged(table, primary)
        flags = stars["flag_sos"].to_numpy()
        for name in (one for one in GAIA_IDS.values() if one in stars.schema.names):
            ids = pc.fill_null(stars[name], 0).to_numpy()
            rows = stars.select([name, "star_id", "ra", "dec"])
            output.write_piece(f"{name}-{key}", rows.filter((ids > 0) & self._drawn(ids)))
        return {
            "file": partition_record(output, pixel, stars),
            "n_members": table.num_rows,
            "n_several": int(np.count_nonzero(stars["n_surveys"].to_numpy() > 1)),
            "flags": {str(bit): int(np.count_nonzero(flags & bit)) for bit in MEANINGS},
        }

    def _averaged(self, table: pa.Table, primary: IntArray) -> pa.Table:
        """Stars with the averages of their labels."""
        stars, names = _Stars.of(table, primary, self.names), self.names
        n_stars = len(stars.leaders)
        flags = np.zeros(n_stars, dtype=np.int64)
        columns: list[tuple[pa.Field, Any]] = []
        for label in self.settings.labels:
            means, grade = self._means(stars, label)
            floor = self.floor.get(label, np.zeros(len(names)))
            found = average(means, floor, self.settings.clip, self.together.get(label))
            known = np.isfinite(found.value)
            flags |= (known & (grade == FAILS)) * np.int64(FLAG_FAILS)
            flags |= (known & (grade == UNCOVERED)) * np.int64(FLAG_UNCOVERED)
            far = improbable(found.chi2, found.n_surveys - 1, _CHANCE)
            flags |= far * np.int64(FLAG_DISAGREE)
            rejected = found.rejected.copy()
            rejected[stars.star[means.rejected]] = True
            flags |= rejected * np.int64(FLAG_REJECTED)
            if label == "rv":
                columns += self._variation(stars, means, found, flags)
            given = {one: at for at, one in enumerate(names) if self._gives(one, label)}
            columns += _label_columns(label, means, found, given, self._unit(label, given))
        n_obs = np.bincount(stars.star, minlength=n_stars).astype(np.int32)
        told = {"description": "Rows of all surveys", "ucd": "meta.number"}
        columns.append((pa.field("n_obs", pa.int32(), False, told), pa.array(n_obs)))
        text = "; ".join(f"{bit}: {meaning}" for bit, meaning in MEANINGS.items())
        about = {"ucd": "meta.code", "description": text}
        columns.append(
            (pa.field("flag_sos", pa.int32(), False, about), pa.array(flags, pa.int32()))
        )
        fields, arrays = zip(*stars.columns(), *columns, strict=True)
        return pa.table(list(arrays), schema=pa.schema(fields))

    def _variation(
        self, stars: _Stars, means: Means, found: Average, flags: IntArray
    ) -> list[tuple[pa.Field, Any]]:
        """Scatter of the radial velocities of a star; those that vary are flagged, in place."""
        value, error = stars.rows("rv:value"), stars.rows("rv:error")
        good = np.isfinite(value) & (error > 0) & (stars.rows("rv:grade") == GOOD)
        row, star, n_stars = np.flatnonzero(good), stars.star[good], len(stars.leaders)
        off = value[row] - means.value[star, stars.survey[row]]
        chi2 = np.asarray(np.bincount(star, (off / error[row]) ** 2, n_stars), np.float64)
        group = np.unique(star * len(self.names) + stars.survey[row])
        of_star = group // len(self.names)
        dof = np.bincount(star, minlength=n_stars) - np.bincount(of_star, minlength=n_stars)
        both = chi2 + np.nan_to_num(found.chi2)
        varies = improbable(both, dof + np.maximum(found.n_surveys - 1, 0), _CHANCE)
        flags |= varies * np.int64(FLAG_VARIABLE)
        n = np.bincount(star, minlength=n_stars)
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = np.bincount(star, value[row], n_stars) / n
            square = np.bincount(star, (value[row] - mean[star]) ** 2, n_stars)
            deviation = np.where(n > 1, np.sqrt(square / (n - 1)), np.nan)
        told = {"unit": "km/s", "description": "Standard deviation of all its radial velocities"}
        field = pa.field("rv_scatter", pa.float32(), metadata=told)
        return [(field, pa.array(deviation, from_pandas=True).cast(pa.float32()))]


class _Stars:
    """Members of stars, sorted by star, survey and key."""

    def __init__(self, table: pa.Table, leaders: IntArray, members: Members, names: list[str]):
        self.table, self.leaders, self.members = table, leaders, members
        self.star, self.survey = members.star, members.survey
        is_new = starts(self.star, self.survey)
        self.n_surveys = np.bincount(self.star[is_new], minlength=len(leaders))

    @classmethod
    def of(cls, table: pa.Table, primary: IntArray, names: list[str]) -> _Stars:
        table = with_survey(table.combine_chunks())
        leaders = leaders_of(table, primary)
        members = Members.of(table, primary, leaders, tuple(names))
        return cls(table, leaders, members, names)

    def rows(self, name: str) -> FloatArray:
        """Column of the members in their order; nan where unknown."""
        return floats_or_nan(self.table, name)[self.members.row]

    def columns(self) -> list[tuple[pa.Field, Any]]:
        """Columns of the stars beside labels: of the primary, or of the first who has them."""
        good = self.table["quality"].to_numpy()[self.members.row] == 0
        chosen = self.members.first_in(good)
        everyone = np.ones(len(self.members.row), dtype=np.bool_)
        given = Given({}, chosen, everyone, np.zeros(len(chosen), dtype=np.bool_))
        made = star_columns(self.table, list(_OF_STARS), self.leaders, self.members, given)
        return [one for one in made if one[0].name not in ("survey", "flag_spread")]


def _label_columns(
    label: str, means: Means, found: Average, given: Mapping[str, int], unit: str
) -> list[tuple[pa.Field, Any]]:
    """Columns of a label: mean, error, agreement, and what each survey says that gives it."""
    ucd = CANONICAL[label].ucd if label in CANONICAL else ""

    def column(name: str, values: FloatArray, text: str, ucd: str = "") -> tuple[pa.Field, Any]:
        about = {"unit": unit, "ucd": ucd, "description": text}
        field = pa.field(name, pa.float32(), metadata={x: one for x, one in about.items() if one})
        return field, pa.array(values, from_pandas=True).cast(pa.float32())

    error_ucd = f"stat.error;{ucd}" if ucd else "stat.error"
    columns = [
        column(label, found.value, f"{label}, mean of the surveys on one scale", ucd),
        column(f"{label}_err", found.error, f"Error of {label}", error_ucd),
    ]
    text = {"description": f"Chi-square of the surveys' {label}", "ucd": "stat.fit.chi2"}
    chi2 = np.where(found.n_surveys > 1, found.chi2, np.nan)
    field = pa.field(f"{label}_chi2", pa.float32(), metadata=text)
    columns.append((field, pa.array(chi2, from_pandas=True).cast(pa.float32())))
    text = {"description": f"Surveys whose {label} counts", "ucd": "meta.number"}
    number = pa.array(found.n_surveys.astype(np.int32))
    columns.append((pa.field(f"{label}_n", pa.int32(), False, text), number))
    for survey, at in given.items():
        told = f"{label} of {survey} on the common scale"
        columns.append(column(f"{label}_{_of(survey)}", means.value[:, at], told, ucd))
        told = "Error of that, alone"
        columns.append(column(f"{label}_err_{_of(survey)}", means.error[:, at], told, error_ucd))
    return columns


def _of(survey: str) -> str:
    """End of the names of a survey's own columns."""
    return survey.replace("-", "_")


def _matrix(sample: pa.Table, label: str, kind: str) -> FloatArray:
    """Values or errors of a label by star and survey, (n, s)."""
    names = [x for x in sample.schema.names if x.startswith(f"{label}:") and x.endswith(kind)]
    return np.stack([sample[name].to_numpy() for name in names], axis=1)


def _as_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Comparisons of the surveys as a table that a person can read."""
    fields = [("label", pa.string()), ("survey", pa.string()), ("other", pa.string())]
    fields += [("n", pa.int64()), ("offset", pa.float64()), ("scatter", pa.float64())]
    fields += [("width", pa.float64()), ("correlation", pa.float64()), ("hat", pa.float64())]
    fields += [("low", pa.float64()), ("high", pa.float64()), ("negative", pa.bool_())]
    return pa.Table.from_pylist(list(rows), pa.schema([*fields, ("floor", pa.float64())]))
