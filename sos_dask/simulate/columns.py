"""Native columns of the mock surveys.

Names, types and units follow LAMOST DR11 LRS (A, F, G, K stars), APOGEE DR17 allStar and GALAH DR4
allstar; of the many abundance columns of the last two only some are written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from sos_dask.simulate.sky import APOGEE, GALAH, LAMOST

_DTYPES = {"I": ">i2", "J": ">i4", "K": ">i8", "E": ">f4", "D": ">f8"}


class NativeColumn(NamedTuple):
    """A FITS column: name, TFORM, unit, and the shape of a matrix."""

    name: str
    form: str
    unit: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> tuple[Any, ...]:
        """Entry of a numpy structured dtype."""
        match = re.fullmatch(r"(\d*)([AIJKED])", self.form)
        assert match is not None
        count, code = int(match[1] or 1), match[2]
        if code == "A":
            return (self.name, f"S{count}")
        if count == 1:
            return (self.name, _DTYPES[code])
        return (self.name, _DTYPES[code], self.shape or (count,))


def _columns(text: str) -> tuple[NativeColumn, ...]:
    """Columns from lines of ``name form [unit] [rows x columns]``, separated by ``|``."""
    out = []
    for item in text.replace("\n", "|").split("|"):
        if item.strip():
            name, form, unit, shape = (*item.split(), "-", "-")[:4]
            size = tuple(int(n) for n in shape.split("x")) if shape != "-" else ()
            out.append(NativeColumn(name, form, "" if unit == "-" else unit, size))
    return tuple(out)


COLUMNS: Mapping[int, tuple[NativeColumn, ...]] = {
    LAMOST: _columns("""
        obsid J | uid 15A | gp_id K | designation 19A | obsdate 10A | lmjd J d | mjd J d
        planid 8A | spid I | fiberid I | ra_obs D deg | dec_obs D deg
        snru E | snrg E | snrr E | snri E | snrz E | class 4A | subclass 4A | z E | z_err E
        ps_id K | mag_ps_g E mag | mag_ps_r E mag | mag_ps_i E mag | mag_ps_z E mag | mag_ps_y E mag
        gaia_source_id K | gaia_g_mean_mag E mag | fibertype 4A | offsets I | offsets_v E arcsec
        ra D deg | dec D deg | fibermask J | with_norm_flux I
        teff E K | teff_err E K | logg E | logg_err E | feh E | feh_err E
        rv E km/s | rv_err E km/s | alpha_m E | alpha_m_err E | vsini_lasp E km/s
    """),
    APOGEE: _columns("""
        APOGEE_ID 18A | TARGET_ID 34A | APSTAR_ID 45A | TELESCOPE 6A | LOCATION_ID J | FIELD 16A
        J E mag | J_ERR E mag | H E mag | H_ERR E mag | K E mag | K_ERR E mag
        RA D deg | DEC D deg | GLON D deg | GLAT D deg
        EXTRATARG J | NVISITS J | SNR E | SNREV E | STARFLAG J | ANDFLAG J
        VHELIO_AVG E km/s | VSCATTER E km/s | VERR E km/s | RV_TEFF E K | RV_LOGG E | RV_FEH E
        RV_FLAG J | AK_TARG E mag | AK_WISE E mag | SFD_EBV E mag
        GAIAEDR3_SOURCE_ID K | GAIAEDR3_PARALLAX E mas | GAIAEDR3_PARALLAX_ERROR E mas
        GAIAEDR3_PMRA E mas/yr | GAIAEDR3_PMRA_ERROR E mas/yr
        GAIAEDR3_PMDEC E mas/yr | GAIAEDR3_PMDEC_ERROR E mas/yr
        GAIAEDR3_PHOT_G_MEAN_MAG E mag | GAIAEDR3_PHOT_BP_MEAN_MAG E mag
        GAIAEDR3_PHOT_RP_MEAN_MAG E mag
        GAIAEDR3_R_MED_GEO E pc | GAIAEDR3_R_LO_GEO E pc | GAIAEDR3_R_HI_GEO E pc
        GAIAEDR3_R_MED_PHOTOGEO E pc | GAIAEDR3_R_LO_PHOTOGEO E pc | GAIAEDR3_R_HI_PHOTOGEO E pc
        ASPCAP_CHI2 E | FPARAM 9E | FPARAM_COV 81E - 9x9 | PARAM 9E | PARAMFLAG 9J | ASPCAPFLAG K
        TEFF E K | TEFF_ERR E K | LOGG E | LOGG_ERR E | M_H E | M_H_ERR E
        ALPHA_M E | ALPHA_M_ERR E | VMICRO E km/s | VSINI E km/s | TEFF_SPEC E K | LOGG_SPEC E
        X_H 27E | X_H_ERR 27E | ELEMFLAG 27J
        FE_H E | FE_H_SPEC E | FE_H_ERR E | FE_H_FLAG J
        MG_FE E | MG_FE_ERR E | MG_FE_FLAG J | VISIT_PK 6J
    """),
    GALAH: _columns("""
        sobject_id K | tmass_id 16A | gaiadr3_source_id K | survey_name 15A | field_id J
        mjd E d | ra D deg | dec D deg
        flag_sp J | flag_sp_fit J | flag_red J | model_name 12A | chi2_sp E | px_used_perc E
        snr_px_ccd1 E | snr_px_ccd2 E | snr_px_ccd3 E | snr_px_ccd4 E
        teff E K | e_teff E K | logg E | e_logg E | fe_h E | e_fe_h E | flag_fe_h J
        vmic E km/s | vsini E km/s | e_vsini E km/s
        rv_comp_1 E km/s | e_rv_comp_1 E km/s | rv_gaia_dr3 E km/s | e_rv_gaia_dr3 E km/s
        mass E solMass | age E Gyr | lbol E solLum | r_med E pc | r_lo E pc | r_hi E pc
        a_ks E mag | ebv E mag | phot_g_mean_mag E mag | bp_rp E mag | ruwe E
        parallax E mas | parallax_error E mas | j_m E mag | h_m E mag | ks_m E mag
        mg_fe E | e_mg_fe E | flag_mg_fe J | o_fe E | e_o_fe E | flag_o_fe J
    """),
}


def record_dtype(survey: int) -> np.dtype[Any]:
    """Structured, packed, big-endian dtype of a survey's FITS rows."""
    return np.dtype([column.dtype for column in COLUMNS[survey]])
