"""The stars of a mock sky: labels, places and light.

Arrays in, arrays out; every random number is an argument. The distributions are plausible, not
fitted: they serve to test a pipeline on stars whose truth is known, not to model the Galaxy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sos_dask.sky.healpix import ang2pix
from sos_dask.sky.sphere import propagate, unit_vectors

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

SPECIAL, LAMOST, APOGEE, GALAH = 0, 1, 2, 3
"""Kinds of plates: the special stars, and the plates or fields of each survey."""

GAIA_EPOCH = 2016.0

UNIFORMS = (
    "radius", "angle", "component", "along", "population", "magnitude", "binary", "in_gaia",
    "gap1", "gap2", "lamost", "lamost_repeat", "apogee", "apogee_repeat", "galah", "galah_repeat",
)  # fmt: skip
"""Uniform random numbers of a star, in the order they are drawn."""
NORMALS = (
    "feh", "teff", "logg", "mass", "pmra", "pmdec", "rv", "ebv", "parallax", "bp", "rp", "alpha",
)  # fmt: skip
"""Standard normal random numbers of a star, in the order they are drawn."""

# From ICRS to Galactic coordinates: Hipparcos and Tycho catalogues, ESA SP-1200, vol. 1, 1.5.3.
_TO_GALACTIC = np.array(
    [
        [-0.0548755604, -0.8734370902, -0.4838350155],
        [0.4941094279, -0.4448296300, 0.7469822445],
        [-0.8676661490, -0.1980763734, 0.4559837762],
    ]
)

# Share of each component in the plates of LAMOST, APOGEE, GALAH, with sparse ends on purpose.
_COMPONENTS = ("dwarf", "subgiant", "rgb", "clump", "tip", "hot", "halo")
_SHARES = np.array(
    [
        [0.47, 0.17, 0.18, 0.13, 0.006, 0.036, 0.008],  # LAMOST
        [0.24, 0.09, 0.37, 0.27, 0.012, 0.008, 0.010],  # APOGEE
        [0.52, 0.19, 0.14, 0.12, 0.003, 0.022, 0.005],  # GALAH
    ]
)
_TO_KIND = np.array([2, 0, 1, 2])  # the special stars are like those of GALAH: all kinds, bright
_FAINT_G = np.array([12.5, 17.6, 14.9, 14.1])
_DEPTH_G = np.array([0.8, 1.6, 1.6, 0.9])
HOT_LIMIT, COOL_LIMIT, POOR_LIMIT = 7900.0, 4100.0, -2.7


@dataclass(frozen=True)
class Stars:
    """True properties of stars, all arrays of shape (n,).

    Parameters
    ----------
    number : int64
        Star number of the mock sky.
    kind : int64
        Kind of the plate.
    ra, dec : float64, deg
        ICRS at J2016.
    pmra, pmdec : float64, mas/yr
    teff, logg, feh, alpha : float64; K, dex, dex, dex
        True labels and [alpha/Fe].
    rv : float64, km/s
    distance : float64, pc
    ebv : float64, mag
    g, bp, rp : float64, mag
        Magnitudes in Gaia's bands, reddened.
    gaia : int64
        Gaia DR3 source id; 0 for the stars that are not in Gaia.
    """

    number: IntArray
    kind: IntArray
    ra: FloatArray
    dec: FloatArray
    pmra: FloatArray
    pmdec: FloatArray
    teff: FloatArray
    logg: FloatArray
    feh: FloatArray
    alpha: FloatArray
    rv: FloatArray
    distance: FloatArray
    ebv: FloatArray
    g: FloatArray
    bp: FloatArray
    rp: FloatArray
    gaia: IntArray

    def take(self, index: IntArray) -> Stars:
        """Rows by number, repeats allowed."""
        return Stars(**{item.name: getattr(self, item.name)[index] for item in fields(self)})


def references_avoid(teff: ArrayLike, logg: ArrayLike, feh: ArrayLike) -> BoolArray:
    """Where the references have no star at all, by true labels.

    Hotter than 7900 K, dwarfs (log g > 4.3) cooler than 4100 K, and [Fe/H] < -2.7.
    """
    t, g, m = np.asarray(teff), np.asarray(logg), np.asarray(feh)
    return np.asarray((t > HOT_LIMIT) | ((t < COOL_LIMIT) & (g > 4.3)) | (m < POOR_LIMIT))


def to_galactic(ra: FloatArray, dec: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Galactic longitude in [0, 360) and latitude, deg, of ICRS positions in deg."""
    x, y, z = (unit_vectors(ra, dec) @ _TO_GALACTIC.T).T
    return np.degrees(np.arctan2(y, x)) % 360.0, np.degrees(np.arcsin(np.clip(z, -1.0, 1.0)))


