"""Repeats of one star: which rows are the same star (`group`), and one row for each (`combine`).

The rule of grouping. Two rows are *linked* when they lie within ``radius_arcsec`` of each other, or
share a Gaia id of some release and lie within ``id_radius_arcsec``. Stars never reach over the
connected components of these links, and depend on nothing outside of them. Inside:

1. A row is known by its id in the newest release in which it has one. Rows known by equal ids of
   the same release that are linked, in one or more steps, are one star; rows known by different ids
   of one release never are.
2. Rows known by an older release may be the same star as rows known by a newer one. Their groups
   join over their links: first links whose star has the same id of the older release, then by
   separation, then by the ranks of the two rows. A group joins one star, and only a star that has
   no id of the older release yet, or the same one.
3. A row without any id joins the star of the nearest row with an id within the radius (ties:
   smallest rank).
4. Of the rows that remain, the one of smallest rank is a primary and claims what is within the
   radius, then the next unclaimed one, and so on. Then every claimed row goes to its nearest
   primary within the radius (ties: smallest rank). So a chain of neighbours does not merge
   different stars: all members lie within the radius of their primary.

The primary of a star with ids is its row of smallest rank among those with ids. Equal ranks are
decided by the place in the input, which is the order on the sky. All of it is exact, and
independent of the order of the rows and of how the sky is cut, as long as whole components are
given.

The rule of combining is that of `combine`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from sos_dask import healpix
from sos_dask.errors import ConfigError, PartitionError
from sos_dask.healpix import FloatArray, IntArray
from sos_dask.schema import HEALPIX_COLUMN, LABELS, QUALITY, Column, require_columns

BoolArray = NDArray[np.bool_]

METHODS = ("inverse-variance", "best-snr", "median")
MAX_RADIUS_ARCSEC = 3600.0
# Rows with one id beyond which their pairs are searched on the sky: a placeholder taken for an id
# must not make all pairs of a million rows.
_MANY_ROWS = 64
# Standard error of the median of many normal values over that of the mean: the square root of one
# over its asymptotic efficiency 2 / pi (Kendall & Stuart, The Advanced Theory of Statistics).
_MEDIAN_ERROR = float(np.sqrt(np.pi / 2.0))


@dataclass(frozen=True)
class DedupeSettings:
    """How repeats are found and combined.

    Parameters
    ----------
    radius_arcsec : float
        Rows farther apart are never one star by position.
    id_radius_arcsec : float
        Rows with equal Gaia ids farther apart are not one star. At least ``radius_arcsec``.
    method : {"inverse-variance", "best-snr", "median"}
    max_spread : float
        A star whose observations scatter by more than this multiple of their error is flagged.
    use_gaia_id : bool
        False: only positions count.

    Raises
    ------
    ConfigError
        A value is not positive, a radius is a degree or more, or the method is unknown.
    """

    radius_arcsec: float = 1.5
    id_radius_arcsec: float = 10.0
    method: str = "inverse-variance"
    max_spread: float = 5.0
    use_gaia_id: bool = True

    def __post_init__(self) -> None:
        for name in ("radius_arcsec", "id_radius_arcsec"):
            value = getattr(self, name)
            if not 0 < value < MAX_RADIUS_ARCSEC:
                raise ConfigError(
                    f"{name} = {value} is outside 0..{MAX_RADIUS_ARCSEC:g} arcsec",
                    "Usual are 1 to 3 arcsec.",
                )
        if self.use_gaia_id and self.id_radius_arcsec < self.radius_arcsec:
            raise ConfigError(
                f"id_radius_arcsec = {self.id_radius_arcsec:g} is smaller than "
                f"radius_arcsec = {self.radius_arcsec:g}",
                "Rows with the same id may lie farther apart than others: make it larger.",
            )
        if self.method not in METHODS:
            raise ConfigError(f"method '{self.method}' is none of {', '.join(METHODS)}")
        if not self.max_spread > 0:
            raise ConfigError(f"max_spread = {self.max_spread} is not positive")


@dataclass(frozen=True)
class Groups:
    """Which star every row belongs to.

    Parameters
    ----------
    primary : ndarray of int64, shape (n,)
        Row number of the star's primary row.
    touches_frontier : ndarray of bool, shape (n,)
        The row's component holds a frontier row: rows not given may belong to it.
    """

    primary: IntArray
    touches_frontier: BoolArray


def group(
    ra: FloatArray,
    dec: FloatArray,
    cells29: IntArray,
    rank: IntArray,
    ids: Mapping[str, IntArray],
    frontier: BoolArray | None,
    settings: DedupeSettings,
) -> Groups:
    """Find the rows that are one star, by the rule of this module.

    Parameters
    ----------
    ra, dec : ndarray of float64, shape (n,), deg
    cells29 : ndarray of int64, shape (n,)
        Order-29 cells of the positions, ascending.
    rank : ndarray of int64, shape (n,)
        Preference for the primary, the smallest first; best unique.
    ids : mapping of str to ndarray of int64, shape (n,)
        Gaia ids by release (``"dr3"``, ``"dr2"``); the last in the order of names is the newest.
        Not positive where there is none.
    frontier : ndarray of bool, shape (n,), optional
        Rows so near to sky that was not read that they may have links into it.
    settings : DedupeSettings

    Returns
    -------
    Groups

    Raises
    ------
    PartitionError
        The rows are not sorted on the sky.
    """
    if np.any(cells29[1:] < cells29[:-1]):
        raise PartitionError(f"rows to be grouped are not sorted by {HEALPIX_COLUMN}")
    releases = [ids[name] for name in sorted(ids, reverse=True)] if settings.use_gaia_id else []
    links = _near_links(ra, dec, cells29, settings.radius_arcsec)
    far = [_far_links(ra, dec, cells29, release, links, settings) for release in releases]
    every = _Links.joined([links, *far])
    touched = np.zeros(len(ra), dtype=np.bool_)
    if frontier is not None:
        touched = _spread_over(frontier, every)
    primary = np.arange(len(ra), dtype=np.int64)
    if releases:
        known = _group_known(primary, rank, releases, every)
        links = _join_nearest_known(primary, rank, known, links)
    _group_by_rank(primary, rank, links)
    return Groups(primary, touched)


@dataclass(frozen=True)
class _Links:
    """Pairs of rows, i < j."""

    i: IntArray
    j: IntArray
    separation: FloatArray

    @classmethod
    def joined(cls, parts: list[_Links]) -> _Links:
        if len(parts) == 1:
            return parts[0]
        return cls(
            np.concatenate([np.empty(0, dtype=np.int64), *(part.i for part in parts)]),
            np.concatenate([np.empty(0, dtype=np.int64), *(part.j for part in parts)]),
            np.concatenate([np.empty(0), *(part.separation for part in parts)]),
        )

    def where(self, mask: BoolArray) -> _Links:
        return _Links(self.i[mask], self.j[mask], self.separation[mask])


def _near_links(ra: FloatArray, dec: FloatArray, cells: IntArray, radius: float) -> _Links:
    parts = []
    for i, j in healpix.candidates(cells, radius, cells, later_only=True):
        separation = healpix.separation_arcsec(ra[i], dec[i], ra[j], dec[j])
        parts.append(_Links(i, j, separation).where(separation <= radius))
    return _Links.joined(parts)


def _far_links(
    ra: FloatArray,
    dec: FloatArray,
    cells: IntArray,
    ids: IntArray,
    near: _Links,
    settings: DedupeSettings,
) -> _Links:
    """Rows with equal ids that lie beyond the radius, but within that for ids."""
    rows = np.flatnonzero(ids > 0)
    encoded = pa.array(ids[rows]).dictionary_encode()
    code = np.zeros(len(ids), dtype=np.int64)
    code[rows] = encoded.indices.to_numpy()
    count = np.bincount(code[rows], minlength=len(encoded.dictionary))
    # Where the pairs within the radius are all pairs of an id, nothing is left to find.
    same = (ids[near.i] == ids[near.j]) & (ids[near.i] > 0)
    found = np.bincount(code[near.i[same]], minlength=len(count))
    rows = rows[(found < count * (count - 1) // 2)[code[rows]]]
    many = count[code[rows]] > _MANY_ROWS
    parts = []
    crowd = rows[many]
    for p, q in healpix.candidates(
        cells[crowd], settings.id_radius_arcsec, cells[crowd], later_only=True
    ):
        equal = ids[crowd[p]] == ids[crowd[q]]
        parts.append((crowd[p[equal]], crowd[q[equal]]))
    rows = rows[~many]
    rows = rows[np.argsort(code[rows], kind="stable")]
    last = np.append(code[rows[1:]] != code[rows[:-1]], True)[: len(rows)]
    stop = np.flatnonzero(last) + 1
    after = np.repeat(stop, np.diff(stop, prepend=0)) - np.arange(1, len(rows) + 1)
    first = np.repeat(np.arange(len(rows)), after)
    second = first + 1 + np.arange(len(first)) - np.repeat(np.cumsum(after) - after, after)
    parts.append((rows[first], rows[second]))
    i = np.concatenate([one for one, _ in parts])
    j = np.concatenate([other for _, other in parts])
    separation = healpix.separation_arcsec(ra[i], dec[i], ra[j], dec[j])
    beyond = (separation > settings.radius_arcsec) & (separation <= settings.id_radius_arcsec)
    return _Links(i, j, separation).where(beyond)


def _spread_over(marked: BoolArray, links: _Links) -> BoolArray:
    """Mark every row of the components that hold a marked row."""
    marked = marked.copy()
    i, j = links.i, links.j
    while True:
        mixed = marked[i] != marked[j]
        if not mixed.any():
            return marked
        marked[i[mixed]] = True
        marked[j[mixed]] = True
        dark = ~marked[i] | ~marked[j]
        i, j = i[dark], j[dark]


def _group_known(
    primary: IntArray, rank: IntArray, releases: list[IntArray], links: _Links
) -> BoolArray:
    """Group the rows with ids (rules 1 and 2); gives which they are."""
    n = len(primary)
    tier = np.full(n, len(releases), dtype=np.int8)
    name = np.zeros(n, dtype=np.int64)
    for number in range(len(releases) - 1, -1, -1):
        has = releases[number] > 0
        tier[has] = number
        name[has] = releases[number][has]
    known = tier < len(releases)
    same = (tier[links.i] == tier[links.j]) & (name[links.i] == name[links.j]) & known[links.i]
    star = np.arange(n, dtype=np.int64)
    if same.any():
        edges = (links.i[same], links.j[same])
        graph = coo_array((np.ones(len(edges[0]), dtype=np.int8), edges), shape=(n, n))
        star = connected_components(graph, directed=False)[1].astype(np.int64)
    for number in range(1, len(releases)):
        forward = (tier[links.i] < number) & (tier[links.j] == number)
        backward = (tier[links.j] < number) & (tier[links.i] == number)
        newer = np.concatenate([links.i[forward], links.j[backward]])
        older = np.concatenate([links.j[forward], links.i[backward]])
        separation = np.concatenate([links.separation[forward], links.separation[backward]])
        if len(newer):
            holders = np.flatnonzero((tier < number) & (releases[number] > 0))
            _join_older(star, rank, releases[number], newer, older, separation, holders)
    rows = np.flatnonzero(known)
    best = np.full(n, np.iinfo(np.int64).max)
    np.minimum.at(best, star[rows], rank[rows])
    # Written backwards, so that of equal ranks the first row stays.
    first = rows[rank[rows] == best[star[rows]]][::-1]
    leader = np.zeros(n, dtype=np.int64)
    leader[star[first]] = first
    primary[rows] = leader[star[rows]]
    return known


def _join_older(
    star: IntArray,
    rank: IntArray,
    ids: IntArray,
    newer: IntArray,
    older: IntArray,
    separation: FloatArray,
    holders: IntArray,
) -> None:
    """Join groups known by an older release to stars known by a newer one (rule 2), in place.

    ``holders`` are the rows of newer releases that have an id of the older one, too. Of the links
    in order of preference, those that come first for both their star and their group are taken at
    once: no link that goes before them can concern either.
    """
    values, code = np.unique(
        np.concatenate([ids[older], ids[holders]]), return_inverse=True, sorted=True
    )
    code = code.astype(np.int64)
    held = star[holders] * len(values) + code[len(older) :]
    code = code[: len(older)]
    shares = np.isin(star[newer] * len(values) + code, held)
    free = ~np.isin(star[newer], star[holders])
    order = np.lexsort((older, newer, rank[older], rank[newer], separation, ~shares))
    order = order[(shares | free)[order]]
    host, guest, code, free = star[newer[order]], star[older[order]], code[order], free[order]
    joins = np.arange(len(star), dtype=np.int64)
    owner = np.full(len(star), -1, dtype=np.int64)
    first_host, first_guest = np.empty_like(star), np.empty_like(star)
    while len(host):
        place = np.arange(len(host))
        first_host[host[::-1]] = place[::-1]
        first_guest[guest[::-1]] = place[::-1]
        take = (first_host[host] == place) & (first_guest[guest] == place)
        joins[guest[take]] = host[take]
        owner[host[take & free]] = code[take & free]
        left = (joins[guest] == guest) & (~free | (owner[host] < 0) | (owner[host] == code))
        host, guest, code, free = host[left], guest[left], code[left], free[left]
    star[:] = joins[star]


def _join_nearest_known(
    primary: IntArray, rank: IntArray, known: BoolArray, links: _Links
) -> _Links:
    """Join rows without ids to stars with ids (rule 3); gives the links among the others."""
    forward, backward = known[links.i] & ~known[links.j], ~known[links.i] & known[links.j]
    target = np.concatenate([links.i[forward], links.j[backward]])
    row = np.concatenate([links.j[forward], links.i[backward]])
    separation = np.concatenate([links.separation[forward], links.separation[backward]])
    row, target = _nearest(row, target, separation, rank)
    primary[row] = primary[target]
    done = known.copy()
    done[row] = True
    return links.where(~done[links.i] & ~done[links.j])


def _group_by_rank(primary: IntArray, rank: IntArray, links: _Links) -> None:
    """Primaries in the order of rank and their nearest rows (rule 4), in place.

    In each round the rows that no undecided neighbour precedes are primaries; that is what taking
    one row after the other in the order of rank gives.
    """
    i_first = rank[links.i] <= rank[links.j]
    winner, loser = np.where(i_first, links.i, links.j), np.where(i_first, links.j, links.i)
    claimed = np.zeros(len(primary), dtype=np.bool_)
    one, other = winner, loser
    while len(one):
        beaten = np.zeros(len(primary), dtype=np.bool_)
        beaten[other] = True
        claimed[other[~beaten[one]]] = True
        undecided = ~claimed[one] & ~claimed[other]
        one, other = one[undecided], other[undecided]
    forward, backward = claimed[loser] & ~claimed[winner], claimed[winner] & ~claimed[loser]
    row = np.concatenate([loser[forward], winner[backward]])
    target = np.concatenate([winner[forward], loser[backward]])
    separation = np.concatenate([links.separation[forward], links.separation[backward]])
    row, target = _nearest(row, target, separation, rank)
    primary[row] = target


def _nearest(
    row: IntArray, target: IntArray, separation: FloatArray, rank: IntArray
) -> tuple[IntArray, IntArray]:
    """The nearest target of each row (ties: smallest rank, then first on the sky)."""
    choice = np.bincount(row)[row] > 1 if len(row) else np.zeros(0, dtype=np.bool_)
    some, at, apart = row[choice], target[choice], separation[choice]
    order = np.lexsort((at, rank[at], apart, some))
    some, at = some[order], at[order]
    first = np.append(True, some[1:] != some[:-1])[: len(some)]
    return np.concatenate([row[~choice], some[first]]), np.concatenate([target[~choice], at[first]])


def combine(
    table: pa.Table,
    primary: IntArray,
    settings: DedupeSettings,
    expected_error: Mapping[str, float],
) -> pa.Table:
    """One row for each star.

    * The *used* rows of a star are those with ``quality`` 0, or all where none has it; ``n_used``
      counts them. The star's ``quality`` is 0 in the first case; in the second the bits that all
      rows have, or all bits that any has where they have none in common.
    * ``teff``, ``logg``, ``feh`` and ``rv`` are combined over the used rows that have them.
      ``inverse-variance``: mean with weights 1 / error**2; rows without a positive error are left
      out, but where no row has one the mean is plain and its error null. ``median``: its error is
      sqrt(pi / 2) times the rms error over sqrt(n), without that factor for two rows, whose median
      is the mean. ``best-snr``: the values of the best row, which is the used row with the highest
      ``snr`` (ties: smallest ``obs_id``; null last).
    * ``snr`` is the root of the sum of squares, with ``best-snr`` that of the row.
    * ``ra``, ``dec``, ``position_epoch`` and ``_healpix_29`` are those of the primary row. Gaia ids
      and the pair of proper motions are those of the best row, or else of the first that has
      them, in the order of ``obs_id``. Every other column is that of the best row.
    * The spread of a label is the sample standard deviation over the used rows; ``flag_spread`` is
      set where, for any label, it is over ``max_spread`` times the expected error: the rms of the
      stated errors, or ``expected_error``. A label with neither is not flagged.

    Sums are in double precision over rows in the order of ``obs_id``, so they do not depend on the
    order of the input.

    Parameters
    ----------
    table : pyarrow.Table
        Observations: ``_healpix_29``, ``obs_id``, ``ra``, ``dec``, ``quality`` and any others.
    primary : ndarray of int64, shape (n,)
        Row number of each row's primary (`group`).
    settings : DedupeSettings
    expected_error : mapping of str to float
        Error of one observation by label, used where none is stated.

    Returns
    -------
    pyarrow.Table
        ``_healpix_29``, ``star_id``, ``n_obs``, ``n_used``, ``ra``, ``dec``, the other columns in
        their order, ``teff_spread``, ``logg_spread``, ``feh_spread``, ``flag_spread``, ``quality``;
        sorted by (``_healpix_29``, ``star_id``).

    Raises
    ------
    ConfigError
        A column is missing.
    PartitionError
        ``primary`` names rows that are no primaries.
    """
    required = (HEALPIX_COLUMN, "obs_id", "ra", "dec", "quality")
    require_columns(table.schema, required, "the observations to be combined")
    if len(primary) != table.num_rows or not np.array_equal(primary[primary], primary):
        raise PartitionError("primaries do not belong to the rows to be combined")
    table = table.combine_chunks()
    leaders = np.flatnonzero(primary == np.arange(len(primary)))
    leaders = leaders[_sky_order(table.take(leaders))]
    number = np.zeros(len(primary), dtype=np.int64)
    number[leaders] = np.arange(len(leaders))
    star = number[primary]
    n_obs = np.bincount(star, minlength=len(leaders))
    repeats = _Repeats.of(table, star, n_obs, settings)

    source = leaders.copy()
    source[repeats.star] = repeats.best
    columns: dict[str, pa.Array] = {}
    for name in table.schema.names:
        rows = source
        if name in (HEALPIX_COLUMN, "obs_id", "ra", "dec", "position_epoch"):
            rows = leaders
        elif name in ("pmra", "pmdec") and {"pmra", "pmdec"} <= set(table.schema.names):
            rows = repeats.source_of(table, source, ("pmra", "pmdec"))
        elif name.startswith("gaia_") and name.endswith("_source_id"):
            rows = repeats.source_of(table, source, (name,))
        columns[name] = table.column(name).take(pa.array(rows)).combine_chunks()

    flag = np.zeros(len(leaders), dtype=np.bool_)
    spreads: dict[str, FloatArray] = {}
    for label in (*LABELS, "rv"):
        if label not in columns:
            continue
        value, error, spread, expected = repeats.combined(
            table, label, settings.method, expected_error.get(label)
        )
        if settings.method != "best-snr":
            columns[label] = _replaced(columns[label], repeats.star, value)
            if f"{label}_err" in columns:
                columns[f"{label}_err"] = _replaced(columns[f"{label}_err"], repeats.star, error)
        if label in LABELS:
            spreads[label] = np.full(len(leaders), np.nan)
            spreads[label][repeats.star] = spread
            with np.errstate(invalid="ignore"):
                flag[repeats.star] |= spread > settings.max_spread * expected
    if "snr" in columns and settings.method != "best-snr":
        columns["snr"] = _replaced(columns["snr"], repeats.star, repeats.total_snr())
    columns["quality"] = _replaced(columns["quality"], repeats.star, repeats.quality())

    n_used = np.ones(len(leaders), dtype=np.int32)
    n_used[repeats.star] = repeats.n_used()
    return _star_table(table.schema, columns, n_obs, n_used, spreads, flag)


def _star_table(
    schema: pa.Schema,
    columns: dict[str, pa.Array],
    n_obs: IntArray,
    n_used: NDArray[np.int32],
    spreads: dict[str, FloatArray],
    flag: BoolArray,
) -> pa.Table:
    key = schema.field("obs_id")
    text = "Key of the star: that of its primary observation"
    out: list[tuple[pa.Field, pa.Array]] = [
        (schema.field(HEALPIX_COLUMN), columns.pop(HEALPIX_COLUMN)),
        (
            Column("star_id", "int64", "", "meta.id;meta.main", text)
            .arrow(nullable=False)
            .with_type(key.type),
            columns.pop("obs_id"),
        ),
        (_count_field("n_obs", "Observations of the star"), pa.array(n_obs.astype(np.int32))),
        (_count_field("n_used", "Observations that were combined"), pa.array(n_used)),
        (schema.field("ra"), columns.pop("ra")),
        (schema.field("dec"), columns.pop("dec")),
    ]
    quality = columns.pop("quality")
    out += [(schema.field(name), values) for name, values in columns.items()]
    for label in LABELS:
        unit = (
            dict(schema.field(label).metadata or {}).get(b"unit", b"") if label in columns else b""
        )
        column = Column(
            f"{label}_spread", "float32", unit.decode(), "", f"Standard deviation of {label}"
        )
        values = spreads.get(label, np.full(len(flag), np.nan))
        out.append((column.arrow(), _masked(values, pa.float32())))
    flag_field = pa.field(
        "flag_spread", pa.bool_(), False, {"description": "Spread over the limit"}
    )
    out += [(flag_field, pa.array(flag)), (QUALITY.arrow(nullable=False), quality)]
    return pa.table([values for _, values in out], schema=pa.schema([field for field, _ in out]))


def _count_field(name: str, description: str) -> pa.Field:
    return pa.field(name, pa.int32(), False, {"ucd": "meta.number", "description": description})


@dataclass(frozen=True)
class _Repeats:
    """Rows of the stars with several observations, by star and then by ``obs_id``.

    ``star`` and ``first`` have one entry a star, the others one a row; ``segment`` says which star.
    """

    star: IntArray
    first: IntArray
    row: IntArray
    segment: IntArray
    used: BoolArray
    quality_bits: IntArray
    snr: FloatArray
    best: IntArray

    @classmethod
    def of(
        cls, table: pa.Table, star: IntArray, n_obs: IntArray, settings: DedupeSettings
    ) -> _Repeats:
        row = np.flatnonzero(n_obs[star] > 1)
        key = table.column("obs_id").take(pa.array(row)).combine_chunks()
        if not pa.types.is_integer(key.type):
            key = pc.rank(key, tiebreaker="dense")
        row = row[np.lexsort((key.to_numpy(), star[row]))]
        is_first = np.append(True, star[row[1:]] != star[row[:-1]])[: len(row)]
        first = np.flatnonzero(is_first)
        segment = np.cumsum(is_first) - 1
        bits = table.column("quality").to_numpy()[row]
        used = bits == 0
        used |= (np.bincount(segment, used, minlength=len(first)) == 0)[segment]
        snr = np.full(len(row), np.nan)
        if "snr" in table.schema.names:
            snr = _floats(table, "snr")[row]
        # Unused rows rank below null, null below every value; the first row of the highest wins.
        score = np.where(used, np.where(np.isnan(snr), -np.inf, snr), np.nan)
        highest = np.fmax.reduceat(score, first) if len(row) else score
        at = np.flatnonzero(score == highest[segment])
        at = at[np.append(True, segment[at[1:]] != segment[at[:-1]])[: len(at)]]
        return cls(star[row[first]], first, row, segment, used, bits, snr, row[at])

    def _sum(self, values: FloatArray | BoolArray) -> FloatArray:
        total = np.bincount(self.segment, values, minlength=len(self.first))
        return np.asarray(total, dtype=np.float64)

    def n_used(self) -> IntArray:
        return self._sum(self.used).astype(np.int64)

    def quality(self) -> IntArray:
        if not len(self.row):
            return self.quality_bits
        # Bits without one in common must not look like a row that passes.
        common = np.bitwise_and.reduceat(self.quality_bits, self.first)
        any_bit = np.bitwise_or.reduceat(self.quality_bits, self.first)
        passed = self._sum(self.quality_bits == 0) > 0
        return np.asarray(np.where(passed, 0, np.where(common == 0, any_bit, common)), np.int64)

    def total_snr(self) -> FloatArray:
        has = self.used & ~np.isnan(self.snr)
        total = np.sqrt(self._sum(np.where(has, self.snr, 0.0) ** 2))
        return np.where(self._sum(has) > 0, total, np.nan)

    def source_of(self, table: pa.Table, source: IntArray, names: tuple[str, ...]) -> IntArray:
        """Row of each star that gives these columns: the best row, or the first that has them."""
        has = np.ones(table.num_rows, dtype=np.bool_)
        for name in names:
            has &= table.column(name).is_valid().to_numpy()
        lacking = ~has[self.best]
        at = np.flatnonzero(has[self.row] & lacking[self.segment])
        at = at[np.append(True, self.segment[at[1:]] != self.segment[at[:-1]])[: len(at)]]
        rows = source.copy()
        rows[self.star[self.segment[at]]] = self.row[at]
        return rows

    def combined(
        self, table: pa.Table, label: str, method: str, fallback: float | None
    ) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
        """Combined value, its error, spread and expected error of one observation; NaN: none."""
        value = _floats(table, label)[self.row]
        has = self.used & ~np.isnan(value)
        error = np.full(len(value), np.nan)
        if f"{label}_err" in table.schema.names:
            error = _floats(table, f"{label}_err")[self.row]
        stated = has & (error > 0)
        value, error = np.where(has, value, 0.0), np.where(stated, error, 1.0)
        n, n_stated = self._sum(has), self._sum(stated)
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = self._sum(value) / n
            deviation = np.where(has, value - mean[self.segment], 0.0)
            spread = np.where(n > 1, np.sqrt(self._sum(deviation**2) / (n - 1)), np.nan)
            rms = np.sqrt(self._sum(np.where(stated, error, 0.0) ** 2) / n_stated)
            if method == "median":
                value_out = self._median(value, has, mean)
                factor = np.where(n > 2, _MEDIAN_ERROR, 1.0)
                error_out = np.where(n_stated > 0, factor * rms / np.sqrt(n), np.nan)
            else:
                plain = n_stated == 0
                weight = np.where(plain[self.segment], has, stated / error**2)
                total = self._sum(weight)
                value_out = self._sum(weight * value) / total
                error_out = np.where(plain, np.nan, 1.0 / np.sqrt(total))
        expected = np.where(n_stated > 0, rms, np.nan if fallback is None else fallback)
        return value_out, error_out, spread, expected

    def _median(self, value: FloatArray, has: BoolArray, mean: FloatArray) -> FloatArray:
        out = mean.copy()
        rows = np.flatnonzero(has & (self._sum(has) > 2)[self.segment])
        rows = rows[np.lexsort((value[rows], self.segment[rows]))]
        star = self.segment[rows]
        first = np.flatnonzero(np.append(True, star[1:] != star[:-1])[: len(rows)])
        n = np.diff(np.append(first, len(rows)))
        low, high = value[rows[first + (n - 1) // 2]], value[rows[first + n // 2]]
        out[star[first]] = (low + high) / 2
        return out


def _floats(table: pa.Table, name: str) -> FloatArray:
    return np.asarray(table.column(name).to_numpy(), dtype=np.float64)


def _masked(values: NDArray[np.generic], dtype: pa.DataType) -> pa.Array:
    """Array with null for NaN."""
    mask = np.isnan(values) if values.dtype.kind == "f" else None
    return pa.array(values.astype(dtype.to_pandas_dtype()), dtype, mask=mask)


def _replaced(column: pa.Array, at: IntArray, values: NDArray[np.generic]) -> pa.Array:
    """A column with some values replaced."""
    out = column.to_numpy(zero_copy_only=False).copy()
    out[at] = values
    return _masked(out, column.type)


def _sky_order(table: pa.Table) -> IntArray:
    """Order of rows by (``_healpix_29``, ``obs_id``)."""
    cells = table.column(HEALPIX_COLUMN).to_numpy()
    order = np.argsort(cells, kind="stable")
    equal = np.append(False, cells[order[1:]] == cells[order[:-1]])[: len(order)]
    tied = equal | np.append(equal[1:], False)[: len(order)]
    if tied.any():
        keys = pc.rank(table.column("obs_id").take(pa.array(order[tied])), tiebreaker="dense")
        order[tied] = order[tied][np.lexsort((keys.to_numpy(), cells[order[tied]]))]
    return order
