"""Measurements of the stars, and the surveys' own tables: columns, sentinels and flags.

Names, types and units follow LAMOST DR11 LRS (A, F, G, K stars), APOGEE DR17 allStar and GALAH DR4
allstar; of the many abundance columns of the last two only some are there. RAVE DR6 and the RVS of
Gaia DR3 are answers of the queries in the notes of their definitions. Columns that no built-in
survey definition reads are there and zero, so that the files are as wide as real ones.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, reduce
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sos_dask.columns import BoolArray, FloatArray, IntArray, mixed
from sos_dask.schema import LABELS
from sos_dask.simulate import shapes, sky
from sos_dask.simulate.sky import APOGEE, GALAH, LAMOST, RAVE, RVS, Draws, SkySettings, Stars

Records = NDArray[Any]
Names = NDArray[np.str_]

# Random numbers of an observation, in the order in which they are drawn.
UNIFORMS = (
    "outlier", "wrong_teff", "wrong_logg", "wrong_feh", "flag", "flag2", "gap", "gap2", "id_gap",
    "bit",
)  # fmt: skip
NORMALS = (
    "snr", "teff", "logg", "feh", "rv", "east", "north", "x", "y", "parallax", "distance",
)  # fmt: skip


# Biases and errors


def _step(x: FloatArray, middle: float, width: float) -> FloatArray:
    """Smooth step from 0 to 1, upwards for a positive width (logistic function)."""
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip((x - middle) / width, -60.0, 60.0))))


def lamost_bias(teff: ArrayLike, logg: ArrayLike, feh: ArrayLike) -> FloatArray:
    """Injected difference LAMOST - truth.

    Smooth and nonlinear in all labels, with log g x [Fe/H] terms, and strong at the sparse ends
    (log g < 1, Teff > 7000 K, [Fe/H] < -2, [Fe/H] > 0.2), each entered by a logistic step. To be
    added to teff, logg, feh, shape (n, 3); K, dex, dex: typically 40 K, 0.07 and 0.06 dex, at most
    200 K, 0.35 and 0.5 dex on the stars of `sky.make_stars`.
    """
    t = (np.asarray(teff, dtype=np.float64) - 5200.0) / 1000.0
    g = np.asarray(logg, dtype=np.float64)
    m = np.clip(np.asarray(feh, dtype=np.float64), -3.5, 0.8)
    giant = _step(g, 3.3, -0.35)
    low, hot = _step(g, 1.0, -0.25), _step(t, 1.8, 0.2)
    poor, rich = _step(m, -2.0, -0.25), _step(m, 0.2, 0.09)
    d_teff = (
        -35.0 + 55.0 * np.tanh(1.2 * t) - 20.0 * np.sin(2.0 * g) + 30.0 * giant * (m + 0.3)
        - 70.0 * low + 130.0 * hot + 60.0 * poor - 40.0 * rich
    )  # fmt: skip
    d_logg = (
        0.06 + 0.09 * np.sin(1.7 * (g - 0.8)) + 0.12 * giant * np.tanh(1.5 * (m + 0.4))
        - 0.06 * (1.0 - giant) * np.tanh(t)
        + 0.20 * low - 0.18 * hot + 0.18 * poor - 0.08 * rich
    )  # fmt: skip
    d_feh = (
        0.05 - 0.08 * np.tanh(1.2 * t) + 0.13 * np.tanh(0.9 * (g - 3.0)) * np.tanh(1.2 * (m + 0.2))
        + 0.04 * np.cos(1.5 * g) + 0.10 * low - 0.12 * hot + 0.14 * poor - 0.12 * rich
    )  # fmt: skip
    return np.stack([d_teff, d_logg, d_feh], axis=-1)


def galah_bias(teff: ArrayLike, logg: ArrayLike, feh: ArrayLike) -> FloatArray:
    """Injected difference GALAH - truth, as `lamost_bias`; APOGEE has none.

    Teff +30 K - 10 K per 1000 K above 5000 K; log g -0.03; [Fe/H] +0.04.
    """
    t = (np.asarray(teff, dtype=np.float64) - 5000.0) / 1000.0
    return np.stack([30.0 - 10.0 * t, np.full_like(t, -0.03), np.full_like(t, 0.04)], axis=-1)


def stated_error_factor(logg: ArrayLike, snr: ArrayLike) -> FloatArray:
    """Stated error / true error of every survey: 0.5 to 2, by type and signal to noise.

    Dwarfs (log g >= 3.5): 0.6 at low to 1.9 at high S/N; giants: 1.6 at low to 0.55 at high S/N.
    """
    s = np.asarray(snr, dtype=np.float64)
    share = s / (s + 50.0)
    return np.asarray(np.where(np.asarray(logg) < 3.5, 1.6 - 1.1 * share, 0.6 + 1.4 * share))


def difficulty(teff: FloatArray, logg: FloatArray, feh: FloatArray) -> FloatArray:
    """Factor of the true label errors: 1 for most stars, up to 3 for hot, metal-poor, tip stars."""
    return np.asarray(
        1.0 + 0.8 * _step(teff, 7000.0, 200.0) + 0.8 * _step(feh, -1.8, -0.2)
        + 0.4 * _step(logg, 1.0, -0.2)
    )  # fmt: skip


@dataclass(frozen=True)
class Survey:
    """Parameters of the measurements of a survey.

    The true error of the labels is `noise` times `difficulty`, the stated one that times
    `stated_error_factor`. Outliers are off by at least 400 K, 0.6 dex and 0.4 dex, to either side,
    in all three labels.
    """

    name: str
    epoch: float  # of ra and dec, Julian year
    position_error: float  # arcsec
    no_gaia: float  # share of the rows without a Gaia id, besides stars that are not in Gaia
    floor: tuple[float, float, float]  # of the label errors; K, dex, dex
    slope: tuple[float, float, float]  # the same times S/N
    rv_offset: float  # km/s
    rv_error: tuple[float, float]  # floor, and slope times S/N
    snr: tuple[float, float, float, float]  # log10 at a magnitude, slope, magnitude, scatter
    snr_range: tuple[float, float]
    snr_of_special: float = 0.0  # at least
    bias: Callable[[ArrayLike, ArrayLike, ArrayLike], FloatArray] | None = None

    def noise(self, snr: FloatArray) -> FloatArray:
        """Error of the labels of easy stars, shape (n, 3)."""
        return np.asarray(np.hypot(np.array(self.floor), np.array(self.slope) / snr[:, None]))


SURVEYS = {
    LAMOST: Survey(
        "lamost", epoch=2000.0, position_error=0.12, no_gaia=0.02, floor=(25.0, 0.04, 0.025),
        slope=(2500.0, 4.0, 2.2), rv_offset=-4.9, rv_error=(2.0, 80.0),
        snr=(1.95, 0.21, 14.0, 0.13), snr_range=(4.0, 900.0), bias=lamost_bias,
    ),
    APOGEE: Survey(
        "apogee", epoch=2000.0, position_error=0.07, no_gaia=0.01, floor=(15.0, 0.03, 0.012),
        slope=(1200.0, 2.5, 1.2), rv_offset=0.0, rv_error=(0.05, 4.0),
        snr=(2.45, 0.17, 10.0, 0.15), snr_range=(12.0, 1500.0), snr_of_special=150.0,
    ),
    GALAH: Survey(
        "galah", epoch=2016.0, position_error=0.0003, no_gaia=0.005, floor=(25.0, 0.04, 0.03),
        slope=(1500.0, 2.5, 2.0), rv_offset=0.2, rv_error=(0.1, 10.0),
        snr=(1.75, 0.18, 13.0, 0.13), snr_range=(4.0, 600.0), snr_of_special=60.0,
        bias=galah_bias,
    ),
}  # fmt: skip
# Surveys that a sky has only where its settings ask for them.
ALL_SURVEYS = SURVEYS | {
    RAVE: Survey(
        "rave", epoch=2000.0, position_error=0.2, no_gaia=0.02, floor=(60.0, 0.12, 0.08),
        slope=(1500.0, 4.0, 2.5), rv_offset=0.3, rv_error=(0.6, 40.0),
        snr=(1.65, 0.2, 12.0, 0.13), snr_range=(5.0, 200.0), snr_of_special=60.0, bias=galah_bias,
    ),
    RVS: Survey(
        "rvs", epoch=2016.0, position_error=0.0003, no_gaia=0.0, floor=(50.0, 0.1, 0.06),
        slope=(2500.0, 5.0, 3.0), rv_offset=-0.15, rv_error=(0.15, 60.0),
        snr=(1.7, 0.25, 12.0, 0.1), snr_range=(3.0, 500.0), snr_of_special=60.0,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Visits:
    """Observations of one block of stars by one survey; arrays of shape (n,) or (n, 3)."""

    survey: Survey
    settings: SkySettings
    stars: Stars
    star: IntArray  # within the block: observations of one star share it
    round: IntArray  # 0 for the first observation of a star, 1 for the second, ...
    row: IntArray  # in the file
    n_first: int  # first observations, which are at the beginning of the file
    field_ra: FloatArray  # deg, centre of the plate
    field_dec: FloatArray
    uniform: Draws
    normal: Draws

    @property
    def special(self) -> BoolArray:
        """Observations of special stars."""
        return np.asarray(self.stars.kind == sky.SPECIAL)

    @cached_property
    def outlier(self) -> BoolArray:
        """Observations with wrong labels."""
        return self.chance("outlier", 0.0, self.settings.wrong_fraction)

    def chance(self, number: str, low: float, high: float) -> BoolArray:
        """Observations, none of special stars, whose uniform random number is in a range."""
        drawn = self.uniform[number]
        return np.asarray((drawn >= low) & (drawn < high) & ~self.special)

    def flagged(self, number: str, of_outliers: float, of_others: float) -> BoolArray:
        """A share of the outliers, and a smaller one of the other observations."""
        drawn = self.chance(number, 0.0, of_outliers)
        return np.where(self.outlier, drawn, self.chance(number, 0.0, of_others))

    @cached_property
    def snr(self) -> FloatArray:
        """Signal to noise by magnitude; half of the LAMOST outliers have an eighth of it.

        Outliers of a sky with wrong rows have what others have.
        """
        stars, survey, shaped = self.stars, self.survey, self.settings.shapes
        zero, slope, middle, scatter = survey.snr
        magnitude = stars.g
        if survey is SURVEYS[APOGEE]:  # in H
            magnitude = stars.g - 0.2 - 1.55 * (stars.bp - stars.rp)
        snr = 10.0 ** (zero - slope * (magnitude - middle) + scatter * self.normal["snr"])
        if survey is SURVEYS[LAMOST]:
            if "narrow" in shaped:
                snr *= 10.0 ** (0.13 + 0.25 * self.normal["snr"])
            if "wrong" not in shaped:
                snr *= np.where(self.outlier & (self.uniform["flag"] < 0.5), 0.12, 1.0)
        snr = np.clip(snr, *survey.snr_range)
        return np.where(self.special, np.maximum(snr, survey.snr_of_special), snr)

    @property
    def position(self) -> tuple[FloatArray, FloatArray]:
        """Place (deg) at the survey's epoch; first visits of special stars have no error."""
        sigma = np.where(self.special & (self.round == 0), 0.0, self.survey.position_error)
        error = sigma * np.stack([self.normal["east"], self.normal["north"]])
        return self.stars.at_epoch(self.survey.epoch, error)

    @property
    def gaia(self) -> IntArray:
        """Gaia ids, 0 where there is none."""
        return np.where(self.chance("id_gap", 0.0, self.survey.no_gaia), 0, self.stars.gaia)

    @cached_property
    def bias(self) -> FloatArray:
        """Injected differences."""
        if self.survey.bias is None or not self.settings.bias:
            return np.zeros((len(self.row), 3))
        if self._is_shaped:
            return shapes.lamost_pipeline(self.settings, self._true, self._noise)
        return self.survey.bias(*self._true.T)

    @cached_property
    def _true_error(self) -> FloatArray:
        stars = self.stars
        return difficulty(stars.teff, stars.logg, stars.feh)[:, None] * self.survey.noise(self.snr)

    @property
    def _is_shaped(self) -> bool:
        return self.survey is SURVEYS[LAMOST] and bool(self.settings.shapes)

    @property
    def _true(self) -> FloatArray:
        return np.stack([getattr(self.stars, name) for name in LABELS], axis=-1)

    @property
    def _noise(self) -> FloatArray:
        normal = np.stack([self.normal[name] for name in LABELS], axis=-1)
        if self._is_shaped:
            normal = shapes.correlated(self.settings, normal)
        return self._true_error * normal

    @cached_property
    def labels(self) -> FloatArray:
        """Labels as the survey measures them: biased, noisy, wrong for outliers."""
        value = self._true + self.bias + self._noise
        off = np.flatnonzero(self.outlier)
        side = 2.0 * np.stack([self.uniform[f"wrong_{n}"][off] for n in LABELS], axis=-1) - 1.0
        least, more = np.array([400.0, 0.6, 0.4]), np.array([1200.0, 1.4, 1.1])
        move = np.where(side < 0, -1.0, 1.0) * (least + more * np.abs(side))
        moved = value[off] + move
        outside = (moved < [3000.0, -0.5, -3.8]) | (moved > [11000.0, 5.6, 1.0])
        value[off] = np.where(outside, value[off] - move, moved)
        return value

    def measured(self, names: str) -> dict[str, NDArray[Any]]:
        """What every survey measures, by the names of its columns.

        Labels, their stated errors, place, radial velocity, its error, S/N, Gaia id, magnitude.
        """
        factor = stated_error_factor(self.stars.logg, self.snr)[:, None]
        if self._is_shaped and "correlated" in self.settings.shapes:
            factor = shapes.stated_factor(self.settings, self.snr)
        stated = self._true_error * factor
        more = (*self.position, *self.rv, self.snr, self.gaia, self.stars.g)
        return dict(zip(names.split(), [*self.labels.T, *stated.T, *more], strict=True))

    @property
    def rv(self) -> tuple[FloatArray, FloatArray]:
        """Radial velocity and its error, km/s."""
        floor, slope = self.survey.rv_error
        error = np.hypot(floor, slope / self.snr)
        orbit = self.stars.amplitude * np.sin(2.0 * np.pi * self._phase)
        return self.stars.rv + orbit + self.bias_rv + error * self.normal["rv"], error

    @property
    def _phase(self) -> FloatArray:
        """Phase of a binary, of this row of this survey: any, whatever is drawn of others."""
        survey = [one.name for one in ALL_SURVEYS.values()].index(self.survey.name)
        rows = self.row.astype(np.uint64) << np.uint64(8) | np.uint64(survey)
        return mixed(rows ^ mixed(np.full(1, self.settings.seed, np.uint64))) / 2.0**64

    @property
    def bias_rv(self) -> FloatArray:
        """Injected differences of the radial velocity, km/s."""
        if self._is_shaped and self.settings.bias:
            return shapes.rv_offset(self.settings, self.stars.teff, self.snr)
        offset = self.survey.rv_offset if self.settings.bias else 0.0
        return np.full(len(self.row), offset)


