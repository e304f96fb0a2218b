"""The canonical columns, and names of columns."""

import pyarrow as pa
import pytest

from sos_dask.errors import ConfigError
from sos_dask.schema import CANONICAL, HEALPIX, QUALITY, nearest, require_columns
from tests.survey_files import unit_is_known


@pytest.mark.parametrize("column", [*CANONICAL.values(), QUALITY, HEALPIX], ids=lambda c: c.name)
def test_canonical_columns_have_valid_units_and_ucds(column):
    from astropy.io.votable.ucd import parse_ucd

    assert unit_is_known(column.unit)
    assert parse_ucd(column.ucd, check_controlled_vocabulary=True)
    assert column.description
    if column.minimum is not None:
        assert column.minimum < column.maximum


def test_canonical_fields_carry_their_meaning():
    field = CANONICAL["teff"].arrow()
    assert field.type == pa.float32()
    assert field.metadata[b"unit"] == b"K"
    assert field.metadata[b"ucd"] == b"phys.temperature.effective"
    assert b"unit" not in CANONICAL["obs_id"].arrow().metadata
    assert CANONICAL["obs_id"].arrow("string", nullable=False) == pa.field(
        "obs_id", pa.string(), nullable=False
    )


def test_the_nearest_names():
    assert nearest("TEFF_ER", ["teff_err", "ra"]) == "Did you mean teff_err?"
    assert nearest("qqqq", ["teff_err", "ra"]) == ""


def test_require_columns_names_the_column_and_the_nearest():
    schema = pa.schema([("teff", pa.float32()), ("logg", pa.float32())])
    require_columns(schema, ("teff", "logg"), "catalog x")
    with pytest.raises(ConfigError, match="catalog x has no column 'teff_k'") as caught:
        require_columns(schema, ("teff", "teff_k"), "catalog x")
    assert "teff" in caught.value.hint
