"""Pairs that cannot serve, or hardly, through training, comparison, errors and correction."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from sos_dask.api import train
from sos_dask.errors import ModelError
from sos_dask.stages.compare import CompareSettings
from sos_dask.stages.train import TrainSettings
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import Manifest
from tests.skies import observations, write_catalog
from tests.steps import apply, compare, uncertainty

FEW = CompareSettings(n_bootstrap=100, min_bin_pairs=20)
PARAMS = {"polynomial": {"order": 2}, "boosted": {"n_rounds": 5}, "hybrid": {"n_rounds": 5}}


@pytest.fixture(scope="module")
def pairs(small_store) -> pa.Table:
    catalog = Catalog.open(small_store / "current" / "lamost.pairs")
    table = pa.concat_tables([catalog.read(pixel) for pixel in catalog.pixels])
    return table.filter(table["use"])


def put(table: pa.Table, name: str, values: pa.Array | np.ndarray) -> pa.Table:
    place = table.schema.get_field_index(name)
    kind = table.schema.field(place)
    return table.set_column(place, kind, pa.array(values).cast(kind.type))


def same(table: pa.Table, name: str, value: object) -> pa.Table:
    return put(table, name, pa.array([value] * table.num_rows))


def with_gaps(table: pa.Table, value: float, first: int = 0) -> pa.Table:
    """Every tenth Teff is no number."""
    teff = pc.fill_null(table["teff"], np.nan).to_numpy().copy()
    teff[first::10] = value
    return put(table, "teff", teff)


def trained(table: pa.Table, folder: Path) -> tuple[Catalog, Path]:
    """A hybrid: it trains a polynomial and trees."""
    catalog = write_catalog(table, folder / "pairs", 1000)
    train(catalog, folder / "model", TrainSettings(method="hybrid", params=PARAMS["hybrid"]))
    return catalog, folder / "model"


@pytest.mark.parametrize("method", PARAMS)
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.slice(0, 0), "0 pairs are fit for training, in 0 folds"),
        (lambda t: same(t, "use", False), "0 pairs are fit for training, in 0 folds"),
        (
            lambda t: t.slice(0, 0),
            "value of target and reference in teff or logg or feh",
        ),
        (lambda t: same(t, "fold", 0), "At least two folds are needed"),
        (lambda t: t.slice(0, 9), r"training pairs .* and there are \d\b"),
        (
            lambda t: same(t, "logg_diff", None),
            "column 'logg_diff' has a value that can be used in 0 of 772 pairs",
        ),
        (
            lambda t: same(t, "teff", float("nan")),
            "column 'teff' has a value that can be used in 0 of 772 pairs",
        ),
    ],
)
def test_pairs_that_cannot_train(
    pairs: pa.Table,
    tmp_path: Path,
    method: str,
    spoil: Callable[[pa.Table], pa.Table],
    message: str,
) -> None:
    catalog = write_catalog(spoil(pairs), tmp_path / "pairs", 1000)
    with pytest.raises(ModelError, match=message):
        train(catalog, tmp_path / "model", TrainSettings(method=method, params=PARAMS[method]))
    assert not (tmp_path / "model").exists(), "nothing is left of a run that made nothing"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: with_gaps(with_gaps(t, float("nan")), float("inf"), 5),
        lambda t: same(t, "feh", -0.1),
        lambda t: same(t, "feh_diff", 0.1),
        lambda t: put(
            t, "feh_diff", np.where(np.arange(len(t)) % 3, t["feh_diff"].to_numpy(), np.nan)
        ),
        lambda t: same(t.filter(pc.less(t["logg"], 3.5)), "snr", None),
        lambda t: t.drop_columns(["snr"]),
    ],
    ids=["nan and inf", "one feh", "a zero point", "some labels", "giants without snr", "no snr"],
)
def test_pairs_that_can(
    pairs: pa.Table, tmp_path: Path, spoil: Callable[[pa.Table], pa.Table]
) -> None:
    table = spoil(pairs)
    catalog, model = trained(table, tmp_path)
    compared = compare(catalog, {"hybrid": model}, tmp_path / "compared", FEW)
    assert compared.rows.n_out == table.num_rows
    stars = write_catalog(observations(300), tmp_path / "observations")
    finite = np.isfinite(pc.fill_null(table["teff"], np.nan).to_numpy()).sum()
    found: Manifest = uncertainty(model, catalog, tmp_path / "errors")
    assert found.rows.n_out + found.rows.dropped["of several observations"] == finite
    apply(model, stars, tmp_path / "corrected", errors=tmp_path / "errors")
    corrected = Catalog.open(tmp_path / "corrected")
    rows = pa.concat_tables([corrected.read(pixel) for pixel in corrected.pixels])
    for name in ("feh_sos", "feh_sos_err"):
        assert np.isfinite(rows[name].to_numpy()).all()


def test_pairs_of_one_star_are_not_compared(pairs: pa.Table, tmp_path: Path) -> None:
    catalog, model = trained(same(pairs, "reference_star_id", "one"), tmp_path)
    with pytest.raises(ModelError, match="are of about 1 stars: at least 20"):
        compare(catalog, {"hybrid": model}, tmp_path / "compared", FEW)


def test_few_pairs_train_but_have_no_errors(pairs: pa.Table, tmp_path: Path) -> None:
    few = pairs.slice(0, 110)
    catalog = write_catalog(few, tmp_path / "pairs")
    train(
        catalog,
        tmp_path / "model",
        TrainSettings(method="polynomial", params={"order": 1}, validation="holdout"),
    )
    with pytest.raises(ModelError, match="at least 30 are needed to compare"):
        compare(catalog, {"model": tmp_path / "model"}, tmp_path / "compared", FEW)
    with pytest.raises(ModelError, match="errors need 40 held-out pairs"):
        uncertainty(tmp_path / "model", catalog, tmp_path / "errors")