# Names


def _joined(*parts: Any) -> Names:
    return np.asarray(reduce(np.strings.add, parts))


def _digits(values: IntArray, width: int) -> Names:
    """Zero-padded decimal digits."""
    return np.strings.zfill(values.astype(str), width)


def twomass_names(ra: FloatArray, dec: FloatArray) -> Names:
    """Names ``2MHHMMSSss+DDMMSSs`` by position, truncated."""
    second = np.minimum((ra * 24000.0).astype(np.int64), 8639999)  # of time, in hundredths
    arcsec = np.minimum(np.abs(dec * 36000.0).astype(np.int64), 3240000)  # in tenths
    hours, degrees = (
        whole // (3600 * part) * 10000 * part + whole // (60 * part) % 60 * 100 * part
        + whole % (60 * part)
        for whole, part in ((second, 100), (arcsec, 10))
    )  # fmt: skip
    sign = np.where(dec < 0, "-", "+")
    return _joined("2M", _digits(hours, 8), sign, _digits(degrees, 7))


def field_names(ra: FloatArray, dec: FloatArray, turn: IntArray | int = 0) -> Names:
    """Names of fields by Galactic place, as ``270+60``; in a later turn the first is a letter."""
    lon, lat = sky.to_galactic(ra, dec)
    whole = np.floor(lon).astype(np.int64) % 360
    letters = np.array(list("0bcdefghijklmnopqrstuvwxyz"))[turn]
    first = np.where(np.asarray(turn) > 0, letters, (whole // 100).astype(str))
    sign, degrees = np.where(lat < 0, "-", "+"), _digits(np.abs(lat).astype(np.int64), 2)
    return _joined(first, _digits(whole % 100, 2), sign, degrees)


def telescopes(dec: FloatArray) -> Names:
    """Telescope of a field by its declination: north or south."""
    return np.where(dec > -20.0, "apo25m", "lco25m")


# Tables


@cache
def layout(name: str) -> str:
    """Columns of one of the files, in the words of ``sky-columns.toml``."""
    text = (resources.files("sos_dask") / "templates" / "sky-columns.toml").read_text("utf-8")
    return str(tomllib.loads(text)[name]).strip()


@cache
def columns(survey: int) -> Any:
    """FITS columns of a survey (`astropy.io.fits.ColDefs`)."""
    from astropy.io import fits

    found = []
    for item in re.split("[|\n]", layout(ALL_SURVEYS[survey].name)):
        name, form, *more = item.split()
        unit, shape = (None if text == "-" else text for text in (*more, "-", "-")[:2])
        found.append(fits.Column(name, form, unit=unit, dim=shape))
    return fits.ColDefs(found)


def _records(survey: int, values: Mapping[str, Any], gone: Mapping[str, Any], null: float) -> Any:
    """Packed, big-endian FITS rows; a null where the mask of a column says so."""
    dtype = np.dtype(columns(survey).dtype).newbyteorder(">")
    rows = np.zeros(len(next(iter(values.values()))), dtype)
    for name, value in values.items():
        rows[name] = value
    for names, mask in gone.items():
        for name in names.split():
            rows[name][mask] = null
    return rows


_SUBCLASS_EDGES = np.array([4300.0, 5000.0, 5600.0, 6000.0, 6500.0, 7200.0, 8200.0])
_SUBCLASSES = np.array([b"K7", b"K3", b"G8", b"G2", b"F9", b"F5", b"A9", b"A5"])


def lamost(visits: Visits) -> tuple[Records, NDArray[Any]]:
    """Rows and keys of LAMOST DR11 LRS.

    Keys increase with the row, as those of the real file by date. Nulls are -9999 (all labels in
    0.4 % of the rows, rv in 2 %), and 0 for Gaia ids.
    """
    plan, slot = np.divmod(visits.row, 2048)  # and spectrograph and fibre
    obs_id = (plan + 1) * 100_000 + (slot // 250 + 1) * 1000 + slot % 250 + 1
    values = visits.measured(
        "teff logg feh teff_err logg_err feh_err ra dec rv rv_err snrg gaia_source_id "
        "gaia_g_mean_mag"
    )
    values |= {
        "obsid": obs_id, "ra_obs": values["ra"], "dec_obs": values["dec"],
        "class": np.array(b"STAR"), "rv_err": 1.2 * values["rv_err"],
        "subclass": _SUBCLASSES[np.searchsorted(_SUBCLASS_EDGES, values["teff"])],
    }  # fmt: skip
    no_labels = visits.chance("gap", 0.0, 0.004)
    gone = {
        "gaia_g_mean_mag": visits.gaia == 0,
        "teff teff_err logg logg_err feh feh_err": no_labels,
        "rv rv_err": no_labels | visits.chance("gap", 0.98, 1.0),
    }
    return _records(LAMOST, values, gone, -9999.0), obs_id


_STAR_BAD, _CHI2_BAD, _SN_BAD, _STAR_WARN, _SN_WARN = 1 << 23, 1 << 24, 1 << 27, 1 << 7, 1 << 11
_BAD_REASONS = 1 << np.array([16, 17, 26, 36, 40, 41])
_DUPLICATE = 1 << 4


def apogee(visits: Visits) -> tuple[Records, NDArray[Any]]:
    """Rows and keys of APOGEE DR17.

    60 % of the outliers have STAR_BAD with a reason, 15 % STAR_WARN; 1 % and 3 % of the others too.
    Teff and log g are NaN with STAR_BAD or CHI2_BAD, [Fe/H] too and where FE_H_FLAG says so. Nulls
    are NaN, 0 for Gaia ids. The last row before the repeats is VESTA, without a position. Text is
    padded with blanks.
    """
    stars, uniform, normal, snr = visits.stars, visits.uniform, visits.normal, visits.snr
    bad, warned = visits.flagged("flag", 0.60, 0.01), visits.flagged("flag", 0.75, 0.04)
    chi2_bad = visits.chance("flag2", 0.0, 0.003)
    no_labels = bad | chi2_bad
    reason = _BAD_REASONS[(uniform["bit"] * len(_BAD_REASONS)).astype(np.int64)]
    flag = np.where(bad, _STAR_BAD | _STAR_WARN | reason, np.where(warned, _STAR_WARN | 1, 0))
    flag |= _CHI2_BAD * chi2_bad | _SN_WARN * (snr < 70) | _SN_BAD * (snr < 30)
    iron_flag = visits.chance("flag2", 0.993, 1.0) | no_labels * (1 << 3)

    vesta = visits.row == visits.n_first - 1
    name = np.where(vesta, "VESTA", twomass_names(*stars.at_epoch(2000.0)))
    # A repeat belongs to another field at the same place, with a name of the same length.
    field = field_names(visits.field_ra, visits.field_dec, visits.round)
    telescope = telescopes(visits.field_dec)
    obs_id = _joined("apogee.", telescope, ".stars.", field, ".", name)
    gaia = np.where(vesta, 0, visits.gaia)
    parallax, error, distance = stars.gaia_distance(normal["parallax"], normal["distance"])
    best = np.zeros(int(visits.star.max(initial=0)) + 1)
    np.maximum.at(best, visits.star, snr)
    values = visits.measured(
        "TEFF LOGG FE_H TEFF_ERR LOGG_ERR FE_H_ERR RA DEC VHELIO_AVG VERR SNR GAIAEDR3_SOURCE_ID "
        "GAIAEDR3_PHOT_G_MEAN_MAG"
    )
    values |= {
        "APSTAR_ID": np.strings.ljust(obs_id, 45), "APOGEE_ID": np.strings.ljust(name, 18),
        "FIELD": np.strings.ljust(field, 16), "TELESCOPE": telescope,
        "GAIAEDR3_SOURCE_ID": gaia, "GAIAEDR3_PARALLAX": parallax,
        "GAIAEDR3_PMRA": stars.pmra + error * normal["x"],
        "GAIAEDR3_PMDEC": stars.pmdec + error * normal["y"],
        "GAIAEDR3_R_MED_PHOTOGEO": distance, "SFD_EBV": 1.1 * stars.ebv,
        "ASPCAPFLAG": flag, "FE_H_FLAG": iron_flag,
        "STARFLAG": (snr < 20) * (1 << 4) | visits.chance("gap2", 0.0, 0.03) * (1 << 9),
        "EXTRATARG": (snr < best[visits.star]) * _DUPLICATE,
    }  # fmt: skip
    gone = {
        "RA DEC": vesta,
        "VHELIO_AVG": visits.chance("gap", 0.996, 1.0),
        "GAIAEDR3_PHOT_G_MEAN_MAG GAIAEDR3_PARALLAX GAIAEDR3_PMRA GAIAEDR3_PMDEC "
        "GAIAEDR3_R_MED_PHOTOGEO": gaia == 0,
        "TEFF TEFF_ERR LOGG LOGG_ERR": no_labels,
        "FE_H FE_H_ERR": iron_flag > 0,
    }
    return _records(APOGEE, values, gone, np.nan), obs_id


_GALAH_FIRST_DAY, _GALAH_DAYS = np.datetime64("2013-11-12"), 3000
_NOT_CONVERGED, _NO_RESULT, _LOW_SNR = 4096, 16384, 2048
_SP_BITS = np.array([1, 4, 8, 16, 128, 256, 512, _NOT_CONVERGED], dtype=np.int64)


def galah(visits: Visits) -> tuple[Records, NDArray[Any]]:
    """Rows and keys of GALAH DR4.

    65 % of the outliers have ``flag_sp`` and half ``flag_fe_h``; 2 % and 1 % of the others too.
    Nulls are NaN, and 0 for Gaia ids.
    """
    stars, normal, snr = visits.stars, visits.normal, visits.snr
    reason = _SP_BITS[(visits.uniform["bit"] * len(_SP_BITS)).astype(np.int64)]
    no_result = visits.chance("gap", 0.0, 0.004)
    flag_sp = visits.flagged("flag", 0.65, 0.02) * reason
    flag_sp |= (snr < 10) * _LOW_SNR | no_result * _NO_RESULT
    no_labels = no_result | ((flag_sp & _NOT_CONVERGED) > 0)

    # As GALAH writes sobject_id: date, run, 01 and pivot.
    run, pivot = np.divmod(visits.row, 360)
    day, run = np.divmod(run, 8)
    season, day = np.divmod(day, _GALAH_DAYS)
    days = np.datetime_as_string(_GALAH_FIRST_DAY + np.arange(_GALAH_DAYS))
    dates = np.strings.replace(days, "-", "").astype(np.int64) % 10**6
    obs_id = ((dates[day] * 10_000 + season * 8 + run + 1) * 100 + 1) * 1000 + pivot + 1
    parallax, _, distance = stars.gaia_distance(normal["parallax"], normal["distance"])
    values = visits.measured(
        "teff logg fe_h e_teff e_logg e_fe_h ra dec rv_comp_1 e_rv_comp_1 snr_px_ccd3 "
        "gaiadr3_source_id phot_g_mean_mag"
    )
    values |= {
        "sobject_id": obs_id, "flag_sp": flag_sp, "flag_sp_fit": no_labels,
        "flag_red": visits.chance("gap2", 0.99, 1.0),
        "flag_fe_h": np.where(no_labels, 3, visits.flagged("flag2", 0.5, 0.01)),
        "r_med": distance, "ebv": stars.ebv, "parallax": parallax,
    }  # fmt: skip
    gone = {
        "teff e_teff logg e_logg fe_h e_fe_h": no_labels,
        "rv_comp_1 e_rv_comp_1": visits.chance("gap", 0.99, 1.0),
        "phot_g_mean_mag parallax": visits.gaia == 0,
    }
    return _records(GALAH, values, gone, np.nan), obs_id


def rave(visits: Visits) -> tuple[Records, NDArray[Any]]:
    """Rows and keys of RAVE DR6.

    60 % of the outliers and 1 % of the others are not converged (1). Nulls are NaN, and 0 for Gaia
    ids.
    """
    plate, fibre = np.divmod(visits.row, 150)
    obs_id = _joined("20", _digits(plate, 6), "_1507m23_", _digits(fibre + 1, 3))
    values = visits.measured(
        "teff_cal_madera logg_cal_madera m_h_cal_madera teff_error_madera logg_error_madera "
        "m_h_error_madera ra_input dec_input hrv_sparv hrv_error_sparv snr_madera "
        "gaiaedr3_source_id phot_g_mean_mag"
    )
    values |= {"rave_obs_id": obs_id, "algo_conv_madera": visits.flagged("flag", 0.6, 0.01)}
    gone = {"m_h_cal_madera m_h_error_madera": visits.chance("gap", 0.0, 0.01)}
    return _records(RAVE, values, gone, np.nan), obs_id


def rvs(visits: Visits) -> tuple[Records, NDArray[Any]]:
    """Rows and keys of Gaia DR3: radial velocities, and GSP-Spec for four of five stars.

    Labels have no errors; a flag of 60 % of the outliers and 2 % of the others is not 0.
    """
    stars, flagged = visits.stars, visits.flagged("flag", 0.6, 0.02)
    values = visits.measured(
        "teff_gspspec logg_gspspec mh_gspspec - - - ra dec radial_velocity radial_velocity_error "
        "rv_expected_sig_to_noise source_id phot_g_mean_mag"
    )
    del values["-"]
    parallax, error, _ = stars.gaia_distance(visits.normal["parallax"], visits.normal["distance"])
    values |= {
        "parallax": parallax, "pmra": stars.pmra + error * visits.normal["x"],
        "pmdec": stars.pmdec + error * visits.normal["y"],
        "flags_gspspec": np.where(flagged, "0000000000001", "0000000000000"),
    }  # fmt: skip
    no_labels = visits.chance("gap", 0.0, 0.2)
    values["flags_gspspec"][no_labels] = ""
    gone = {"teff_gspspec logg_gspspec mh_gspspec": no_labels}
    return _records(RVS, values, gone, np.nan), stars.gaia


TABLES = {LAMOST: lamost, APOGEE: apogee, GALAH: galah, RAVE: rave, RVS: rvs}
