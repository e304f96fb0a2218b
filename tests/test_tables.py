"""Tables in memory, corrected in one line as a catalog is."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from astropy import units as u
from astropy.table import MaskedColumn, QTable, Table
from astropy.utils.masked import Masked

from sos_dask import Correction, tables
from sos_dask.corrections.estimators import Polynomial
from sos_dask.errors import ConfigError, ModelError
from sos_dask.storage.catalog import Catalog
from tests.corrections.pairs import biased_pairs
from tests.steps import apply

NEW = ["teff_sos", "logg_sos", "feh_sos", "teff_delta", "logg_delta", "feh_delta"]
ERRORS = ["teff_sos_err", "logg_sos_err", "feh_sos_err"]
CHOSEN = ["teff", "logg", "feh", "snr", "quality"]


@pytest.fixture(scope="module")
def rows(current) -> pa.Table:
    """Observations, some without Teff."""
    catalog = Catalog.open(current / "lamost.observations")
    return pa.concat_tables([catalog.read(pixel) for pixel in catalog.pixels])


@pytest.fixture(scope="module")
def correction(current) -> Correction:
    return Correction.load(current / "lamost.model.polynomial")


@pytest.fixture(scope="module")
def expected(rows, correction) -> pa.Table:
    return correction.correct(rows)


def same(found: pa.Table, expected: pa.Table) -> None:
    for name in [*NEW, "flag_sos"]:
        assert found[name].to_pylist() == expected[name].to_pylist(), name


@pytest.mark.parametrize("with_errors", [True, False])
def test_a_table_is_corrected_as_a_catalog_is(current, rows, tmp_path, monkeypatch, with_errors):
    monkeypatch.setattr(tables, "_ROWS_AT_ONCE", 700)
    model = current / "lamost.model.polynomial"
    errors = current / "lamost.uncertainty" if with_errors else None
    apply(model, Catalog.open(current / "lamost.observations"), tmp_path / "out", errors=errors)
    written = Catalog.open(tmp_path / "out")
    expected = pa.concat_tables([written.read(pixel) for pixel in written.pixels])
    found = Correction.load(str(model), errors).correct(rows)
    assert found.equals(expected)
    for name in [*NEW, *(ERRORS if errors else ()), "flag_sos"]:
        assert found.schema.field(name).equals(expected.schema.field(name), check_metadata=True)


def test_errors_are_those_of_the_model(current, correction, tmp_path):
    x = pd.DataFrame(biased_pairs(200).features, columns=["teff", "logg", "feh"])
    problem, snr = correction.model.problem, np.arange(1, 201)
    other = Polynomial(order=1, problem=problem).fit(x.assign(snr=snr), x.to_numpy())
    other.correction_.save(tmp_path / "other")
    with pytest.raises(ModelError, match="the error model was made for another correction"):
        Correction.load(tmp_path / "other", current / "lamost.uncertainty")
    Polynomial(order=1).fit(x, x["teff"]).correction_.save(tmp_path / "one")
    with pytest.raises(
        ModelError, match=r"has errors of teff, logg, feh by .* correction is of teff"
    ):
        Correction.load(tmp_path / "one", current / "lamost.uncertainty")


def test_pandas(rows, correction, expected):
    frame = rows.select(CHOSEN).to_pandas().set_index(pd.Index(np.arange(len(rows)) // 2))
    found = correction.correct(frame)
    assert isinstance(found, pd.DataFrame) and found.index.equals(frame.index)
    assert list(found) == [*CHOSEN, *NEW, "flag_sos"]
    pd.testing.assert_frame_equal(found[CHOSEN], frame)
    same(pa.Table.from_pandas(found, preserve_index=False), expected)
    assert found["teff_sos"].dtype == np.float32 and found["flag_sos"].dtype == np.int32
    nullable = correction.correct(frame.convert_dtypes())
    same(pa.Table.from_pandas(nullable, preserve_index=False), expected)


@pytest.mark.parametrize("kind", [Table, QTable])
def test_astropy_with_units_and_masks(rows, correction, expected, kind):
    table = kind({name: rows[name].to_numpy() for name in CHOSEN[1:]})
    teff = rows["teff"].to_numpy()
    is_null = np.isnan(teff)
    assert is_null.any()
    kilo = np.where(is_null, 5.0, teff.astype(float) / 1000)
    if kind is QTable:
        table["teff"] = Masked(kilo * u.kK, mask=is_null)
        table["logg"] = table["logg"] * u.dex(u.cm / u.s**2)
    else:
        # As a FITS file has it.
        table["teff"] = MaskedColumn(kilo.astype(">f8"), mask=is_null, unit="kK")
    found = correction.correct(table)
    assert type(found) is kind and "teff_sos" not in table.colnames
    assert found["teff"].unit == u.kK
    assert found["teff_sos"].unit == found["teff_delta"].unit == u.K
    assert found["teff_sos"].info.description == "corrected teff"
    for name in NEW:
        masked = np.asarray(found[name].mask)
        values = np.asarray(getattr(found[name], "unmasked", found[name]))
        np.testing.assert_array_equal(masked, ~np.isfinite(expected[name].to_numpy()))
        np.testing.assert_allclose(
            values[~masked], expected[name].drop_null(), rtol=1e-6, atol=1e-4
        )
    np.testing.assert_array_equal(found["flag_sos"], expected["flag_sos"].to_numpy())


def test_again_is_the_same(rows, correction, expected):
    assert correction.correct(expected).equals(expected)
    frame = correction.correct(rows.select(CHOSEN).to_pandas())
    pd.testing.assert_frame_equal(correction.correct(frame), frame)
    table = correction.correct(Table.from_pandas(frame))
    assert correction.correct(table).colnames == table.colnames


def test_no_rows(correction, rows):
    none = rows.slice(0, 0)
    for table in (none, none.to_pandas(), Table({name: np.empty(0) for name in CHOSEN})):
        found = correction.correct(table)
        assert len(found) == 0 and len(found["teff_sos"]) == 0


def test_what_was_fitted_here_corrects():
    batch = biased_pairs(500)
    frame = pd.DataFrame(batch.features, columns=["teff", "logg", "feh"])
    differences = pd.DataFrame({"teff_diff": batch.differences[:, 0]})
    estimator = Polynomial(order=2).fit(frame, differences)
    found = Correction(estimator.correction_).correct(frame)
    expected = frame["teff"] - estimator.predict(frame)[:, 0].astype(np.float32)
    np.testing.assert_array_equal(found["teff_sos"], expected)


LABELS = {"teff": [5000.0, 4800.0], "logg": [3.0, 2.0], "feh": [0.0, -1.0], "snr": [50, 90]}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (LABELS, "builtins.dict is no table .*\n.*astropy Table, a pandas DataFrame or a pyarrow"),
        (pa.table({**LABELS, "feh": ["a", "b"]}), "'feh' contains no numbers, .* type string"),
        (pd.DataFrame({**LABELS, "feh": ["1", 2]}), "column 'feh' contains no numbers"),
        (pd.DataFrame({**LABELS, "feh": [True, False]}), "'feh' contains no numbers, .* type bool"),
        (Table({**LABELS, "feh": ["a", "b"]}), "'feh' contains no numbers, .* type string"),
        (Table({**LABELS, "feh": [[1, 2], [1, 2]]}), "column 'feh' contains no numbers"),
        (pd.DataFrame(LABELS).rename(columns={"teff": "T_eff"}), "no column 'teff'.*\n.*T_eff"),
        (pa.table({"teff": [1.0]}), "no column 'logg': this is a correction of teff, logg, feh by"),
        (pd.concat([pd.DataFrame(LABELS)] * 2, axis=1), "two columns 'teff'"),
        (QTable({**LABELS, "teff": [5, 6] * u.m}), "'teff' cannot be converted to K: 'm'"),
        (Table({**LABELS, "teff": MaskedColumn([1, 2], unit="Kelvins")}), "converted to K: .*Kelv"),
    ],
)
def test_tables_that_cannot_be_corrected(correction, table, message):
    with pytest.raises(ConfigError, match=message):
        correction.correct(table)


@pytest.mark.parametrize(
    "table",
    [
        pa.table({**LABELS, "feh": pa.nulls(2)}),
        pd.DataFrame({**LABELS, "feh": [None, None]}),
        Table({**LABELS, "feh": MaskedColumn([0.0, 0.0], mask=True)}),
    ],
)
def test_a_column_without_any_value(correction, table):
    found = correction.correct(table)
    assert np.asarray(found["flag_sos"]).tolist() == [1, 1]
    assert not np.isfinite(np.ma.filled(np.ma.array(found["teff_sos"]), np.nan)).any()


def test_models_that_are_none(current, tmp_path):
    with pytest.raises(ModelError, match="A model is a directory"):
        Correction.load(current)
    Correction.load(current / "lamost.model.polynomial").model.save(tmp_path)
    text = (tmp_path / "model.json").read_text()
    (tmp_path / "model.json").write_text(text.replace('"order": 4', '"order": 3'))
    with pytest.raises(ModelError, match="was changed after the model was saved"):
        Correction.load(tmp_path)
