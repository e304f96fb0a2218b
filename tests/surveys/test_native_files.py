"""Files as surveys publish them, with their traps, through ingest by the built-in definitions."""

import gzip
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from astropy.io import fits
from astropy.table import Table

from sos_dask import api
from sos_dask.errors import SurveyError
from sos_dask.storage.catalog import Catalog
from sos_dask.surveys.definition import load_survey

GAIA = 4_611_686_018_427_400_000  # needs all 64 bits
GOOD = {
    "teff": 5000.0, "teff_err": 50.0, "logg": 4.0, "logg_err": 0.1, "feh": -0.5, "feh_err": 0.05,
    "snr": 60.0, "rv": 12.5, "rv_err": 0.5, "pmra": 3.0, "pmdec": -4.0, "phot_g_mean_mag": 13.0,
    "parallax": 2.0, "ebv": 0.1, "dec": -5.0,
}  # fmt: skip


@dataclass
class Case:
    """A file of a survey: a good row, one for each trap, and the good one again.

    ``native`` has the columns that its definition needs beside the canonical ones, as in a good
    row. A trap is a native column, what stands there, what is null then, and the cuts that fail.
    """

    kind: str
    native: dict[str, Any]
    traps: list[tuple[str, Any, tuple[str, ...], tuple[str, ...]]]
    units: dict[str, str] = field(default_factory=dict)


CASES = {
    "lamost-dr11-mrs": Case(
        "fits.gz",
        {"obsid": 7, "band": "B", "rv_br_flag": 0, "coadd": 1},
        [
            ("rv_br1_err", 9999.0, ("rv_err",), ("rv_err",)),
            ("rv_br1_err", -9999.0, ("rv_err",), ("rv_err",)),
            ("teff_lasp_err", 9999.0, ("teff_err",), ("teff_err",)),
            ("feh_lasp", np.nan, ("feh",), ("feh",)),
            ("teff_lasp", -9999.0, ("teff",), ("teff",)),
            ("teff_lasp", 9500.0, (), ("hot",)),
            ("gaia_source_id", -9999, ("gaia_dr3_source_id",), ()),
            ("gaia_source_id", 0, ("gaia_dr3_source_id",), ()),
            ("rv_br_flag", 1, (), ("rv_flag",)),
            ("coadd", 0, (), ("coadd",)),
            ("snr", 4.0, (), ("snr",)),
        ],
        {"rv_br1": "km/s", "rv_br1_err": "km/s"},
    ),
    "gaia-eso-dr5": Case(
        "fits",
        {"GES_FLD": "NGC2516", "SFLAGS": "   ", "GAIA_ID": GAIA},
        [
            ("SFLAGS", "NIA", (), ()),
            ("SFLAGS", "SSP", (), ("sflags",)),
            ("FEH", np.nan, ("feh",), ("feh",)),
            ("E_TEFF", np.nan, ("teff_err",), ()),
        ],
        {"RA": "deg", "TEFF": "K", "VRAD": "km/s"},
    ),
    "rave-dr6": Case(
        "votable",
        {"algo_conv_madera": 0},
        [
            ("algo_conv_madera", 1, (), ("algo_conv",)),
            ("algo_conv_madera", 2, (), ()),
            ("snr_madera", 12.0, (), ("snr",)),
            ("gaiaedr3_source_id", 0, ("gaia_dr3_source_id",), ()),
            ("m_h_cal_madera", np.nan, ("feh",), ("feh",)),
            ("hrv_error_sparv", -9999.0, ("rv_err",), ()),
        ],
        {"ra_input": "deg", "hrv_sparv": "km.s**-1", "teff_cal_madera": "K"},
    ),
    "segue-dr12": Case(
        "fits",
        {"FLAG": "nnnnn"},
        [
            ("FLAG", "nnBnn", (), ("flag",)),
            ("TEFF_ADOP", -9999.0, ("teff",), ("teff",)),
            ("FEH_ADOP", -9.999, ("feh",), ("feh",)),
            ("FEH_ADOP_UNC", -9.999, ("feh_err",), ()),
            ("RV_ADOP_UNC", -9999.0, ("rv_err",), ()),
            ("SNR", 9.0, (), ("snr",)),
        ],
    ),
    "desi-mws-dr1": Case(
        "beside",
        {
            "TARGETID": 39627640566453451, "SURVEY": "main", "PROGRAM": "bright", "RVS_WARN": 0,
            "RR_SPECTYPE": "STAR", "VSINI": 4.0, "REF_ID": GAIA + 99, "FIBERMAP.REF_ID": GAIA + 99,
            "SPTAB.TEFF": 5100.0, "SPTAB.LOGG": 4.1, "SPTAB.FEH": -0.4,
            "SPTAB.BESTGRID": "s_rdesi2",
        },
        [
            ("RVS_WARN", 4, (), ("rvs_warn",)),
            ("RR_SPECTYPE", "GALAXY", (), ("spectype",)),
            ("VSINI", 80.0, (), ("vsini",)),
            ("SN_R", 8.0, (), ("snr",)),
            ("TEFF", np.nan, ("teff",), ("teff",)),
            ("GAIA.SOURCE_ID", 999999, ("gaia_dr3_source_id",), ()),
            ("GAIA.SOURCE_ID", -1, ("gaia_dr3_source_id",), ()),
            ("GAIA.PMRA", 1e20, ("pmra",), ()),
            ("SPTAB.TEFF", np.nan, ("sp_teff",), ()),
        ],
        {"VRAD": "km s-1", "GAIA.PMRA": "mas yr^-1", "TARGET_RA": "deg", "FIBERMAP.EBV": "mag"},
    ),
    "sdss-dr19-aspcap": Case(
        "hdu2.gz",
        {"sdss_id": 12, "release": "sdss5", "flag_bad": False},
        [
            ("flag_bad", True, (), ("flag_bad",)),
            ("release", "dr17", (), ("release",)),
            ("gaia_dr3_source_id", -1, ("gaia_dr3_source_id",), ()),
            ("gaia_dr2_source_id", GAIA + 5, (), ()),
            ("fe_h", np.nan, ("feh",), ("feh",)),
        ],
    ),
    "gaia-dr3-rvs": Case(
        "csv",
        {"flags_gspspec": "0" * 13 + "9" * 28},
        [
            ("flags_gspspec", "0000000000001" + "0" * 28, (), ("flags",)),
            ("flags_gspspec", "", (), ("flags",)),
            ("mh_gspspec", "", ("feh",), ("feh",)),
            ("radial_velocity_error", "", ("rv_err",), ()),
        ],
    ),
}  # fmt: skip


