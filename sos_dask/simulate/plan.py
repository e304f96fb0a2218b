"""Which plate observes how many stars, and where its rows stand in the files.

Everything is counted before the first star is made, so that headers can be written first, every
block of plates knows its rows, and the size of a block changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sos_dask.errors import ConfigError
from sos_dask.simulate.sky import (
    APOGEE,
    GALAH,
    LAMOST,
    N_SPECIAL,
    PLATE_RADIUS,
    SPECIAL,
    FloatArray,
    IntArray,
    plate_centres,
    special_stars,
)

_LEAST = 500
_REPEATS_OF_REFERENCES = {APOGEE: 0.11, GALAH: 0.005}
_APOGEE_IN_GALAH = 0.03  # of the APOGEE rows
_PLATE_STREAM, _CENTRE_STREAM = 1, 2


@dataclass(frozen=True)
class SkySettings:
    """Size and nature of a mock sky.

    Parameters
    ----------
    n_lamost : int
        Rows of LAMOST, repeats and duplicates included; at least 500.
    seed : int
        Not negative. The same settings give the same bytes.
    n_apogee, n_galah : int, optional
        Rows of the references, at least 200 each. By default 44 % and 56 % of
        ``reference_rows(n_lamost)``.
    repeat_fraction : float
        Share of the LAMOST rows that observe a star again, 0 to 0.8.
    outlier_fraction : float
        Share of the observations of every survey with wrong labels, 0 to 0.5.
    bias : bool
        False: no systematic difference between surveys and truth, in no label and not in rv.
    uncovered : float
        Share of the LAMOST stars in regions of parameter space that the references avoid, 0 to 0.5.
    overlap : float
        Share of the reference rows whose stars LAMOST has too (APOGEE 1.5, GALAH 0.6 times this),
        0 to 0.5, as far as LAMOST has enough stars there.
    """

    n_lamost: int = 200_000
    seed: int = 1
    n_apogee: int | None = None
    n_galah: int | None = None
    repeat_fraction: float = 0.45
    outlier_fraction: float = 0.03
    bias: bool = True
    uncovered: float = 0.02
    overlap: float = 0.20

    def __post_init__(self) -> None:
        for name, value, least in (
            ("n_lamost", self.n_lamost, _LEAST),
            ("n_apogee", self.n_apogee, 200),
            ("n_galah", self.n_galah, 200),
            ("seed", self.seed, 0),
        ):
            if value is not None and value < least:
                raise ConfigError(f"{name} = {value} of a mock sky is below {least}")
        for name, share, most in (
            ("repeat_fraction", self.repeat_fraction, 0.8),
            ("outlier_fraction", self.outlier_fraction, 0.5),
            ("uncovered", self.uncovered, 0.5),
            ("overlap", self.overlap, 0.5),
        ):
            if not 0.0 <= share <= most:
                raise ConfigError(f"{name} = {share} of a mock sky is outside 0..{most}")

    def rows(self) -> dict[int, int]:
        """Rows of each survey."""
        total = reference_rows(self.n_lamost)
        n_apogee = round(0.44 * total) if self.n_apogee is None else self.n_apogee
        n_galah = round(0.56 * total) if self.n_galah is None else self.n_galah
        return {LAMOST: self.n_lamost, APOGEE: max(n_apogee, 200), GALAH: max(n_galah, 200)}


def reference_rows(n_lamost: int) -> int:
    """Default rows of both references: 100,000 (n / 200,000)^0.622, at most n / 2.

    That is 1.7 million for 19 million rows of LAMOST. With the default overlap 16 % of the LAMOST
    stars have a reference at 200,000 rows and 3 % at 19 million (about 600,000 pairs of
    observations).
    """
    rows: float = min(1e5 * (n_lamost / 2e5) ** 0.622, n_lamost / 2.0)
    return round(rows)


@dataclass(frozen=True)
class Rounds:
    """First and repeated observations of a survey, by plate.

    Parameters
    ----------
    counts : ndarray of int64, shape (n_rounds, n_plates)
        Stars of each plate that are observed at least (round + 1) times.
    first_row : ndarray of int64, shape (n_rounds, n_plates)
        Their first row in the file: rounds follow each other, plates within a round.
    n_rows : int
        Rows of the file, with the exact duplicates at its end.
    """

    counts: IntArray
    first_row: IntArray
    n_rows: int

    @property
    def n_distinct(self) -> int:
        """Rows before the exact duplicates."""
        return int(self.counts.sum())


@dataclass(frozen=True)
class Plan:
    """Plates of all kinds in the order they are made; arrays of shape (n_plates,).

    Parameters
    ----------
    kind, ra, dec, n_stars, first_star : ndarray
        Kind of plate, its centre (deg), its stars and the number of the first one.
    number : ndarray of int64
        Number within its kind; with the kind it keys the random numbers.
    rounds : dict of int to Rounds
        By survey.
    """

    kind: IntArray
    number: IntArray
    ra: FloatArray
    dec: FloatArray
    n_stars: IntArray
    first_star: IntArray
    rounds: dict[int, Rounds]

    def blocks(self, n_stars: int) -> list[slice]:
        """Runs of plates with about so many stars, at least one plate each."""
        block = self.first_star // max(n_stars, 1)
        starts = np.flatnonzero(np.diff(block, prepend=-1))
        return [
            slice(int(a), int(b)) for a, b in zip(starts, [*starts[1:], len(block)], strict=True)
        ]


def plate_generator(seed: int, kind: int, number: int) -> np.random.Generator:
    """Random numbers of one plate, whatever is made before it."""
    key = np.random.SeedSequence([seed, _PLATE_STREAM, kind, number])
    return np.random.Generator(np.random.SFC64(key))


def make_plan(settings: SkySettings) -> Plan:
    """Count everything."""
    n_rows = settings.rows()
    n_again = {LAMOST: round(settings.repeat_fraction * n_rows[LAMOST])}
    for survey, share in _REPEATS_OF_REFERENCES.items():
        n_again[survey] = round(share * n_rows[survey])
    stars = {survey: n_rows[survey] - n_again[survey] for survey in n_rows}
    n_lamost = stars[LAMOST] - N_SPECIAL
    overlap = {
        survey: min(
            round(factor * settings.overlap * n_rows[survey]),
            n_lamost * 2 // 5,
            (stars[survey] - N_SPECIAL) * 4 // 5,
        )
        for survey, factor in ((APOGEE, 1.5), (GALAH, 0.6))
    }

    plates = {LAMOST: _plates(LAMOST, n_lamost, 24, 2048, settings.seed)}
    _, dec, n_stars = plates[LAMOST]
    # APOGEE has fields in half of the LAMOST footprint; GALAH is south of dec +10.
    has_field = _generator(settings.seed, SPECIAL).random(len(dec)) < 0.5
    n_of = {
        (APOGEE, LAMOST): _shares(
            overlap[APOGEE], n_stars * np.where(has_field, 1.0, 0.1), 0.6 * n_stars
        ),
        (GALAH, LAMOST): _shares(
            overlap[GALAH], n_stars * (dec + PLATE_RADIUS[LAMOST] < 10.0), 0.6 * n_stars
        ),
        (LAMOST, LAMOST): n_stars,
    }
    n_left = stars[GALAH] - N_SPECIAL - int(n_of[GALAH, LAMOST].sum())
    plates[GALAH] = _plates(GALAH, n_left, 16, 380, settings.seed)
    n_of[GALAH, GALAH] = plates[GALAH][2]
    shared = round(_APOGEE_IN_GALAH * n_rows[APOGEE])
    n_of[APOGEE, GALAH] = _shares(shared, n_of[GALAH, GALAH], 0.6 * n_of[GALAH, GALAH])
    n_left = stars[APOGEE] - N_SPECIAL
    n_left -= int(n_of[APOGEE, LAMOST].sum() + n_of[APOGEE, GALAH].sum())
    plates[APOGEE] = _plates(APOGEE, n_left, 16, 300, settings.seed)
    n_of[APOGEE, APOGEE] = plates[APOGEE][2]

    # Kinds are interleaved, so that each file mixes stars of the overlap with others.
    number = [np.arange(len(ra)) for ra, _, _ in plates.values()]
    kind = np.repeat(list(plates), [len(n) for n in number])
    order = np.lexsort((kind, np.concatenate([(n + 0.5) / len(n) for n in number])))

    def in_order(special: float, values: Sequence[NDArray[Any]]) -> NDArray[Any]:
        return np.concatenate([[special], np.concatenate(values)[order]])

    n_twins = min(n_again[LAMOST], max(4, n_rows[LAMOST] // 100_000))
    n_again[LAMOST] -= n_twins
    rounds = {}
    for survey in n_rows:
        nothing = {of: np.zeros(len(plates[of][0]), dtype=np.int64) for of in plates}
        counts = in_order(N_SPECIAL, [n_of.get((survey, of), nothing[of]) for of in plates])
        rounds[survey] = _rounds(counts, n_again[survey], n_rows[survey])
    n_stars = in_order(N_SPECIAL, [n for _, _, n in plates.values()])
    return Plan(
        kind=in_order(SPECIAL, [kind]),
        number=in_order(0, number),
        ra=in_order(0.0, [ra for ra, _, _ in plates.values()]),
        dec=in_order(0.0, [dec for _, dec, _ in plates.values()]),
        n_stars=n_stars,
        first_star=np.cumsum(n_stars) - n_stars,
        rounds=rounds,
    )


def _generator(seed: int, kind: int) -> np.random.Generator:
    return np.random.Generator(
        np.random.SFC64(np.random.SeedSequence([seed, _CENTRE_STREAM, kind]))
    )


def _plates(
    kind: int, n_stars: int, least: int, most: int, seed: int
) -> tuple[FloatArray, FloatArray, IntArray]:
    """Centres and numbers of stars of about 200 plates, or more if they would hold too many."""
    size = int(np.clip(n_stars // 200, least, most))
    n = -(-max(n_stars, 1) // size)
    counts = np.full(n, size, dtype=np.int64)
    counts[-1] = n_stars - size * (n - 1)
    return *plate_centres(kind, n, _generator(seed, kind)), counts


def _shares(total: int, weight: NDArray[Any], most: NDArray[Any]) -> IntArray:
    """Whole numbers in proportion to weights, none above its limit by one or more.

    Their sum is the total, or what the limits leave of it.
    """
    part = np.zeros(len(weight))
    limit = np.where(weight > 0, most, 0.0)
    total = min(total, int(limit.sum()))
    free = limit > 0
    while free.any():
        scale = max(total - part[~free].sum(), 0.0) / weight[free].sum()
        part[free] = weight[free] * scale
        above = free & (part > limit)
        if not above.any():
            break
        part[above] = limit[above]
        free &= ~above
    # The nudge keeps sums that should be whole from falling below by rounding.
    return np.diff(np.floor(np.cumsum(part) + 1e-6), prepend=0.0).astype(np.int64)


def _rounds(first: IntArray, n_again: int, n_rows: int) -> Rounds:
    """Repeats by a geometric law: the share of stars with one visit more is the same each time."""
    counts = [first]
    share = n_again / max(n_again + int(first.sum()), 1)
    while n_again > 0:
        n = min(int(np.ceil(n_again * (1.0 - share))), n_again)
        counts.append(_shares(n, first, first))
        n_again -= n
    table = np.stack(counts)
    rows = np.cumsum(table.ravel()).reshape(table.shape) - table
    return Rounds(table, rows, n_rows)


def special_centres() -> tuple[FloatArray, FloatArray]:
    """Places of the special stars, in the place of a plate's centre."""
    table = special_stars()
    return table[:, 0], table[:, 1]
