"""The mock sky: its settings, the plates that observe it, and its stars with their true labels.

Everything is counted before the first star is made, so that every block of plates knows the rows of
its stars in the files. The distributions are plausible, not fitted: they serve to test a pipeline
on stars whose truth is known, not to model the Galaxy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field
from scipy.special import ndtri

from sos_dask.columns import BoolArray, FloatArray, IntArray, mixed
from sos_dask.settings import Settings
from sos_dask.sky.healpix import ang2pix, propagate, unit_vectors

Draws = Mapping[str, FloatArray]
Shape = Literal["step", "hooks", "saturation", "correlated", "wrong", "narrow", "hard"]
SHAPES = get_args(Shape)[:-1]

SPECIAL, LAMOST, APOGEE, GALAH, RAVE, RVS = range(6)
"""Kinds of plates: the special stars, and the plates or fields of each survey.

RAVE and the RVS of Gaia have no plates of their own: they see stars of the others.
"""

# Random numbers of a star, in the order in which they are drawn; alpha is of no use today.
UNIFORMS = (
    "radius", "angle", "component", "along", "population", "magnitude", "binary", "in_gaia",
    "gap1", "gap2", "lamost", "lamost_repeat", "apogee", "apogee_repeat", "galah", "galah_repeat",
)  # fmt: skip
NORMALS = (
    "feh", "teff", "logg", "mass", "pmra", "pmdec", "rv", "ebv", "parallax", "bp", "rp", "alpha",
)  # fmt: skip

# The same of the surveys without plates, drawn last: the others are as if these were not there.
FURTHER_UNIFORMS = ("rave", "rave_repeat", "rvs", "rvs_repeat")

# Share of each component in the plates of LAMOST, APOGEE, GALAH, with sparse ends on purpose; the
# special stars, the first kind, are like those of GALAH: all components, bright.
_COMPONENTS = ("dwarf", "subgiant", "rgb", "clump", "tip", "hot", "halo")
_SHARES = np.array(
    [
        [0.47, 0.17, 0.18, 0.13, 0.006, 0.036, 0.008],
        [0.24, 0.09, 0.37, 0.27, 0.012, 0.008, 0.010],
        [0.52, 0.19, 0.14, 0.12, 0.003, 0.022, 0.005],
    ]
)[[2, 0, 1, 2]]
_FAINT_G = np.array([12.5, 17.6, 14.9, 14.1])
_DEPTH_G = np.array([0.8, 1.6, 1.6, 0.9])
_PLATE_RADIUS = np.array([0.0, 2.5, 1.5, 1.0])  # deg
# Fewest and most stars of a plate.
_PLATE_STARS = {LAMOST: (24, 2048), GALAH: (16, 380), APOGEE: (16, 300)}
_REPEATS_OF_REFERENCES = {APOGEE: 0.11, GALAH: 0.005}
_REPEATS_OF_RAVE = 0.12
_APOGEE_IN_GALAH = 0.03  # of the APOGEE rows
# Where the references end: hottest, coolest dwarfs and their lowest log g, most metal-poor.
_ENDS, _NARROW_ENDS = (7900.0, 4100.0, 4.3, -2.7), (7500.0, 4600.0, 4.0, -2.4)
_HOT_LIMIT, _COOL_LIMIT, *_ = _ENDS
PLATE_STREAM, _CENTRE_STREAM, _CLUSTER_STREAM, _BINARY_STREAM = range(1, 5)
_CLUSTER_STARS = (25, 120)  # fewest and most; at most a third of the plate's
_CLUSTER_RADIUS = 0.3  # deg
_AMPLITUDE = (8.0, 0.9)  # of binaries: median, km/s, and scatter of its natural logarithm

# From ICRS to Galactic coordinates: Hipparcos and Tycho catalogues, ESA SP-1200, vol. 1, 1.5.3.
_TO_GALACTIC = np.array(
    [
        [-0.0548755604, -0.8734370902, -0.4838350155],
        [0.4941094279, -0.4448296300, 0.7469822445],
        [-0.8676661490, -0.1980763734, 0.4559837762],
    ]
)

_CORNER = float(np.degrees(np.arcsin(2.0 / 3.0)))
SPECIAL_STARS = np.array(
    [
        (0.0, 90.0, 0.0, 0.0), (37.0, 89.996, 0.0, 0.0), (217.0, 89.9935, 3.0, -4.0),
        (123.0, 89.9905, -12.0, 5.0),
        (0.0, -90.0, 0.0, 0.0), (301.0, -89.996, 0.0, 0.0), (80.0, -89.991, 6.0, 2.0),
        (0.0, 5.0, 0.0, 0.0), (0.00001, 7.5, 0.0, 0.0), (359.99999, 3.25, 0.0, 0.0),
        (359.99998, -5.0, 8.0, 0.0), (0.00002, 31.0, -8.0, 3.0), (359.99999, -41.0, 5.0, 5.0),
        (45.0, 0.0, 0.0, 0.0), (135.0, 0.0, 0.0, 0.0), (0.0, _CORNER, 0.0, 0.0),
        (90.0, -_CORNER, 0.0, 0.0), (180.0, 60.0, 0.0, 0.0), (270.0, -60.0, 0.0, 0.0),
        (67.5, np.degrees(np.arcsin(1.0 / 3.0)), 0.0, 0.0),
        (269.45, 4.74, -801.6, 10362.4), (0.00003, 2.0, 2600.0, 1900.0),
        (159.9, 8.1, 1500.0, -400.0), (202.3, -9.2, -950.0, 610.0), (301.7, 89.9955, 0.0, -2500.0),
        (77.0, -45.0, 6490.0, -5709.0),
    ]
)  # fmt: skip
"""Stars at difficult places, in every survey whatever its footprint: ra, dec (deg, ICRS, J2016),
pmra, pmdec (mas/yr), shape (26, 4).