def key(name, number):
    """Id of a row as the survey writes it."""
    if name == "rave-dr6":
        return f"20030411_1507m23_{number:03d}"
    if name == "gaia-eso-dr5":
        return f"08000{number:03d}-6010{number:03d}"
    return str(number + 1000) if name in ("segue-dr12", "lamost-dr11-mrs") else number + 1000


def rows_of(name, case):
    """Rows of the file, by native names."""
    survey = load_survey(name)
    good = dict(case.native)
    for product, column in survey.columns.items():
        if not column.join and product not in survey.extra:
            good[column.sources[0]] = GOOD.get(product, GAIA)
    found = []
    for number in range(len(case.traps) + 1):
        row = dict(good)
        row[survey.columns["ra"].sources[0]] = 40.0 + number
        source = survey.columns["obs_id"]
        if source.join:
            row["TARGETID"] += number
        elif name == "gaia-dr3-rvs":
            row["source_id"] = GAIA + number
        else:
            row[source.sources[0]] = key(name, number)
        if number:
            native, value, *_ = case.traps[number - 1]
            row[native] = value
        found.append(row)
    return [*found, found[0]]


def table_of(rows, units, names):
    table = Table(rows=[{name: row[name] for name in names} for row in rows])
    for name in names:
        if table[name].dtype == np.float64 and name.lower()[-2:] not in ("ra", "ec"):
            table[name] = table[name].astype(np.float32)
        if name in units:
            table[name].unit = units[name]
    return table


def written(folder, case, rows):
    """The file in the format of its survey."""
    path = folder / "native"
    names = list(rows[0])
    if case.kind == "beside":
        hdus = fits.HDUList([fits.PrimaryHDU()])
        for beside in ("RVTAB", "SPTAB", "FIBERMAP", "SCORES", "GAIA"):
            begin = f"{beside}."
            own = [n for n in names if n.startswith(begin) or (beside == "RVTAB" and "." not in n)]
            table = table_of(rows, case.units, own) if own else Table({"X": np.zeros(len(rows))})
            if beside in ("SPTAB", "FIBERMAP"):
                table["TARGETID"] = [row["TARGETID"] for row in rows]
            for column in table.colnames:
                table.rename_column(column, column.removeprefix(begin))
            hdus.append(fits.BinTableHDU(table, name=beside))
        hdus.writeto(path)
        return path
    table = table_of(rows, case.units, names)
    if case.kind in ("csv", "votable"):
        with path.open("w" if case.kind == "csv" else "wb") as file:
            table.write(file, format="ascii.csv" if case.kind == "csv" else "votable")
        return path
    before = [fits.BinTableHDU(table[:0], name="BOSS")] if case.kind == "hdu2.gz" else []
    fits.HDUList([fits.PrimaryHDU(), *before, fits.BinTableHDU(table)]).writeto(path)
    if case.kind.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes(), 1))
    return path


def ingested(folder, name, path, override=None):
    api.ingest(load_survey(name, override), [str(path)], folder / "catalog")
    catalog = Catalog.open(folder / "catalog")
    return sorted((r for p in catalog.pixels for r in catalog.read(p).to_pylist()), key=by_ra)


