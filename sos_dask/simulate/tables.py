"""The mock surveys' own rows: labels, sentinels and flags, as FITS records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sos_dask.simulate.columns import record_dtype
from sos_dask.simulate.measurement import RV_OFFSETS, Measured, galah_bias, lamost_bias, measure
from sos_dask.simulate.names import (
    ByteArray,
    Names,
    as_bytes,
    compose,
    digits,
    dotted,
    field_names,
    sexagesimal,
    telescopes,
)
from sos_dask.simulate.sky import (
    APOGEE,
    GALAH,
    LAMOST,
    SPECIAL,
    BoolArray,
    FloatArray,
    IntArray,
    Stars,
    at_epoch,
    to_galactic,
    visible_distance,
)

Rows = NDArray[Any]

POSITION_EPOCHS = {LAMOST: 2000.0, APOGEE: 2000.0, GALAH: 2016.0}
"""Julian year of ra and dec in each survey's file."""

UNIFORMS = (
    "outlier", "wrong_teff", "wrong_logg", "wrong_feh", "flag", "flag2", "gap", "gap2", "id_gap",
    "bit",
)  # fmt: skip
"""Uniform random numbers of an observation, in the order they are drawn."""
NORMALS = (
    "snr", "teff", "logg", "feh", "rv", "east", "north", "x", "y", "parallax", "distance"
)  # fmt: skip
"""Standard normal random numbers of an observation, in the order they are drawn."""


@dataclass(frozen=True)
class Visits:
    """The observations of one block of stars by one survey; arrays of shape (n,) but one.

    Parameters
    ----------
    stars : Stars
        One entry an observation.
    index : ndarray of int64
        Number of the star within the block: observations of one star share it.
    round : ndarray of int64
        0 for the first observation of a star, 1 for the second, and so on.
    row : ndarray of int64
        Row in the file.
    n_rows, n_first : int
        Rows of the file, and those of first visits, which stand at its beginning.
    plate, plate_ra, plate_dec : ndarray
        Number and centre (deg) of the plate.
    uniform, normal : mapping of str to ndarray of float64
        Random numbers, named as in `UNIFORMS` and `NORMALS`.
    biased : bool
        Whether the survey has systematic differences.
    outlier_fraction : float
    """

    stars: Stars
    index: IntArray
    round: IntArray
    row: IntArray
    n_rows: int
    n_first: int
    plate: IntArray
    plate_ra: FloatArray
    plate_dec: FloatArray
    uniform: Mapping[str, FloatArray]
    normal: Mapping[str, FloatArray]
    biased: bool
    outlier_fraction: float

    @property
    def special(self) -> BoolArray:
        """Which observations are of special stars."""
        return np.asarray(self.stars.kind == SPECIAL)

    @property
    def is_outlier(self) -> BoolArray:
        """Which observations have wrong labels."""
        return (self.uniform["outlier"] < self.outlier_fraction) & ~self.special

    def position(self, survey: int, sigma_arcsec: float) -> tuple[FloatArray, FloatArray]:
        """Positions at the survey's epoch with errors; first visits of special stars have none."""
        sigma = np.where(self.special & (self.round == 0), 0.0, sigma_arcsec)
        return at_epoch(
            self.stars,
            POSITION_EPOCHS[survey],
            sigma * self.normal["east"],
            sigma * self.normal["north"],
        )

    def gaia(self, missing: float) -> IntArray:
        """Gaia ids, 0 for some rows more than the stars that are not in Gaia."""
        gone = (self.uniform["id_gap"] < missing) & ~self.special
        return np.where(gone, 0, self.stars.gaia)

    def measured(
        self,
        snr: FloatArray,
        bias: FloatArray,
        floor: tuple[float, float, float],
        slope: tuple[float, float, float],
    ) -> Measured:
        """Labels of the survey (see `sky.measure`)."""
        return measure(
            self.stars,
            snr,
            bias,
            floor,
            slope,
            np.stack([self.normal[name] for name in ("teff", "logg", "feh")], axis=-1),
            self.is_outlier,
            np.stack([self.uniform[f"wrong_{name}"] for name in ("teff", "logg", "feh")], axis=-1),
        )