No two of them come within 10 arcsec of each other between J2000 and J2016. They have a Gaia id in
every survey, are never outliers nor flagged, and their first observation has no error of position:
those without proper motion are in every survey exactly where the table places them. Rows 0-6 lie
within 0.01 deg of a pole, two of them on it; 7-12 at RA 0/360; 13-19 exactly on borders or corners
of HEALPix base pixels or of pixels of order 1; 20-25 move by more than 1 arcsec/yr, one across RA 0
and one past the pole.
"""


class SkySettings(Settings):
    """Size and nature of a mock sky. The same settings give the same bytes."""

    n_lamost: int = Field(200_000, ge=500, description="LAMOST rows, with repeats and duplicates.")
    seed: int = Field(1, ge=0, description="Seed of all random numbers.")
    n_apogee: int | None = Field(
        None, ge=200, description="APOGEE rows; by default 44 % of `reference_rows`."
    )
    n_galah: int | None = Field(
        None, ge=200, description="GALAH rows; by default 56 % of `reference_rows`."
    )
    n_rave: int = Field(0, ge=0, description="RAVE rows, about, of stars of the others.")
    n_rvs: int = Field(0, ge=0, description="The same of the radial velocities of Gaia DR3.")
    n_clusters: int = Field(
        0, ge=0, description="Star clusters, in different plates of LAMOST as far as there are."
    )
    binaries: float = Field(
        0.0, ge=0.0, le=0.5, description="Share of the stars whose radial velocity varies."
    )
    repeat_fraction: float = Field(
        0.45, ge=0.0, le=0.8, description="Share of the LAMOST rows that observe a star again."
    )
    outlier_fraction: float = Field(
        0.03, ge=0.0, le=0.5, description="Share of all observations whose labels are wrong."
    )
    bias: bool = Field(True, description="Systematic differences between surveys and truth.")
    uncovered: float = Field(
        0.02, ge=0.0, le=0.5, description="Share of the LAMOST stars that the references avoid."
    )
    sky: tuple[Shape, ...] = Field(
        (), description="What makes the sky harder; `shapes` describes each. hard: all of it."
    )

    @property
    def shapes(self) -> frozenset[str]:
        """All shapes of the sky; with any of them LAMOST has a pipeline drawn from the seed.

        - ``step``: a step in Teff, 8 K wide; ``hooks``: hooks at the edges of label space;
          ``saturation``: labels are compressed at both ends (`simulate.shapes.lamost_pipeline`);
        - ``correlated``: errors of the labels are correlated, and stated too small or too large by
          a factor that depends on the S/N;
        - ``wrong``: at least 5 % of the rows are wrong, and nothing tells so;
        - ``narrow``: references stop at 7500 K, have no dwarfs cooler than 4600 K and few
          metal-poor stars; what they share with LAMOST is bright and near.

        Any of them gives LAMOST another smooth bias and `simulate.shapes.rv_offset`.
        """
        return frozenset(SHAPES if "hard" in self.sky else self.sky)

    @property
    def wrong_fraction(self) -> float:
        """Share of all observations whose labels are wrong."""
        return max(self.outlier_fraction, 0.05 if "wrong" in self.shapes else 0.0)

    def rows(self) -> dict[int, int]:
        """Count the rows of each survey."""
        total = reference_rows(self.n_lamost)
        n_apogee = self.n_apogee or max(round(0.44 * total), 200)
        n_galah = self.n_galah or max(round(0.56 * total), 200)
        return {LAMOST: self.n_lamost, APOGEE: n_apogee, GALAH: n_galah}


def reference_rows(n_lamost: int) -> int:
    """Count the rows of both references by default: 100,000 (n / 200,000)^0.622, at most n / 2.

    That is 1.7 million for 19 million rows of LAMOST. 16 % of the LAMOST stars have a reference at
    200,000 rows and 3 % at 19 million (about 600,000 pairs of observations).
    """
    rows: float = min(1e5 * (n_lamost / 2e5) ** 0.622, n_lamost / 2.0)
    return round(rows)


def references_avoid(
    teff: ArrayLike, logg: ArrayLike, feh: ArrayLike, *, narrow: bool = False
) -> BoolArray:
    """Tell where the references have no star at all, by true labels.

    Hotter than 7900 K, dwarfs (log g > 4.3) cooler than 4100 K, and [Fe/H] < -2.7; on a narrow sky
    hotter than 7500 K, dwarfs (log g > 4.0) cooler than 4600 K, and [Fe/H] < -2.4.
    """
    t, g, m = np.asarray(teff), np.asarray(logg), np.asarray(feh)
    hot, cool, dwarf, poor = _NARROW_ENDS if narrow else _ENDS
    return np.asarray((t > hot) | ((t < cool) & (g > dwarf)) | (m < poor))


def to_galactic(
    ra: FloatArray, dec: FloatArray, matrix: FloatArray = _TO_GALACTIC
) -> tuple[FloatArray, FloatArray]:
    """Galactic longitude in [0, 360) and latitude, deg, of ICRS positions in deg."""
    x, y, z = (unit_vectors(ra, dec) @ matrix.T).T
    return np.degrees(np.arctan2(y, x)) % 360.0, np.degrees(np.arcsin(np.clip(z, -1.0, 1.0)))


def from_galactic(lon: FloatArray, lat: FloatArray) -> tuple[FloatArray, FloatArray]:
    """ICRS ra in [0, 360) and dec, deg, of Galactic positions in deg."""
    return to_galactic(lon, lat, _TO_GALACTIC.T)


# Plates


class Cluster(NamedTuple):
    """What the first ``n_stars`` of a plate share, of one distance in the middle of it."""

    number: int  # from 1
    n_stars: int
    feh: float
    rv: float  # km/s
    distance: float  # pc
    pmra: float  # mas/yr
    pmdec: float


@dataclass(frozen=True)
class Plates:
    """Plates of all kinds in the order in which they are made; arrays of shape (n_plates,)."""

    kind: IntArray
    number: IntArray  # within the kind
    ra: FloatArray  # deg
    dec: FloatArray
    n_stars: IntArray
    first_star: IntArray  # number of the first star
    counts: dict[int, IntArray]  # by survey, (n_rounds, n_plates): stars seen once more
    n_rows: dict[int, int]  # of each survey, exact duplicates at the end included
    clusters: dict[int, Cluster]  # by plate

    def first_rows(self, survey: int) -> IntArray:
        """First row of each plate in a survey's file, (n_rounds, n_plates): one round by one."""
        counts = self.counts[survey]
        return np.cumsum(counts.ravel()).reshape(counts.shape) - counts

    def blocks(self, n_stars: int) -> list[slice]:
        """Split into runs of plates with about so many stars, at least one plate each."""
        block = self.first_star // max(n_stars, 1)
        starts = np.flatnonzero(np.diff(block, prepend=-1)).tolist()
        return [slice(*ends) for ends in zip(starts, [*starts[1:], len(block)], strict=True)]