def from_galactic(lon: FloatArray, lat: FloatArray) -> tuple[FloatArray, FloatArray]:
    """ICRS ra in [0, 360) and dec, deg, of Galactic positions in deg."""
    x, y, z = (unit_vectors(lon, lat) @ _TO_GALACTIC).T
    return np.degrees(np.arctan2(y, x)) % 360.0, np.degrees(np.arcsin(np.clip(z, -1.0, 1.0)))


def shifted(
    ra: FloatArray, dec: FloatArray, east_arcsec: FloatArray, north_arcsec: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Positions moved by small angles, exact at the poles and across RA 0."""
    return propagate(ra, dec, east_arcsec * 1000.0, north_arcsec * 1000.0, 1.0)


def at_epoch(
    stars: Stars, epoch: float, east_arcsec: FloatArray, north_arcsec: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Positions of a survey: proper motion from J2016 to its epoch, and errors of position."""
    years = epoch - GAIA_EPOCH
    return shifted(
        stars.ra,
        stars.dec,
        stars.pmra * years / 1000.0 + east_arcsec,
        stars.pmdec * years / 1000.0 + north_arcsec,
    )


def plate_centres(kind: int, n: int, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    """Centres of the plates of a survey, deg.

    LAMOST: Galactic anticentre 45 %, uniform 32 %, equator 15 %, Kepler field 8 %, all between dec
    -7.5 and +65, so that no plate of 2.5 deg radius reaches -10. APOGEE: Galactic disc 45 %, the
    rest uniform, both hemispheres. GALAH: uniform, dec -80 to +9, more than 10 deg off the disc.

    Parameters
    ----------
    kind : int
        `LAMOST`, `APOGEE` or `GALAH`.
    """
    # A low-discrepancy sequence gives every part its share of even a few plates.
    part = (np.arange(n) * 0.6180339887498949 + 0.05) % 1.0
    ra, dec = np.empty(n), np.empty(n)
    todo = np.arange(n)
    while len(todo):
        u, v, (x, y) = rng.random(len(todo)), rng.random(len(todo)), rng.normal(size=(2, len(todo)))
        p = part[todo]
        any_ra, any_dec = 360.0 * u, np.degrees(np.arcsin(2.0 * v - 1.0))
        if kind == LAMOST:
            anti_ra, anti_dec = from_galactic(180.0 + 40.0 * x, np.clip(13.0 * y, -85.0, 85.0))
            places = [p < 0.45, p < 0.77, p < 0.92]
            some_ra = np.select(places, [anti_ra, any_ra, any_ra], 290.7 + 6.0 * x)
            some_dec = np.select(places, [anti_dec, any_dec, 15.0 * v - 7.5], 44.5 + 4.5 * y)
            good = (some_dec > -7.5) & (some_dec < 65.0)
        elif kind == APOGEE:
            disc_ra, disc_dec = from_galactic(360.0 * u, np.clip(7.0 * y, -85.0, 85.0))
            some_ra, some_dec = (
                np.where(p < 0.45, disc_ra, any_ra),
                np.where(p < 0.45, disc_dec, any_dec),
            )
            good = np.abs(some_dec) < 80.0
        else:
            some_ra, some_dec = any_ra, any_dec
            good = (some_dec < 9.0) & (some_dec > -80.0)
            good &= np.abs(to_galactic(some_ra, some_dec)[1]) > 10.0
        ra[todo[good]], dec[todo[good]] = some_ra[good] % 360.0, some_dec[good]
        todo = todo[~good]
    return ra, dec


PLATE_RADIUS = np.array([0.0, 2.5, 1.5, 1.0])  # deg, by kind

# ra, dec (deg, J2016), pmra, pmdec (mas/yr) of the special stars: see `special_stars`.
_CORNER = float(np.degrees(np.arcsin(2.0 / 3.0)))
_SPECIAL = np.array(
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
N_SPECIAL = len(_SPECIAL)


def special_stars() -> FloatArray:
    """Stars at the difficult places of the sky, in every survey whatever its footprint.

    No two of them come within 10 arcsec of each other between J2000 and J2016. They have a Gaia id
    in every survey, are never outliers nor flagged, and their first observation has no error of
    position: those without proper motion stand in every survey exactly where the table says.

    Returns
    -------
    ndarray of float64, shape (26, 4)
        ra, dec (deg, ICRS, J2016), pmra, pmdec (mas/yr). Rows 0-6 lie within 0.01 deg of a pole,
        two of them on it; 7-12 at RA 0/360; 13-19 exactly on borders or corners of HEALPix base
        pixels or of pixels of order 1; 20-25 move by more than 1 arcsec/yr, one across RA 0 and one
        past the pole.
    """
    return _SPECIAL.copy()


def make_stars(
    number: IntArray,
    kind: IntArray,
    centre: tuple[FloatArray, FloatArray],
    uniform: Mapping[str, FloatArray],
    normal: Mapping[str, FloatArray],
    uncovered: float,
) -> Stars:
    """Stars from random numbers.

    Parameters
    ----------
    number, kind : ndarray of int64, shape (n,)
        Star numbers; kinds of the plates they belong to.
    centre : pair of ndarray of float64, shape (n,), deg
        Centre of each star's plate; the place of a special star.
    uniform, normal : mapping of str to ndarray, shape (n,)
        Random numbers, named as in `UNIFORMS` and `NORMALS`.
    uncovered : float
        Share of the LAMOST stars in regions that the references avoid (see `references_avoid`).
    """
    special = kind == SPECIAL
    teff, logg, feh, thin = _labels(kind, uniform, normal, uncovered)
    giant = logg < 3.5
    mass = np.where(giant, 1.15, (teff / 5772.0) ** 1.5) * np.exp(
        np.where(giant, 0.15, 0.05) * normal["mass"]
    )
    # Luminosity from mass, Teff, log g; the Sun (IAU 2015, B3): 5772 K, 4.438, M_bol 4.74.
    d_teff = np.clip(teff, 3500.0, 9000.0) - 5772.0
    absolute = (
        4.74 - 2.5 * (np.log10(mass) + 4.0 * np.log10(teff / 5772.0) + 4.438 - logg)
        - (0.06 + 6.7e-5 * d_teff - 6.6e-8 * d_teff**2)
    )  # fmt: skip
    wanted = _FAINT_G[kind] + np.where(giant & (kind == LAMOST), -0.8, 0.0)
    wanted = np.maximum(wanted + _DEPTH_G[kind] * np.log(1.0 - uniform["magnitude"]), 8.3)

    angle = 2.0 * np.pi * uniform["angle"]
    reach = 3600.0 * PLATE_RADIUS[kind] * np.sqrt(uniform["radius"])
    ra, dec = shifted(centre[0], centre[1], reach * np.cos(angle), reach * np.sin(angle))
    ra, dec = np.where(special, centre[0], ra), np.where(special, centre[1], dec)

    sin_b = np.abs(unit_vectors(ra, dec) @ _TO_GALACTIC[2]) + 0.02
    dust = np.exp(0.3 * normal["ebv"])
    distance = 10.0 ** (0.2 * (wanted - absolute + 5.0))
    ebv = _reddening(distance, sin_b, dust)
    distance = np.clip(10.0 ** (0.2 * (wanted - absolute - 2.7 * ebv + 5.0)), 8.0, 40000.0)
    ebv = _reddening(distance, sin_b, dust)
    g = absolute + 5.0 * np.log10(distance) - 5.0 + 2.7 * ebv
    # Unresolved companions make a tenth of the dwarfs brighter.
    g -= np.where((uniform["binary"] < 0.1) & ~giant, 7.0 * uniform["binary"], 0.0)
    colour = 2.31 * 5040.0 / teff - 1.16 + 0.04 * feh + 1.3 * ebv

    speed = np.where(thin == 0, 35.0, np.where(thin == 1, 65.0, 150.0))
    to_pm = speed * 1000.0 / (4.74 * distance)  # mas/yr of km/s at pc
    pmra, pmdec = to_pm * normal["pmra"], to_pm * normal["pmdec"]
    if special.any():
        row = number[special]
        pmra[special], pmdec[special] = _SPECIAL[row, 2], _SPECIAL[row, 3]
    # As in Gaia, the level-12 HEALPix cell stands in the high bits; a bijection scrambles the rest.
    scrambled = (number * 25214903917 + 11) & ((1 << 35) - 1)
    gaia = (ang2pix(ra, dec, 12) << 35) | scrambled
    return Stars(
        number=number,
        kind=kind,
        ra=ra,
        dec=dec,
        pmra=pmra,
        pmdec=pmdec,
        teff=teff,
        logg=logg,
        feh=feh,
        alpha=np.clip(0.06 - 0.22 * np.clip(feh, -1.0, 0.2) + 0.04 * normal["alpha"], -0.2, 0.5),
        rv=np.where(thin == 2, 150.0, 32.0) * normal["rv"],
        distance=distance,
        ebv=ebv,
        g=g,
        bp=g + 0.42 * colour,
        rp=g - 0.58 * colour,
        gaia=np.where((uniform["in_gaia"] < 0.015) & ~special, 0, gaia),
    )


def _reddening(distance: FloatArray, sin_b: FloatArray, dust: FloatArray) -> FloatArray:
    """E(B-V) of an exponential dust disc: 0.45 mag/kpc in the plane, scale height 120 pc."""
    height = 120.0 / sin_b
    return np.asarray(0.45e-3 * dust * height * (1.0 - np.exp(-distance / height)))


def _labels(
    kind: IntArray,
    uniform: Mapping[str, FloatArray],
    normal: Mapping[str, FloatArray],
    uncovered: float,
) -> tuple[FloatArray, FloatArray, FloatArray, IntArray]:
    """True Teff, log g, [Fe/H], and the population (0 thin, 1 thick disc, 2 halo)."""
    u, v = uniform["component"], uniform["along"]
    extra = np.where(kind == LAMOST, uncovered, 0.0)
    cumulative = np.cumsum(_SHARES, axis=1)
    cumulative /= cumulative[:, -1:]
    edges = extra[:, None] + (1.0 - extra[:, None]) * cumulative[_TO_KIND[kind], :-1]
    component = (u[:, None] > edges).sum(axis=1)
    avoided = u < extra
    rest = np.where(avoided, u / np.where(extra > 0, extra, 1.0), 0.0)

    population = (uniform["population"] > 0.78).astype(np.int64) + (uniform["population"] > 0.965)
    mean = np.array([-0.10, -0.50, -1.30])[population]
    feh = mean + np.array([0.17, 0.24, 0.45])[population] * normal["feh"]
    halo = (component == _COMPONENTS.index("halo")) & ~avoided
    population[halo] = 2
    feh[halo] = -1.55 - 0.45 * np.abs(normal["feh"][halo])
    feh = np.clip(feh, -2.65, 0.55)
    first_poor = avoided & (rest > 0.9)
    population[first_poor] = 2
    feh[first_poor] = -2.72 - 0.35 * np.abs(normal["feh"][first_poor])

    def giant_branch(g: FloatArray, m: FloatArray) -> FloatArray:
        return 4750.0 + 430.0 * (g - 2.5) - 330.0 * np.maximum(m, -2.2)

    teff, logg = np.empty_like(u), np.empty_like(u)
    for index, name in enumerate(_COMPONENTS):
        rows = np.flatnonzero((component == index) & ~(avoided & ~first_poor))
        x, m, a, b = v[rows], feh[rows], normal["teff"][rows], normal["logg"][rows]
        if name == "dwarf":
            t = 4120.0 + 2550.0 * x**0.75
            g = _main_sequence(t) - 0.07 * np.abs(b)
        elif name == "subgiant":
            turn_off = np.minimum(6150.0 - 280.0 * m, 6750.0)
            t = turn_off + (5050.0 - 200.0 * m - turn_off) * x**1.6 + 60.0 * a
            g = 4.15 - 0.6 * x + 0.05 * b
        elif name in ("rgb", "halo", "tip"):
            g = 1.0 - 1.1 * x**1.3 if name == "tip" else 3.55 - 2.8 * x**1.7 + 0.03 * b
            t = giant_branch(g, m) + 60.0 * a
        elif name == "clump":
            t = 4820.0 - 260.0 * m + 70.0 * a
            g = 2.42 + 0.07 * b
        else:
            t = 6670.0 + 1230.0 * x**1.4
            g = _main_sequence(t) + 0.08 - 0.25 * np.abs(b)
        teff[rows], logg[rows] = t, g
    a_type = np.flatnonzero(avoided & (rest <= 0.5))
    teff[a_type] = HOT_LIMIT + 10.0 + 2300.0 * v[a_type] ** 1.5
    logg[a_type] = 4.05 - 0.25 * np.abs(normal["logg"][a_type])
    cool = np.flatnonzero(avoided & (rest > 0.5) & ~first_poor)
    teff[cool] = COOL_LIMIT - 10.0 - 400.0 * v[cool]
    logg[cool] = 4.68 + 0.04 * normal["logg"][cool]
    keep_below = np.where(avoided & ~first_poor, np.inf, HOT_LIMIT)
    keep_above = np.where(avoided | (logg < 3.5), 3450.0, 4110.0)
    teff = np.clip(teff, keep_above, keep_below)
    return teff, np.clip(logg, -0.3, 5.2), feh, population


def _main_sequence(teff: FloatArray) -> FloatArray:
    x = (teff - 5000.0) / 1000.0
    return np.asarray(4.58 - 0.10 * x - 0.08 * np.minimum(x, 2.0) ** 2)


def visible_distance(stars: Stars, normal: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Parallax error (mas) by G, and a distance (pc) with the error that follows from it."""
    error = 0.02 * 10.0 ** (0.2 * np.clip(stars.g - 14.0, 0.0, 5.0))
    fraction = np.clip(error * stars.distance / 1000.0, 0.005, 0.3)
    return error, stars.distance * np.exp(fraction * normal)
