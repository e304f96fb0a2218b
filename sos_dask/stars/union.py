"""One row a star over several surveys.

The input is the stars of all surveys in one table and, for each row, the row number of the primary
of its physical star. Members of a star are taken in the order of precedence of their surveys, then
of ``star_id``; a member is *usable* when its ``quality`` is 0 and it has a label.

* ``_healpix_29``, ``star_id`` (``<survey>:<star_id>``), ``ra``, ``dec`` and ``position_epoch`` are
  those of the primary row. Gaia ids, the pair of proper motions and all that is not named below are
  those of the first member that has them.
* Labels, ``rv`` and the further ``labels`` are taken less the ``offsets`` of their survey.
* ``precedence``: the labels, their errors and ``snr`` come from one member: the first usable one
  that has all three labels and no ``flag_spread``; or else the first usable one; or else the first
  with any label. ``rv``, further labels and their errors are that member's, or else those of the
  first that has them. ``quality`` is that member's.
* ``weighted-mean``: labels are means over the usable members with weights 1 / error**2, ``rv`` and
  further ones over all with ``quality`` 0; members without a positive error are left out, but where
  no member has one the mean is plain and its error null. The rest, and stars without such a member,
  are as with ``precedence``.
* ``survey`` says who gave labels, joined by ``+``, null where nobody did; ``sources`` names every
  member, joined by ``;``; ``n_surveys`` counts the surveys.
* ``flag_spread``: a member that gave labels has it, or the usable members disagree: the sample
  standard deviation of a label exceeds ``max_spread`` times the rms of the stated errors (or
  ``expected_error``). For two members that is a difference of ``max_spread`` times its error.

Sums are in double precision over members in their order, so nothing depends on the order of rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, field_validator

from sos_dask.columns import BoolArray, FloatArray, IntArray, floats_or_nan, is_valid
from sos_dask.errors import PartitionError
from sos_dask.problem import ColumnName
from sos_dask.schema import CANONICAL, HEALPIX_COLUMN, LABELS, QUALITY, require_columns
from sos_dask.settings import Settings
from sos_dask.sky.neighbours import order_by, starts
from sos_dask.stars.combine import label_of_stars, sky_order
from sos_dask.stars.group import rank_of

_OF_PRIMARY = ("ra", "dec", "position_epoch")
_MOTION = ("pmra", "pmdec")


class UnionSettings(Settings):
    """How the stars of several surveys become one."""

    method: Literal["precedence", "weighted-mean"] = Field(
        "precedence", description="Labels of one survey, or the mean of all."
    )
    order: Annotated[tuple[str, ...], Field(strict=False)] = Field(
        (), description="Surveys, the preferred first; others follow by name."
    )
    offsets: Literal["measured"] | Mapping[str, Mapping[str, float]] = Field(
        "measured",
        description="By survey and label: subtracted from its values. Measured are the median "
        "differences from the first survey of the order, on common stars.",
    )
    max_spread: float = Field(
        5.0,
        ge=1e-9,
        le=1e9,
        description="Surveys that differ by more than this multiple of their error flag the star.",
    )
    expected_error: Mapping[str, float] = Field(
        {}, description="Error of a survey's label by label, used where none is stated."
    )
    labels: tuple[ColumnName, ...] = Field(
        (), description="Further columns that are united as rv is, with their errors *_err."
    )

    @field_validator("order")
    @classmethod
    def _once(cls, order: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(order)) != len(order):
            raise ValueError(f"a survey is twice in the order {', '.join(order)}")
        return order

    @property
    def measured(self) -> tuple[str, ...]:
        """Columns that are united as measurements."""
        return (*LABELS, "rv", *self.labels)

    @property
    def known_offsets(self) -> Mapping[str, Mapping[str, float]]:
        """Offsets by survey and label; none before they are measured."""
        return {} if isinstance(self.offsets, str) else self.offsets


def unite(table: pa.Table, primary: IntArray, settings: UnionSettings) -> pa.Table:
    """Unite the stars of several surveys by the rule of this module.

    Stars of all surveys have ``_healpix_29``, ``survey`` and ``star_id`` (strings), ``ra``,
    ``dec``, ``quality``, labels, any other canonical columns, and ``flag_spread`` where a survey
    has it; other columns are dropped. ``primary`` (n,) is the row number of each row's primary.

    The union has ``_healpix_29``, ``star_id``, the canonical columns of the input in their
    canonical order, further labels, ``survey``, ``sources``, ``n_surveys``, ``flag_spread``,
    ``quality``; sorted by (``_healpix_29``, ``star_id``).

    Raises `ConfigError`: a column is missing; `PartitionError`: ``primary`` names rows that are no
    primaries.
    """
    required = (HEALPIX_COLUMN, "survey", "star_id", "ra", "dec", "quality")
    require_columns(table.schema, required, "the stars to be united")
    if len(primary) != table.num_rows or not np.array_equal(primary[primary], primary):
        raise PartitionError("primaries do not belong to the stars to be united")
    table = with_survey(table.combine_chunks())
    leaders = leaders_of(table, primary)
    members = Members.of(table, primary, leaders, settings.order)
    united = _unite_labels(table, members, settings)
    names = list(dict.fromkeys([*CANONICAL, *with_errors(settings.labels)]))
    fields, columns = zip(*star_columns(table, names, leaders, members, united), strict=True)
    return pa.table(list(columns), schema=pa.schema(fields))


def with_survey(table: pa.Table) -> pa.Table:
    """Rows whose ``star_id`` begins with the name of their survey."""
    key = pc.binary_join_element_wise(table["survey"], table["star_id"], ":")
    return table.set_column(table.schema.get_field_index("star_id"), "star_id", key)


def leaders_of(table: pa.Table, primary: IntArray) -> IntArray:
    """Rows that are primaries, in the order of the stars."""
    leaders = np.flatnonzero(primary == np.arange(len(primary)))
    return leaders[sky_order(table, leaders, "star_id")]


class Members(NamedTuple):
    """Rows by star and, inside, by precedence of the survey and ``star_id``.

    ``first`` is the place of each star's first member.
    """

    row: IntArray
    star: IntArray
    first: IntArray
    survey: IntArray
    surveys: tuple[str, ...]

    @classmethod
    def of(
        cls, table: pa.Table, primary: IntArray, leaders: IntArray, order: tuple[str, ...]
    ) -> Members:
        """Members of stars, whose primaries are the leaders."""
        number = np.zeros(len(primary), dtype=np.int64)
        number[leaders] = np.arange(len(leaders))
        star = number[primary]
        present = sorted(pc.unique(table["survey"]).to_pylist())
        surveys = (*order, *(name for name in present if name not in order))
        survey = pc.index_in(table["survey"], pa.array(surveys, pa.string())).to_numpy()
        survey = survey.astype(np.int64)
        row = order_by((survey, star), lambda some: rank_of(table["star_id"].take(pa.array(some))))
        return cls(row, star[row], np.flatnonzero(starts(star[row])), survey[row], surveys)

    def any(self, mask: BoolArray) -> BoolArray:
        """Whether any member of each star is in the mask."""
        return np.bincount(self.star[mask], minlength=len(self.first)) > 0

    def first_in(self, mask: BoolArray, otherwise: IntArray | None = None) -> IntArray:
        """First member of each star in the mask; else another one, by default the first of all."""
        out = (self.first if otherwise is None else otherwise).copy()
        at = np.flatnonzero(mask)[::-1]  # written backwards, so that the first of a star stays
        out[self.star[at]] = at
        return out

    def joined(self, texts: pa.Array, places: IntArray, separator: str) -> pa.Array:
        """Texts of members at some places, joined by star; null where there is none."""
        first = np.searchsorted(self.star[places], np.arange(len(self.first) + 1))
        lists = pa.ListArray.from_arrays(pa.array(first, pa.int32()), texts)
        is_none = pa.array(first[1:] == first[:-1])
        return pc.if_else(is_none, None, pc.binary_join(lists, separator))


class Given(NamedTuple):
    """Labels and errors of the stars, the member that gives the rest, who contributes, flags."""

    values: dict[str, FloatArray]
    chosen: IntArray
    contributes: BoolArray
    flag: BoolArray


def _unite_labels(table: pa.Table, members: Members, settings: UnionSettings) -> Given:
    row, star = members.row, members.star
    flagged = np.zeros(len(row), dtype=np.bool_)
    if "flag_spread" in table.schema.names:
        flagged = pc.fill_null(table["flag_spread"], False).to_numpy()[row]
    measured: dict[str, tuple[FloatArray, FloatArray]] = {}
    for label in settings.measured:
        of_survey = [settings.known_offsets.get(name, {}) for name in members.surveys]
        shift = np.array([offset.get(label, 0.0) for offset in of_survey], dtype=np.float64)
        value = floats_or_nan(table, label)[row] - shift[members.survey]
        measured[label] = value, floats_or_nan(table, f"{label}_err")[row]
    has_label = [~np.isnan(measured[label][0]) for label in LABELS]
    some, every = np.any(has_label, axis=0), np.all(has_label, axis=0)
    good = table["quality"].to_numpy()[row] == 0
    usable = good & some
    chosen = members.first
    for preferred in (some, usable, usable & ~flagged & every):  # the best comes last
        chosen = members.first_in(preferred, chosen)
    united = members.any(usable) & (settings.method == "weighted-mean")
    contributes = np.zeros(len(row), dtype=np.bool_)
    contributes[chosen[members.any(some) & ~united]] = True
    flag = np.zeros(len(chosen), dtype=np.bool_)
    values: dict[str, FloatArray] = {}
    for label, (value, error) in measured.items():
        used = np.flatnonzero(usable if label in LABELS else good)
        first = np.searchsorted(star[used], np.arange(len(flag) + 1))
        limits = settings.expected_error.get(label, np.nan), settings.max_spread, 0.0
        mean, mean_error, _, is_wide = label_of_stars(first, used, value, error, limits)
        at, averaged, has = chosen, united, ~np.isnan(value)
        if label not in LABELS:
            at = members.first_in(has & ~has[chosen][star], chosen)
            averaged = ~np.isnan(mean) & (settings.method == "weighted-mean")
        else:
            weighs = usable & has & ((error > 0) | np.isnan(mean_error)[star])
            contributes |= weighs & united[star]
            flag |= is_wide
        values[label] = np.where(averaged, mean, value[at])
        values[f"{label}_err"] = np.where(averaged, mean_error, error[at])
    flag |= members.any(flagged & contributes)
    return Given(values, chosen, contributes, flag)


def with_errors(labels: Iterable[str]) -> list[str]:
    """List labels and the columns of their errors."""
    return [name for label in labels for name in (label, f"{label}_err")]


def star_columns(
    table: pa.Table, wanted: list[str], leaders: IntArray, members: Members, given: Given
) -> list[tuple[pa.Field, pa.Array | pa.ChunkedArray]]:
    """Every column of the stars: of the primary, or of the labels, or of who has it."""

    def told(name: str, dtype: pa.DataType, text: str, null: bool = False, **more: str) -> pa.Field:
        return pa.field(name, dtype, null, {"description": text, **more})

    names = set(table.schema.names)
    of_primary, of_chosen = pa.array(leaders), pa.array(members.row[given.chosen])
    key = told("star_id", pa.string(), "Survey and star_id of the primary", ucd="meta.id;meta.main")
    columns = [
        (table.schema.field(HEALPIX_COLUMN), table[HEALPIX_COLUMN].take(of_primary)),
        (key, table["star_id"].take(of_primary)),
    ]
    for name in (name for name in wanted if name in names):
        field = table.schema.field(name)
        if name in given.values:
            out = pa.array(given.values[name], from_pandas=True).cast(field.type, safe=False)
        elif name in _OF_PRIMARY:
            out = table[name].take(of_primary)
        elif name == "snr":
            out = table[name].take(of_chosen)
        else:
            both = name in _MOTION and names.issuperset(_MOTION)
            has = np.all([is_valid(table[n]) for n in (_MOTION if both else (name,))], axis=0)
            out = table[name].take(pa.array(members.row[members.first_in(has[members.row])]))
        columns.append((field, out))
    is_new = starts(members.star, members.survey)
    n_surveys = np.bincount(members.star[is_new], minlength=len(members.first)).astype(np.int32)
    gave = np.flatnonzero(given.contributes)
    gave = gave[starts(members.star[gave], members.survey[gave])]
    surveys = pa.array(members.surveys, pa.string()).take(pa.array(members.survey[gave]))
    sources = table["star_id"].take(pa.array(members.row)).combine_chunks()
    everyone = np.arange(len(members.row))
    fields = (
        told("survey", pa.string(), "Surveys that gave the labels", null=True),
        told("sources", pa.string(), "Every member: survey and star_id"),
        told("n_surveys", pa.int32(), "Surveys that observed the star", ucd="meta.number"),
        told("flag_spread", pa.bool_(), "Labels scatter over the limit"),
        QUALITY.arrow(nullable=False),
    )
    gave_labels = members.joined(surveys, gave, "+"), members.joined(sources, everyone, ";")
    rest = pa.array(n_surveys), pa.array(given.flag), table["quality"].take(of_chosen)
    return [*columns, *zip(fields, (*gave_labels, *rest), strict=True)]


def in_order(surveys: Iterable[str], order: Sequence[str]) -> list[str]:
    """List surveys in the given order, others after them by name."""
    surveys = sorted(surveys)
    return [name for name in order if name in surveys] + [s for s in surveys if s not in order]


def common_differences(table: pa.Table, primary: IntArray, settings: UnionSettings) -> pa.Table:
    """Differences from the first survey, of the stars that it has in common with another.

    Stars and primaries are those of `unite`; the first survey is that of the order in the settings.
    Gives ``survey`` and, for each measured column, that survey's value less the first one's
    (float64, nan where unknown); one row for each pair of rows with quality 0, in the order of
    ``table``.
    """
    chosen = np.flatnonzero(pc.fill_null(pc.equal(table["quality"], 0), False).to_numpy())
    rows = table.take(pa.array(chosen))
    star = np.asarray(primary)[chosen]
    surveys = rows["survey"].to_numpy(zero_copy_only=False)
    is_base = surveys == (settings.order[0] if settings.order else "")
    base, other = np.flatnonzero(is_base), np.flatnonzero(~is_base)
    base_of = np.full(len(primary), -1)
    base_of[star[base[::-1]]] = base[::-1]  # one row a star, the first
    other = other[base_of[star[other]] >= 0]
    columns = {"survey": rows["survey"].take(pa.array(other))}
    for label in settings.measured:
        values = floats_or_nan(rows, label)
        columns[label] = pa.array(values[other] - values[base_of[star[other]]])
    return pa.table(columns)