def generator(*key: int) -> np.random.Generator:
    """Random numbers of a seed, a stream and its part, whatever is drawn of others."""
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence(key)))


def make_plates(settings: SkySettings) -> Plates:
    """Place the plates and count the stars of each, and what each survey observes of them."""
    seed, n_rows = settings.seed, settings.rows()
    n_again = {LAMOST: round(settings.repeat_fraction * n_rows[LAMOST])}
    n_again |= {of: round(share * n_rows[of]) for of, share in _REPEATS_OF_REFERENCES.items()}
    n_left = {of: n_rows[of] - n_again[of] - len(SPECIAL_STARS) for of in n_rows}
    places = {LAMOST: _place(LAMOST, n_left[LAMOST], seed)}
    _, dec, n_stars = places[LAMOST]
    # APOGEE has fields in half of the LAMOST footprint; GALAH is south of dec +10.
    has_field = generator(seed, _CENTRE_STREAM, SPECIAL).random(len(dec)) < 0.5
    in_reach = {APOGEE: np.where(has_field, 1.0, 0.1), GALAH: dec + _PLATE_RADIUS[LAMOST] < 10.0}
    seen = {}  # stars of a survey in the plates of another
    for survey, share in ((APOGEE, 0.30), (GALAH, 0.12)):
        most = min(n_left[LAMOST] * 2 // 5, n_left[survey] * 4 // 5)
        wanted = min(round(share * n_rows[survey]), most)
        stars = seen[survey, LAMOST] = _shares(wanted, n_stars * in_reach[survey], 0.6 * n_stars)
        n_left[survey] -= int(stars.sum())
    places[GALAH] = _place(GALAH, n_left[GALAH], seed)
    n_stars = places[GALAH][2]
    seen[APOGEE, GALAH] = _shares(round(_APOGEE_IN_GALAH * n_rows[APOGEE]), n_stars, 0.6 * n_stars)
    n_left[APOGEE] -= int(seen[APOGEE, GALAH].sum())
    places[APOGEE] = _place(APOGEE, n_left[APOGEE], seed)

    # Kinds are interleaved, so that each file mixes stars of the overlap with others.
    ra, dec, n_stars = map(np.concatenate, zip(*places.values(), strict=True))
    n_plates = [len(place[0]) for place in places.values()]
    number = np.concatenate([np.arange(n) for n in n_plates])
    kind = np.repeat(list(places), n_plates)
    order = np.lexsort((kind, (number + 0.5) / np.repeat(n_plates, n_plates)))

    def in_order(special: float, values: NDArray[Any]) -> NDArray[Any]:
        return np.append(special, values[order])

    n_again[LAMOST] -= min(n_again[LAMOST], max(4, n_rows[LAMOST] // 100_000))  # duplicates
    counts = {}
    for survey in n_rows:
        seen[survey, survey] = places[survey][2]
        of_kinds = [seen.get((survey, of), 0 * places[of][2]) for of in places]
        first = in_order(len(SPECIAL_STARS), np.concatenate(of_kinds))
        counts[survey] = np.stack([first, *_repeats(first, n_again[survey])])
    n_stars = in_order(len(SPECIAL_STARS), n_stars)
    clusters = _clusters(settings, in_order(SPECIAL, kind) == LAMOST, n_stars)
    in_south = n_stars * (in_order(0.0, dec) < 5.0)
    for survey, n, weight in ((RAVE, settings.n_rave, in_south), (RVS, settings.n_rvs, n_stars)):
        if n:
            n_twice = round(_REPEATS_OF_RAVE * n) if survey == RAVE else 0
            first = _shares(n - n_twice, weight, 0.6 * n_stars)
            first[0] = len(SPECIAL_STARS)
            counts[survey] = np.stack([first, *_repeats(first, n_twice)])
            n_rows[survey] = int(counts[survey].sum())
    return Plates(
        in_order(SPECIAL, kind), in_order(0, number), in_order(0.0, ra), in_order(0.0, dec),
        n_stars, np.cumsum(n_stars) - n_stars, counts, n_rows, clusters,
    )  # fmt: skip


def _clusters(settings: SkySettings, of_lamost: BoolArray, n_stars: IntArray) -> dict[int, Cluster]:
    """Clusters by the plate that each has for itself."""
    rng = generator(settings.seed, _CLUSTER_STREAM)
    plates = rng.permutation(np.flatnonzero(of_lamost))[: settings.n_clusters]
    return {
        int(plate): Cluster(
            number,
            min(int(rng.integers(*_CLUSTER_STARS)), int(n_stars[plate]) // 3),
            feh=rng.uniform(-0.6, 0.3) if rng.random() < 0.85 else rng.uniform(-2.2, -0.6),
            rv=30.0 * rng.normal(),
            distance=float(np.exp(rng.uniform(*np.log([300.0, 2500.0])))),
            pmra=4.0 * rng.normal(),
            pmdec=4.0 * rng.normal(),
        )
        for number, plate in enumerate(plates, 1)
    }


def _place(kind: int, n_stars: int, seed: int) -> tuple[FloatArray, FloatArray, IntArray]:
    """Centres (deg) and stars of about 200 plates, or more where they would have too many.

    LAMOST: Galactic anticentre 45 %, uniform 32 %, equator 15 %, Kepler field 8 %, all between dec
    -7.5 and +65, so that no plate reaches -10. APOGEE: Galactic disc 45 %, the rest uniform, both
    hemispheres. GALAH: uniform, dec -80 to +9, more than 10 deg off the disc.
    """
    size = int(np.clip(n_stars // 200, *_PLATE_STARS[kind]))
    n = -(-max(n_stars, 1) // size)
    counts = np.full(n, size, dtype=np.int64)
    counts[-1] = n_stars - size * (n - 1)
    rng = generator(seed, _CENTRE_STREAM, kind)
    # A low-discrepancy sequence gives every part its share of even a few plates.
    part = (np.arange(n) * 0.6180339887498949 + 0.05) % 1.0
    ra, dec = np.empty(n), np.empty(n)
    todo = np.arange(n)
    while len(todo):
        u, v, (x, y) = rng.random(len(todo)), rng.random(len(todo)), rng.normal(size=(2, len(todo)))
        p = part[todo]
        new_ra, new_dec = 360.0 * u, np.degrees(np.arcsin(2.0 * v - 1.0))
        if kind == LAMOST:
            anti_ra, anti_dec = from_galactic(180.0 + 40.0 * x, np.clip(13.0 * y, -85.0, 85.0))
            places = [p < 0.45, p < 0.77, p < 0.92]
            new_ra = np.select(places, [anti_ra, new_ra, new_ra], 290.7 + 6.0 * x)
            new_dec = np.select(places, [anti_dec, new_dec, 15.0 * v - 7.5], 44.5 + 4.5 * y)
            good = (new_dec > -7.5) & (new_dec < 65.0)
        elif kind == APOGEE:
            disc_ra, disc_dec = from_galactic(360.0 * u, np.clip(7.0 * y, -85.0, 85.0))
            new_ra = np.where(p < 0.45, disc_ra, new_ra)
            new_dec = np.where(p < 0.45, disc_dec, new_dec)
            good = np.abs(new_dec) < 80.0
        else:
            good = (new_dec < 9.0) & (new_dec > -80.0)
            good &= np.abs(to_galactic(new_ra, new_dec)[1]) > 10.0
        ra[todo[good]], dec[todo[good]] = new_ra[good] % 360.0, new_dec[good]
        todo = todo[~good]
    return ra, dec, counts


def _shares(total: int, weight: NDArray[Any], most: NDArray[Any]) -> IntArray:
    """Whole numbers in proportion to weights, none above its limit by one or more.

    Their sum is the total, or what the limits leave of it.
    """
    part = np.zeros(len(weight))
    limit = np.where(weight > 0, most, 0.0)
    total = min(total, int(limit.sum()))
    free = above = limit > 0
    while above.any() and free.any():
        scale = max(total - part[~free].sum(), 0.0) / weight[free].sum()
        part[free] = weight[free] * scale
        above = free & (part > limit)
        part[above] = limit[above]
        free = free & ~above
    # The nudge keeps sums that should be whole from falling below by rounding.
    return np.diff(np.floor(np.cumsum(part) + 1e-6), prepend=0.0).astype(np.int64)


def _repeats(first: IntArray, n_again: int) -> list[IntArray]:
    """Further rounds by a geometric law: the share of stars with one visit more is the same."""
    counts = []
    share = n_again / max(n_again + int(first.sum()), 1)
    while n_again > 0:
        n = min(int(np.ceil(n_again * (1.0 - share))), n_again)
        counts.append(_shares(n, first, first))
        n_again -= n
    return counts


# Stars


@dataclass(frozen=True)
class Stars:
    """True properties of stars; arrays of shape (n,)."""

    number: IntArray
    kind: IntArray  # of the plate
    ra: FloatArray  # deg, ICRS at J2016
    dec: FloatArray
    pmra: FloatArray  # mas/yr
    pmdec: FloatArray
    teff: FloatArray  # K
    logg: FloatArray  # dex (cgs)
    feh: FloatArray
    rv: FloatArray  # km/s
    distance: FloatArray  # pc
    ebv: FloatArray  # mag
    g: FloatArray  # mag, reddened
    bp: FloatArray
    rp: FloatArray
    gaia: IntArray  # Gaia DR3 source id; 0 for the stars that are not in Gaia
    cluster: IntArray  # 0 for stars of none
    amplitude: FloatArray  # of the radial velocity, km/s; 0 for single stars

    def take(self, index: IntArray) -> Stars:
        """Rows by number, repeats allowed."""
        return Stars(*(values[index] for values in vars(self).values()))

    def at_epoch(
        self, epoch: float, error: FloatArray | float = 0.0
    ) -> tuple[FloatArray, FloatArray]:
        """Place (ra, dec, deg) at an epoch (Julian year), with errors (2, n) east and north."""
        motion = np.stack([self.pmra, self.pmdec]) * (epoch - 2016.0)
        east, north = motion / 1000.0 + error  # arcsec
        return propagate(self.ra, self.dec, east * 1000.0, north * 1000.0, 1.0)

    def gaia_distance(
        self, of_parallax: FloatArray, of_distance: FloatArray
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Parallax, its error (mas) by G, and a distance (pc) by the normal numbers of both."""
        error = 0.02 * 10.0 ** (0.2 * np.clip(self.g - 14.0, 0.0, 5.0))
        fraction = np.clip(error * self.distance / 1000.0, 0.005, 0.3)
        parallax = 1000.0 / self.distance + error * of_parallax
        return parallax, error, self.distance * np.exp(fraction * of_distance)


def make_stars(
    plates: Plates, plate: IntArray, u: Draws, normal: Draws, settings: SkySettings
) -> Stars:
    """Make stars from random numbers.

    ``plate`` is that of each star, with all stars of every plate that occurs; ``u`` and ``normal``
    have arrays of shape (n,) by the names in `UNIFORMS` and `NORMALS`.
    """
    number = plates.first_star[plate[0]] + np.arange(len(plate))
    kind, ra, dec = plates.kind[plate], plates.ra[plate], plates.dec[plate]
    special = kind == SPECIAL
    shared = _shared(plates, plate)
    cluster = shared["number"].astype(np.int64)
    member = cluster > 0
    of_cluster = np.where(member, shared["feh"], np.nan)
    teff, logg, feh, population = _labels(kind, u, normal, settings.uncovered, of_cluster)
    if "narrow" in settings.shapes:
        _narrow(kind, teff, logg, feh)
    giant = logg < 3.5
    mass = np.where(giant, 1.15, (teff / 5772.0) ** 1.5)
    mass *= np.exp(np.where(giant, 0.15, 0.05) * normal["mass"])
    # Luminosity from mass, Teff, log g; the Sun (IAU 2015, B3): 5772 K, 4.438, M_bol 4.74.
    d_teff = np.clip(teff, 3500.0, 9000.0) - 5772.0
    absolute = (
        4.74 - 2.5 * (np.log10(mass) + 4.0 * np.log10(teff / 5772.0) + 4.438 - logg)
        - (0.06 + 6.7e-5 * d_teff - 6.6e-8 * d_teff**2)
    )  # fmt: skip
    wanted = _FAINT_G[kind] + np.where(giant & (kind == LAMOST), -0.8, 0.0)
    wanted = np.maximum(wanted + _DEPTH_G[kind] * np.log(1.0 - u["magnitude"]), 8.3)

    angle = 2.0 * np.pi * u["angle"]
    radius = np.where(member, _CLUSTER_RADIUS, _PLATE_RADIUS[kind])
    reach = 3600.0 * radius * np.sqrt(u["radius"])
    east, north = reach * np.cos(angle), reach * np.sin(angle)
    ra, dec = propagate(ra, dec, east * 1000.0, north * 1000.0, 1.0)
    ra[special], dec[special] = SPECIAL_STARS[number[special], :2].T

    sin_b = np.abs(unit_vectors(ra, dec) @ _TO_GALACTIC[2]) + 0.02
    dust = np.exp(0.3 * normal["ebv"])
    distance = 10.0 ** (0.2 * (wanted - absolute + 5.0))
    ebv = _reddening(distance, sin_b, dust)
    distance = np.clip(10.0 ** (0.2 * (wanted - absolute - 2.7 * ebv + 5.0)), 8.0, 40000.0)
    distance = np.where(member, shared["distance"], distance)
    ebv = _reddening(distance, sin_b, dust)
    g = absolute + 5.0 * np.log10(distance) - 5.0 + 2.7 * ebv
    # Unresolved companions make a tenth of the dwarfs brighter.
    g -= np.where((u["binary"] < 0.1) & ~giant, 7.0 * u["binary"], 0.0)
    colour = 2.31 * 5040.0 / teff - 1.16 + 0.04 * feh + 1.3 * ebv

    to_pm = np.array([35.0, 65.0, 150.0])[population] * 1000.0 / (4.74 * distance)  # from km/s
    to_pm = np.where(member, 1000.0 / (4.74 * distance), to_pm)  # 1 km/s
    pmra = shared["pmra"] + to_pm * normal["pmra"]
    pmdec = shared["pmdec"] + to_pm * normal["pmdec"]
    pmra[special], pmdec[special] = SPECIAL_STARS[number[special], 2:].T
    # As in Gaia, the level-12 HEALPix cell is in the high bits; a bijection scrambles the rest.
    scrambled = (number * 25214903917 + 11) & ((1 << 35) - 1)
    gaia = (ang2pix(ra, dec, 12) << 35) | scrambled
    rv = np.where(member, 1.0, np.where(population == 2, 150.0, 32.0)) * normal["rv"]
    return Stars(
        number, kind, ra, dec, pmra, pmdec, teff, logg, feh,
        rv=shared["rv"] + rv, distance=distance, ebv=ebv,
        g=g, bp=g + 0.42 * colour, rp=g - 0.58 * colour,
        gaia=np.where((u["in_gaia"] < 0.015) & ~special, 0, gaia), cluster=cluster,
        amplitude=_amplitudes(number, settings) * ~special,
    )  # fmt: skip


def _shared(plates: Plates, plate: IntArray) -> dict[str, FloatArray]:
    """What members of clusters share, by the names of `Cluster`; 0 for other stars."""
    found = np.zeros((len(Cluster._fields), len(plate)))
    for one in {*plates.clusters} & {*plate.tolist()}:
        first, own = np.searchsorted(plate, one), plates.clusters[one]
        found[:, first : first + own.n_stars] = np.array(own)[:, None]
    return dict(zip(Cluster._fields, found, strict=True))


def _amplitudes(number: IntArray, settings: SkySettings) -> FloatArray:
    """Amplitudes of the velocities of binaries, by the number of the star alone."""
    state = number.astype(np.uint64) << np.uint64(8) | np.uint64(_BINARY_STREAM)
    draw = mixed(state ^ mixed(np.full(1, settings.seed, np.uint64))) / 2.0**64
    median, width = _AMPLITUDE
    if not settings.binaries:
        return np.zeros(len(number))
    chosen = draw < settings.binaries
    normal = ndtri(np.where(chosen, draw / settings.binaries, 0.5))
    return np.where(chosen, median * np.exp(width * np.clip(normal, -3.0, 3.0)), 0.0)


def _reddening(distance: FloatArray, sin_b: FloatArray, dust: FloatArray) -> FloatArray:
    """E(B-V) of an exponential dust disc: 0.45 mag/kpc in the plane, scale height 120 pc."""
    height = 120.0 / sin_b
    return np.asarray(0.45e-3 * dust * height * (1.0 - np.exp(-distance / height)))


def _labels(
    kind: IntArray, u: Draws, normal: Draws, uncovered: float, of_cluster: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray, IntArray]:
    """True Teff, log g, [Fe/H], and the population (0 thin, 1 thick disc, 2 halo).

    ``of_cluster``: [Fe/H] of members of clusters, nan for others.
    """
    extra = np.where(kind == LAMOST, uncovered, 0.0)
    cumulative = np.cumsum(_SHARES, axis=1)
    cumulative /= cumulative[:, -1:]
    edges = extra[:, None] + (1.0 - extra[:, None]) * cumulative[kind, :-1]
    component = (u["component"][:, None] > edges).sum(axis=1)
    # The stars that the references avoid: half of A type, 40 % cool dwarfs, 10 % metal-poor.
    avoided = u["component"] < extra
    rest = np.where(avoided, u["component"] / np.where(extra > 0, extra, 1.0), 0.0)
    a_type, poor = avoided & (rest <= 0.5), avoided & (rest > 0.9)
    cool = avoided & ~a_type & ~poor

    population = np.searchsorted([0.78, 0.965], u["population"])
    mean = np.array([-0.10, -0.50, -1.30])[population]
    feh = mean + np.array([0.17, 0.24, 0.45])[population] * normal["feh"]
    halo = (component == _COMPONENTS.index("halo")) & ~avoided
    feh[halo] = -1.55 - 0.45 * np.abs(normal["feh"][halo])
    feh = np.clip(feh, -2.65, 0.55)
    feh[poor] = -2.72 - 0.35 * np.abs(normal["feh"][poor])
    population[halo | poor] = 2
    feh = np.where(np.isnan(of_cluster), feh, of_cluster)

    teff, logg = np.empty_like(feh), np.empty_like(feh)
    for index, name in enumerate(_COMPONENTS):
        rows = np.flatnonzero((component == index) & ~(a_type | cool))
        drawn = u["along"][rows], feh[rows], normal["teff"][rows], normal["logg"][rows]
        teff[rows], logg[rows] = _component(name, *drawn)
    along = u["along"]
    teff[a_type] = _HOT_LIMIT + 10.0 + 2300.0 * along[a_type] ** 1.5
    logg[a_type] = 4.05 - 0.25 * np.abs(normal["logg"][a_type])
    teff[cool] = _COOL_LIMIT - 10.0 - 400.0 * along[cool]
    logg[cool] = 4.68 + 0.04 * normal["logg"][cool]
    below = np.where(a_type | cool, np.inf, _HOT_LIMIT)
    above = np.where(avoided | (logg < 3.5), 3450.0, 4110.0)
    return np.clip(teff, above, below), np.clip(logg, -0.3, 5.2), feh, population


def _narrow(kind: IntArray, teff: FloatArray, logg: FloatArray, feh: FloatArray) -> None:
    """Move the references' own stars from where those of a narrow sky end, within these ends."""
    hot, cool, dwarf, poor = _NARROW_ENDS
    own = kind != LAMOST
    rows = np.flatnonzero(own & (teff > 6670.0))
    teff[rows] = 6670.0 + (teff[rows] - 6670.0) * (hot - 6670.0) / (_HOT_LIMIT - 6670.0)
    rows = np.flatnonzero(own & (logg > dwarf) & (teff < 6670.0))
    teff[rows] = 6670.0 + (teff[rows] - 6670.0) * (6670.0 - cool) / (6670.0 - _COOL_LIMIT)
    feh[own] = np.maximum(feh[own], poor)


def _component(
    name: str, x: FloatArray, m: FloatArray, a: FloatArray, b: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Teff and log g along a component (0 <= x < 1) of [Fe/H] ``m``, with normal scatter."""
    if name == "dwarf":
        t = 4120.0 + 2550.0 * x**0.75
        return t, _main_sequence(t) - 0.07 * np.abs(b)
    if name == "hot":
        t = 6670.0 + 1230.0 * x**1.4
        return t, _main_sequence(t) + 0.08 - 0.25 * np.abs(b)
    if name == "subgiant":
        turn_off = np.minimum(6150.0 - 280.0 * m, 6750.0)
        t = turn_off + (5050.0 - 200.0 * m - turn_off) * x**1.6 + 60.0 * a
        return t, 4.15 - 0.6 * x + 0.05 * b
    if name == "clump":
        return 4820.0 - 260.0 * m + 70.0 * a, 2.42 + 0.07 * b
    g = 1.0 - 1.1 * x**1.3 if name == "tip" else 3.55 - 2.8 * x**1.7 + 0.03 * b
    return 4750.0 + 430.0 * (g - 2.5) - 330.0 * np.maximum(m, -2.2) + 60.0 * a, g


def _main_sequence(teff: FloatArray) -> FloatArray:
    x = (teff - 5000.0) / 1000.0
    return np.asarray(4.58 - 0.10 * x - 0.08 * np.minimum(x, 2.0) ** 2)
