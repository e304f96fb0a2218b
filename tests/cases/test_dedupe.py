"""Rows that crowd at a place, and stars that move, through the commands."""

import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sos_dask.cli import main
from sos_dask.storage.catalog import Catalog

COLUMNS = ("obs_id", "ra", "dec", "teff", "logg", "feh")
MORE = ("pmra", "pmdec", "position_epoch", "gaia_dr3_source_id")


def run(monkeypatch: Any, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["sos-dask", *map(str, arguments), "--threads", "1"])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code


def deduped(monkeypatch: Any, folder: Path, *options: object, **columns: Any) -> pa.Table:
    """Stars of some rows, by ingest and dedupe."""
    n = len(columns["ra"])
    labels = {"teff": 5000.0 + np.arange(n) % 7, "logg": np.full(n, 2.5), "feh": np.full(n, -0.1)}
    table = {"obs_id": np.arange(n) + 1, **labels, **columns}
    pq.write_table(pa.table(table), folder / "t.parquet")
    lines = [f'{name} = {{ source = "{name}" }}' for name in (*COLUMNS, *MORE) if name in table]
    head = 'format = 1\nname = "t"\ntitle = "t"\nposition_epoch = 2000.0\n[columns]\n'
    (folder / "t.toml").write_text(head + "\n".join(lines))
    made, stars = folder / "o", folder / "d"
    run(monkeypatch, "ingest", folder / "t.toml", folder / "t.parquet", "-o", made, *options)
    run(monkeypatch, "dedupe", made, "-o", stars)
    catalog = Catalog.open(stars)
    return pa.concat_tables([catalog.read(pixel) for pixel in catalog.pixels])


def test_many_rows_at_one_position(monkeypatch, tmp_path):
    """Their pairs alone would take 80 GB; the partition cannot be split."""
    n = 100_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    position = {"ra": np.full(n, 10.0), "dec": np.full(n, 5.0)}
    [star] = deduped(monkeypatch, tmp_path, "--rows-per-partition", 1000, **position).to_pylist()
    assert (star["star_id"], star["n_obs"], star["n_used"]) == (1, n, n)
    assert star["teff"] == pytest.approx(5000 + np.mean(np.arange(n) % 7), rel=1e-6)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KiB


def test_stars_within_the_radius_of_each_other(monkeypatch, tmp_path):
    rng = np.random.default_rng(1)
    n = 10_000
    ra, dec = 10 + rng.normal(0, 1e-4, n), 5 + rng.normal(0, 1e-4, n)
    ids = rng.permutation(np.arange(n) // 2 + 1)
    stars = deduped(monkeypatch, tmp_path, ra=ra, dec=dec, gaia_dr3_source_id=ids)
    assert stars["n_obs"].to_pylist() == [2] * (n // 2)
    assert len(set(stars["gaia_dr3_source_id"].to_pylist())) == n // 2


@pytest.mark.parametrize(
    ("pmdec", "epoch", "dec", "n_obs"),
    [
        ([1000.0, 1000.0], [2000.0, 2016.0], 16 / 3600, [2]),
        # One epoch: nothing moves, however fast.
        ([1000.0, -1000.0], [1999.0, 1999.0], 1 / 3600, [2]),
        # A row without a proper motion or an epoch stays where it is.
        ([1000.0, None], [2000.0, 2016.0], 16 / 3600, [2]),
        ([None, 1000.0], [2000.0, 2016.0], 16 / 3600, [1, 1]),
        ([1000.0, 1000.0], [None, 2016.0], 16 / 3600, [1, 1]),
        ([None, None], [2000.0, 2016.0], 1 / 3600, [2]),
        # Two stars that only meet.
        ([1000.0, -1000.0], [2000.0, 2016.0], 0.0, [1, 1]),
    ],
)
@pytest.mark.parametrize("ra", [0.0, 45.0])
def test_a_star_at_two_epochs(monkeypatch, tmp_path, pmdec, epoch, dec, n_obs, ra):
    stars = deduped(
        monkeypatch, tmp_path, ra=[ra, ra], dec=[0.0, dec],
        pmra=[None if pm is None else 0.0 for pm in pmdec], pmdec=pmdec, position_epoch=epoch,
    )  # fmt: skip
    assert stars["n_obs"].to_pylist() == n_obs
    if n_obs == [2]:  # the star stays where its primary row is
        assert (stars["star_id"][0].as_py(), stars["dec"][0].as_py()) == (1, 0.0)
        assert stars["position_epoch"][0].as_py() == epoch[0]