def by_ra(row):
    return row["ra"]


@pytest.mark.parametrize("name", CASES)
def test_traps_of_a_survey_do_not_get_through(tmp_path, name):
    case, survey = CASES[name], load_survey(name)
    rows = rows_of(name, case)
    found = ingested(tmp_path, name, written(tmp_path, case, rows))
    assert len(found) == len(rows) - 1, "the row that recurs is one"
    for row, (native, value, nulls, cuts) in zip(
        found, [("", 0, (), ()), *case.traps], strict=True
    ):
        wrong = sum(1 << survey.cuts[cut].bit for cut in cuts)
        assert row["quality"] == wrong, (native, value, bin(row["quality"]))
        for product, column in survey.columns.items():
            touched = native in column.sources
            assert (row[product] is None) == (product in nulls), (native, value, product)
            if not touched and product in GOOD:
                assert row[product] == pytest.approx(GOOD[product], rel=1e-6), product
            elif not touched and product.startswith("gaia") and name != "gaia-dr3-rvs":
                assert row[product] == GAIA
        assert row["position_epoch"] == survey.position_epoch


def test_keys_of_desi_are_those_of_target_survey_and_program(tmp_path):
    case = CASES["desi-mws-dr1"]
    rows = rows_of("desi-mws-dr1", case)[:2]
    rows[1] |= {"TARGETID": rows[0]["TARGETID"], "TARGET_RA": 40.0, "PROGRAM": "backup"}
    found = ingested(tmp_path, "desi-mws-dr1", written(tmp_path, case, rows))
    begin = f"{rows[0]['TARGETID']}.main"
    assert {row["obs_id"] for row in found} == {f"{begin}.bright", f"{begin}.backup"}


@pytest.mark.parametrize("name", CASES)
def test_a_file_without_a_column_is_refused_by_its_name(tmp_path, name):
    case, survey = CASES[name], load_survey(name)
    rows = rows_of(name, case)
    gone = survey.columns["teff"].sources[0]
    rows = [{name: value for name, value in row.items() if name != gone} for row in rows]
    with pytest.raises(SurveyError, match=f"no column '{gone}', which 'teff' is made from"):
        ingested(tmp_path, name, written(tmp_path, case, rows))


@pytest.mark.parametrize("theirs", ["source_id", "gaia_dr2_source_id"])
def test_an_id_that_may_be_of_another_gaia_release_is_not_taken(tmp_path, theirs):
    """RAVE's tables of matches call the ids of Gaia DR2 and EDR3 alike."""
    case = CASES["rave-dr6"]
    rows = rows_of("rave-dr6", case)
    for row in rows[:-1]:
        row[theirs] = row.pop("gaiaedr3_source_id")
    path = written(tmp_path, case, rows)
    with pytest.raises(SurveyError, match="no column 'gaiaedr3_source_id' or"):
        ingested(tmp_path, "rave-dr6", path)
    found = ingested(tmp_path, "rave-dr6", path, {"columns": {"gaia_dr3_source_id": False}})
    assert len(found) == len(rows) - 1 and "gaia_dr3_source_id" not in found[0]


def test_the_short_forms_of_gaia_eso_are_read(tmp_path):
    case = CASES["gaia-eso-dr5"]
    rows = rows_of("gaia-eso-dr5", case)
    for row in rows[:-1]:
        row |= {"OBJECT": row.pop("CNAME"), "DEC": row.pop("DECLINATION")}
    found = ingested(tmp_path, "gaia-eso-dr5", written(tmp_path, case, rows))
    assert found[0]["dec"] == -5.0 and found[0]["obs_id"] == key("gaia-eso-dr5", 0)
    assert "gaia_dr3_source_id" not in found[0], "its release is not known"


def test_tables_of_desi_that_do_not_belong_together_are_refused(tmp_path):
    case = CASES["desi-mws-dr1"]
    path = written(tmp_path, case, rows_of("desi-mws-dr1", case))
    with fits.open(path) as hdus:
        hdus["FIBERMAP"].data["TARGETID"][:2] = hdus["FIBERMAP"].data["TARGETID"][1::-1]
        hdus.writeto(tmp_path / "moved")
    with pytest.raises(SurveyError, match=r"row 0: 'TARGETID' is .*, 'FIBERMAP.TARGETID' is"):
        ingested(tmp_path, "desi-mws-dr1", tmp_path / "moved")
    with fits.open(path) as hdus:
        hdus["GAIA"].data = hdus["GAIA"].data[:-1]
        hdus.writeto(tmp_path / "shorter")
    with pytest.raises(SurveyError, match=r"HDU 5 'GAIA' .* do not belong together"):
        ingested(tmp_path, "desi-mws-dr1", tmp_path / "shorter")