@dataclass(frozen=True)
class Observed:
    """FITS records of observations with their keys and injected biases (n, 3)."""

    rows: Rows
    obs_id: NDArray[Any]
    bias: FloatArray


def _dates(first: str, n_days: int) -> Names:
    days = np.datetime64(first) + np.arange(n_days)
    return np.datetime_as_string(days, unit="D").astype("S10")


_LAMOST_FIRST_MJD, _LAMOST_DAYS = 55858, 4200
_LAMOST_DATES = _dates("2011-10-24", _LAMOST_DAYS)
_GALAH_FIRST_MJD, _GALAH_DAYS = 56608, 3000
_GALAH_DATES = np.array(
    [int(day.replace(b"-", b"")[2:]) for day in _dates("2013-11-12", _GALAH_DAYS)], dtype=np.int64
)
_PLATE_ROWS = 2048
_SUBCLASS_EDGES = np.array([4300.0, 5000.0, 5600.0, 6000.0, 6500.0, 7200.0, 8200.0])
_SUBCLASSES = np.array([b"K7", b"K3", b"G8", b"G2", b"F9", b"F5", b"A9", b"A5"])
_LIGHT_SPEED = 299792.458


def lamost_obs_ids(row: IntArray) -> IntArray:
    """Key of a row of the file: plan, spectrograph and fibre, as LAMOST writes them.

    Increasing with the row, as the real file is by date. Later exact duplicates repeat a key.
    """
    plan, slot = np.divmod(row, _PLATE_ROWS)
    return np.asarray((plan + 1) * 100_000 + (slot // 250 + 1) * 1000 + slot % 250 + 1)


def lamost(visits: Visits) -> Observed:
    """Rows of LAMOST DR11 LRS: label noise 25 K, 0.04, 0.025 dex and 2500 K, 4, 2.2 dex / S/N.

    Half of the outliers have an eighth of the S/N. Nulls are -9999 (all labels in 0.4 % of the
    rows, rv in 2 %), and 0 for Gaia and Pan-STARRS ids.
    """
    stars, uniform, normal = visits.stars, visits.uniform, visits.normal
    n = len(visits.row)
    rows = np.zeros(n, dtype=record_dtype(LAMOST))
    special = visits.special
    snr = 10.0 ** (1.95 - 0.21 * (stars.g - 14.0) + 0.13 * normal["snr"])
    snr *= np.where(visits.is_outlier & (uniform["flag"] < 0.5), 0.12, 1.0)
    snr = np.clip(snr, 4.0, 900.0)
    bias = lamost_bias(stars.teff, stars.logg, stars.feh) if visits.biased else np.zeros((n, 3))
    labels = visits.measured(snr, bias, (25.0, 0.04, 0.025), (2500.0, 4.0, 2.2))
    ra, dec = visits.position(LAMOST, 0.12)
    gaia = visits.gaia(0.02)
    plan, slot = np.divmod(visits.row, _PLATE_ROWS)
    day = plan * _LAMOST_DAYS // (visits.n_rows // _PLATE_ROWS + 1)
    obs_id = lamost_obs_ids(visits.row)
    rows["obsid"] = obs_id
    rows["uid"] = compose([b"G", digits((stars.number * 7_368_787 + 17) % 10**14, 14)], n)
    rows["gp_id"] = stars.number + 1_000_000
    hh, mm, ss, cc, sign, dd, am, asec, tenth = sexagesimal(ra, dec)
    rows["designation"] = compose([b"J", hh, mm, ss, b".", cc, sign, dd, am, asec, b".", tenth], n)
    rows["obsdate"] = _LAMOST_DATES[day]
    rows["lmjd"] = _LAMOST_FIRST_MJD + day + 1
    rows["mjd"] = _LAMOST_FIRST_MJD + day
    rows["planid"] = compose([b"PL", digits(plan, 6)], n)
    rows["spid"] = slot // 250 + 1
    rows["fiberid"] = slot % 250 + 1
    rows["ra_obs"], rows["dec_obs"] = ra, dec
    red = stars.bp - stars.rp
    rows["snrg"] = snr
    for band, blue, slope in (("u", 0.7, -0.2), ("r", 1.1, 0.3), ("i", 1.1, 0.4), ("z", 0.8, 0.3)):
        rows[f"snr{band}"] = snr * np.maximum(blue + slope * red, 0.05)
    rows["class"] = b"STAR"
    rows["subclass"] = _SUBCLASSES[np.searchsorted(_SUBCLASS_EDGES, labels.value[:, 0])]
    rv_error = np.hypot(2.0, 80.0 / snr)
    rv = stars.rv + (RV_OFFSETS[LAMOST] if visits.biased else 0.0) + rv_error * normal["rv"]
    rows["z"], rows["z_err"] = rv / _LIGHT_SPEED, rv_error / _LIGHT_SPEED
    no_ps = uniform["gap2"] > 0.97
    rows["ps_id"] = np.where(no_ps, 0, stars.number * 97 + 10**17)
    for band, factor in (("g", 0.35), ("r", -0.12), ("i", -0.33), ("z", -0.44), ("y", -0.5)):
        rows[f"mag_ps_{band}"] = np.where(no_ps, -9999.0, stars.g + factor * (red - 0.1))
    rows["gaia_source_id"] = gaia
    rows["gaia_g_mean_mag"] = np.where(gaia == 0, -9999.0, stars.g)
    rows["fibertype"] = b"Obj"
    rows["ra"], rows["dec"] = ra, dec
    rows["with_norm_flux"] = 1
    no_labels = (uniform["gap"] < 0.004) & ~special
    for number, name in enumerate(("teff", "logg", "feh")):
        rows[name] = np.where(no_labels, -9999.0, labels.value[:, number])
        rows[f"{name}_err"] = np.where(no_labels, -9999.0, labels.stated_error[:, number])
    no_rv = no_labels | ((uniform["gap"] > 0.98) & ~special)
    rows["rv"] = np.where(no_rv, -9999.0, rv)
    rows["rv_err"] = np.where(no_rv, -9999.0, 1.2 * rv_error)
    no_alpha = no_labels | (uniform["gap2"] < 0.3)
    rows["alpha_m"] = np.where(no_alpha, -9999.0, stars.alpha + 0.05 * normal["x"])
    rows["alpha_m_err"] = np.where(no_alpha, -9999.0, 0.02 + 0.5 / snr)
    rows["vsini_lasp"] = np.where(
        (uniform["bit"] < 0.6) | no_labels, -9999.0, 30.0 + 20.0 * np.abs(normal["y"])
    )
    return Observed(rows, obs_id, bias)


STAR_BAD, CHI2_BAD, SN_BAD = 1 << 23, 1 << 24, 1 << 27
_STAR_WARN, _SN_WARN = 1 << 7, 1 << 11
_BAD_REASONS = np.array([1 << 16, 1 << 17, 1 << 26, 1 << 36, 1 << 40, 1 << 41], dtype=np.int64)
_DUPLICATE = 1 << 4


def apogee(visits: Visits) -> Observed:
    """Rows of APOGEE DR17: label noise 15 K, 0.03, 0.012 dex and 1200 K, 2.5, 1.2 dex / S/N.

    No bias. 60 % of the outliers have STAR_BAD with a reason, 15 % STAR_WARN; 1 % and 3 % of the
    others too. Teff and log g are NaN with STAR_BAD or CHI2_BAD, [Fe/H] too and where FE_H_FLAG
    says so. Nulls are NaN, 0 for Gaia ids, 99.999 in 2MASS magnitudes. The last row before the
    repeats is VESTA, without a position. Text is padded with blanks.
    """
    stars, uniform, normal = visits.stars, visits.uniform, visits.normal
    n = len(visits.row)
    rows = np.zeros(n, dtype=record_dtype(APOGEE))
    special, outlier = visits.special, visits.is_outlier
    colour = stars.bp - stars.rp
    h_mag = stars.g - 0.2 - 1.55 * colour
    snr = np.clip(10.0 ** (2.45 - 0.17 * (h_mag - 10.0) + 0.15 * normal["snr"]), 12.0, 1500.0)
    snr = np.where(special, np.maximum(snr, 150.0), snr)
    labels = visits.measured(snr, np.zeros((n, 3)), (15.0, 0.03, 0.012), (1200.0, 2.5, 1.2))

    chance, bit = uniform["flag"], uniform["bit"]
    bad = np.where(outlier, chance < 0.60, chance < 0.01) & ~special
    warned = np.where(outlier, chance < 0.75, chance < 0.04) & ~special
    chi2_bad = (uniform["flag2"] < 0.003) & ~special
    reason = _BAD_REASONS[(bit * len(_BAD_REASONS)).astype(np.int64)]
    flag = np.where(bad, STAR_BAD | _STAR_WARN | reason, np.where(warned, _STAR_WARN | 1, 0))
    flag |= np.where(chi2_bad, CHI2_BAD, 0)
    flag |= np.where(snr < 70, _SN_WARN, 0) | np.where(snr < 30, SN_BAD, 0)
    no_labels = bad | chi2_bad
    iron_flag = np.where((uniform["flag2"] > 0.993) & ~special, 1, 0)
    iron_flag |= np.where(no_labels, 1 << 3, 0)
    star_flag = np.where(snr < 20, 1 << 4, 0)
    star_flag |= np.where((uniform["gap2"] < 0.03) & ~special, 1 << 9, 0)

    ra, dec = visits.position(APOGEE, 0.07)
    name = compose([b"2M", *_twomass(stars)], n)
    vesta = visits.row == visits.n_first - 1
    name[vesta] = b"VESTA"
    rows["RA"], rows["DEC"] = np.where(vesta, np.nan, ra), np.where(vesta, np.nan, dec)
    rows["GLON"], rows["GLAT"] = to_galactic(ra, dec)
    # A repeat belongs to another field at the same place, with a name of the same length.
    letters = as_bytes(field_names(visits.plate_ra, visits.plate_dec))
    letters[:, 0] = np.where(visits.round > 0, ord("a") + visits.round, letters[:, 0])
    fields = compose([letters], n)
    telescope = telescopes(visits.plate_dec)
    obs_id = dotted([b"apogee", telescope, b"stars", fields, name])
    target_id = dotted([telescope, fields, name])
    for column, value in (
        ("APOGEE_ID", name), ("FIELD", fields), ("TELESCOPE", telescope),
        ("APSTAR_ID", obs_id), ("TARGET_ID", target_id),
    ):  # fmt: skip
        rows[column] = np.strings.ljust(value, rows.dtype[column].itemsize)
    rows["LOCATION_ID"] = visits.plate + 2000

    no_2mass = (uniform["gap"] < 0.005) & ~special
    for band, magnitude in (("J", h_mag + 0.45 * colour - 0.05), ("H", h_mag), ("K", h_mag - 0.08)):
        rows[band] = np.where(no_2mass, 99.999, magnitude)
        rows[f"{band}_ERR"] = np.where(no_2mass, 99.999, 0.024)
    rows["AK_TARG"] = np.where(uniform["gap"] > 0.97, np.nan, 0.31 * stars.ebv)
    rows["AK_WISE"] = 0.30 * stars.ebv
    rows["SFD_EBV"] = 1.1 * stars.ebv

    best = np.zeros(int(visits.index.max(initial=0)) + 1)
    np.maximum.at(best, visits.index, snr)
    rows["EXTRATARG"] = np.where(snr < best[visits.index], _DUPLICATE, 0)
    rows["NVISITS"] = 1 + (uniform["gap2"] * 6.0).astype(np.int64)
    rows["SNR"], rows["SNREV"] = snr, 0.98 * snr
    rows["STARFLAG"], rows["ANDFLAG"] = star_flag, star_flag & 1 << 4
    rv_error = np.hypot(0.05, 4.0 / snr)
    rv = stars.rv + (RV_OFFSETS[APOGEE] if visits.biased else 0.0) + rv_error * normal["rv"]
    rows["VHELIO_AVG"] = np.where((uniform["gap"] > 0.996) & ~special, np.nan, rv)
    rows["VERR"], rows["VSCATTER"] = rv_error, np.abs(0.1 * normal["x"])
    _gaia_of_apogee(rows, visits)

    rows["ASPCAP_CHI2"] = 2.0 + normal["x"] ** 2 + np.where(outlier, 20.0, 0.0)
    raw = labels.value + np.array([-20.0, 0.05, 0.01])
    for number, prefix in enumerate(("TEFF", "LOGG")):
        rows[prefix] = np.where(no_labels, np.nan, labels.value[:, number])
        rows[f"{prefix}_ERR"] = np.where(no_labels, np.nan, labels.stated_error[:, number])
        rows[f"{prefix}_SPEC"] = raw[:, number]
    iron_error = np.where(iron_flag > 0, np.nan, labels.stated_error[:, 2])
    rows["FE_H"] = np.where(iron_flag > 0, np.nan, labels.value[:, 2])
    rows["FE_H_ERR"], rows["FE_H_FLAG"], rows["FE_H_SPEC"] = iron_error, iron_flag, raw[:, 2]
    rows["M_H"] = np.where(no_labels, np.nan, labels.value[:, 2] + 0.01)
    rows["M_H_ERR"] = iron_error
    rows["ALPHA_M"] = np.where(no_labels, np.nan, stars.alpha + 0.02 * normal["y"])
    rows["ALPHA_M_ERR"] = 0.02
    rows["VMICRO"], rows["VSINI"] = 1.5, np.where(stars.logg > 3.8, 6.0, np.nan)
    rows["ASPCAPFLAG"] = flag
    parameters = np.zeros((n, 9))
    parameters[:, 0], parameters[:, 1], parameters[:, 3] = raw.T
    parameters[:, 2], parameters[:, 6], parameters[:, 7] = 0.18, stars.alpha, 0.6
    rows["FPARAM"] = parameters
    rows["PARAM"] = np.where(no_labels[:, None], np.nan, parameters)
    covariance = np.zeros((n, 9, 9))
    for parameter, number in ((0, 0), (1, 1), (3, 2)):
        covariance[:, parameter, parameter] = (0.3 * labels.stated_error[:, number]) ** 2
    rows["FPARAM_COV"] = covariance
    rows["PARAMFLAG"] = np.where(bad, 1, 0)[:, None]
    rows["X_H"] = (labels.value[:, 2] + 0.3 * stars.alpha)[:, None]
    rows["X_H"][:, 17] = rows["FE_H"]
    rows["X_H_ERR"] = iron_error[:, None]
    rows["ELEMFLAG"] = iron_flag[:, None]
    rows["MG_FE"] = np.where(no_labels, np.nan, stars.alpha + 0.03 * normal["y"])
    rows["MG_FE_ERR"] = 0.03
    rows["RV_TEFF"], rows["RV_LOGG"], rows["RV_FEH"] = raw.T
    rows["VISIT_PK"] = -1
    rows["VISIT_PK"][:, 0] = visits.row
    return Observed(rows, obs_id, np.zeros((n, 3)))


def _twomass(stars: Stars) -> list[ByteArray]:
    """Digits of the 2MASS name, from the place at J2000."""
    still = np.zeros(len(stars.ra))
    return sexagesimal(*at_epoch(stars, 2000.0, still, still))


def _gaia_of_apogee(rows: Rows, visits: Visits) -> None:
    """Gaia columns: all NaN where there is no Gaia id."""
    stars, normal = visits.stars, visits.normal
    gaia = np.where(visits.row == visits.n_first - 1, 0, visits.gaia(0.01))
    error, distance = visible_distance(stars, normal["distance"])
    values = {
        "PARALLAX": 1000.0 / stars.distance + error * normal["parallax"],
        "PARALLAX_ERROR": error,
        "PMRA": stars.pmra + error * normal["x"],
        "PMRA_ERROR": error,
        "PMDEC": stars.pmdec + error * normal["y"],
        "PMDEC_ERROR": error,
        "PHOT_G_MEAN_MAG": stars.g,
        "PHOT_BP_MEAN_MAG": stars.bp,
        "PHOT_RP_MEAN_MAG": stars.rp,
    }
    for kind in ("GEO", "PHOTOGEO"):
        values[f"R_MED_{kind}"] = distance
        values[f"R_LO_{kind}"], values[f"R_HI_{kind}"] = 0.95 * distance, 1.05 * distance
    rows["GAIAEDR3_SOURCE_ID"] = gaia
    for name, value in values.items():
        rows[f"GAIAEDR3_{name}"] = np.where(gaia == 0, np.nan, value)


SB1, NOT_CONVERGED, NO_RESULT = 4, 4096, 16384
_CHI2, _LOW_SNR = 16, 2048
_SP_BITS = np.array([1, SB1, 8, _CHI2, 128, 256, 512, NOT_CONVERGED], dtype=np.int64)


def galah_obs_ids(row: IntArray) -> IntArray:
    """Key of a row of the file: date, run, 01 and pivot, as GALAH writes sobject_id."""
    run, pivot = np.divmod(row, 360)
    day, run = np.divmod(run, 8)
    season, day = np.divmod(day, _GALAH_DAYS)
    return np.asarray(
        ((_GALAH_DATES[day] * 10_000 + season * 8 + run + 1) * 100 + 1) * 1000 + pivot + 1
    )


def galah(visits: Visits) -> Observed:
    """Rows of GALAH DR4: label noise 25 K, 0.04, 0.03 dex and 1500 K, 2.5, 2 dex / S/N.

    Small bias (see `galah_bias`). 65 % of the outliers have ``flag_sp`` and half ``flag_fe_h``; 2 %
    and 1 % of the others too. Nulls are NaN, 0 for Gaia ids, -1 for ``field_id``.
    """
    stars, uniform, normal = visits.stars, visits.uniform, visits.normal
    n = len(visits.row)
    rows = np.zeros(n, dtype=record_dtype(GALAH))
    special, outlier = visits.special, visits.is_outlier
    snr = np.clip(10.0 ** (1.75 - 0.18 * (stars.g - 13.0) + 0.13 * normal["snr"]), 4.0, 600.0)
    snr = np.where(special, np.maximum(snr, 60.0), snr)
    bias = galah_bias(stars.teff, stars.logg, stars.feh) if visits.biased else np.zeros((n, 3))
    labels = visits.measured(snr, bias, (25.0, 0.04, 0.03), (1500.0, 2.5, 2.0))

    reason = _SP_BITS[(uniform["bit"] * len(_SP_BITS)).astype(np.int64)]
    chance = uniform["flag"]
    flag_sp = np.where(np.where(outlier, chance < 0.65, chance < 0.02) & ~special, reason, 0)
    no_result = (uniform["gap"] < 0.004) & ~special
    flag_sp |= np.where(snr < 10, _LOW_SNR, 0) | np.where(no_result, NO_RESULT, 0)
    iron = np.where(outlier, uniform["flag2"] < 0.5, uniform["flag2"] < 0.01) & ~special
    no_labels = no_result | ((flag_sp & NOT_CONVERGED) > 0)
    obs_id = galah_obs_ids(visits.row)
    ra, dec = visits.position(GALAH, 0.0003)
    error, distance = visible_distance(stars, normal["distance"])
    gaia = visits.gaia(0.005)

    rows["sobject_id"], rows["gaiadr3_source_id"] = obs_id, gaia
    rows["tmass_id"] = compose(list(_twomass(stars)), n)
    rows["survey_name"] = b"galah_main"
    rows["field_id"] = np.where(uniform["gap2"] < 0.02, -1, visits.plate)
    rows["mjd"] = _GALAH_FIRST_MJD + (visits.row // 2880) % _GALAH_DAYS
    rows["ra"], rows["dec"] = ra, dec
    rows["flag_sp"] = flag_sp
    rows["flag_sp_fit"] = np.where(no_labels, 1, 0)
    rows["flag_red"] = np.where((uniform["gap2"] > 0.99) & ~special, 1, 0)
    rows["model_name"] = b"single"
    rows["chi2_sp"] = 1.0 + 0.2 * np.abs(normal["x"]) + np.where(outlier, 3.0, 0.0)
    rows["px_used_perc"] = 95.0
    for ccd, factor in ((1, 0.6), (2, 0.8), (3, 1.0), (4, 0.95)):
        rows[f"snr_px_ccd{ccd}"] = factor * snr
    for number, name in enumerate(("teff", "logg", "fe_h")):
        rows[name] = np.where(no_labels, np.nan, labels.value[:, number])
        rows[f"e_{name}"] = np.where(no_labels, np.nan, labels.stated_error[:, number])
    rows["flag_fe_h"] = np.where(no_labels, 3, np.where(iron, 1, 0))
    rows["vmic"], rows["vsini"] = 1.1, 5.0 + 3.0 * np.abs(normal["y"])
    rows["e_vsini"] = 1.0
    rv_error = np.hypot(0.1, 10.0 / snr)
    rv = stars.rv + (RV_OFFSETS[GALAH] if visits.biased else 0.0) + rv_error * normal["rv"]
    no_rv = (uniform["gap"] > 0.99) & ~special
    rows["rv_comp_1"] = np.where(no_rv, np.nan, rv)
    rows["e_rv_comp_1"] = np.where(no_rv, np.nan, rv_error)
    rows["rv_gaia_dr3"] = np.where(stars.g > 14.0, np.nan, stars.rv + 0.5 * normal["x"])
    rows["e_rv_gaia_dr3"] = np.where(stars.g > 14.0, np.nan, 0.5)
    rows["mass"], rows["age"] = 1.0, 5.0
    rows["lbol"] = 10.0 ** (0.4 * (4.7 - stars.g + 5.0 * np.log10(stars.distance / 10.0)))
    rows["r_med"], rows["r_lo"], rows["r_hi"] = distance, 0.95 * distance, 1.05 * distance
    rows["a_ks"], rows["ebv"] = 0.31 * stars.ebv, stars.ebv
    colour = stars.bp - stars.rp
    k_mag = stars.g - 0.28 - 1.55 * colour
    rows["phot_g_mean_mag"] = np.where(gaia == 0, np.nan, stars.g)
    rows["bp_rp"] = np.where(gaia == 0, np.nan, colour)
    rows["ruwe"] = np.where(gaia == 0, np.nan, 1.0 + 0.05 * np.abs(normal["y"]))
    rows["parallax"] = np.where(
        gaia == 0, np.nan, 1000.0 / stars.distance + error * normal["parallax"]
    )
    rows["parallax_error"] = np.where(gaia == 0, np.nan, error)
    rows["j_m"], rows["h_m"], rows["ks_m"] = k_mag + 0.45 * colour, k_mag + 0.08, k_mag
    for name in ("mg_fe", "o_fe"):
        rows[name] = np.where(no_labels, np.nan, stars.alpha + 0.05 * normal["x"])
        rows[f"e_{name}"] = 0.05
    return Observed(rows, obs_id, bias)


SURVEYS = {LAMOST: lamost, APOGEE: apogee, GALAH: galah}
"""The function that makes the rows of each survey."""
