"""Trends of a whole store: against the pairs themselves, the injected bias, other partitions."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from sos_dask import corrections as models
from sos_dask.errors import CatalogError, ClusterError
from sos_dask.evidence.trends import CONTRAST_SCHEMA, TREND_SCHEMA
from sos_dask.run.cluster import Cluster
from sos_dask.schema import LABELS
from sos_dask.simulate.surveys import lamost_bias
from sos_dask.stages.compare import Trends, TrendSettings
from sos_dask.stats.numbers import Axis
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import Manifest
from tests.job import contents
from tests.skies import write_catalog
from tests.stages.pairs import column, read, used
from tests.steps import trends

FILES = ("planes.parquet", "references.parquet", "trends.parquet")
FEW = TrendSettings(
    axes=(Axis("teff", 3000.0, 9000.0, 500.0), Axis("logg", 0.0, 5.0, 0.5)),
    n_count_bins=6,
    min_count=5,
)


def rows(path: Path, **wanted) -> pa.Table:
    table = pq.read_table(path)
    for name, value in wanted.items():
        table = table.filter(pc.equal(table[name], value))
    return table


def run(build: Path, directory: Path, pairs: Catalog, **more) -> dict[str, str]:
    """Trends of some pairs with the models and references of a build; the files' hashes."""
    names = ("apogee", "galah")
    trends(
        pairs,
        directory,
        FEW,
        reference=Catalog.open(build / "reference"),
        stars={name: Catalog.open(build / f"{name}.stars") for name in names},
        **more,
    )
    found = contents(directory)
    del found["manifest.json"]
    return found


def test_a_rebuild_makes_the_trends(build):
    directory = build / "lamost.trends"
    manifest = Manifest.load(directory)
    assert {record.path for record in manifest.files} == set(FILES)
    assert set(manifest.recipe.inputs) == {
        "evidence", "reference", "stars.apogee", "stars.galah",
    }  # fmt: skip
    pairs = used(build)
    assert manifest.rows.n_out == pairs.num_rows
    assert sum(manifest.summary["surveys"].values()) == pairs.num_rows
    table = pq.read_table(directory / "trends.parquet")
    assert table.schema.remove_metadata() == TREND_SCHEMA
    assert set(table["sample"].to_pylist()) == {"before", "after", "fitted"}
    assert {"teff", "logg", "feh", "snr", "phot_g_mean_mag"} <= set(table["against"].to_pylist())


@pytest.mark.parametrize("subset", ["all", "apogee", "galah"])
@pytest.mark.parametrize(("label", "against"), [("teff", "logg"), ("feh", "snr")])
def test_trends_are_the_medians_of_the_pairs(build, label, against, subset):
    pairs = used(build)
    if subset != "all":
        pairs = pairs.filter(pc.equal(pairs["survey_ref"], subset))
    x, y = column(pairs, against), column(pairs, f"{label}_diff")
    for binning in ("equal-width", "equal-count"):
        found = rows(
            build / "lamost.trends" / "trends.parquet", label=label, against=against, subset=subset,
            sample="before", binning=binning,
        ).to_pylist()  # fmt: skip
        assert sum(row["n"] for row in found) > 0
        for row in found:
            last = row["bin"] == len(found) - 1
            inside = y[(x >= row["low"]) & ((x < row["high"]) | (last & (x == row["high"])))]
            assert row["n"] == len(inside)
            assert row["method"] is None
            if len(inside):
                wanted = np.percentile(inside, [16, 50, 84]).tolist()
                assert [row["p16"], row["median"], row["p84"]] == wanted


def test_trends_after_the_correction_are_those_of_held_out_pairs(build):
    held_out = pq.read_table(build / "lamost.model.polynomial" / "held_out.parquet")
    x = column(held_out, "x_logg")
    for label in LABELS:
        y = column(held_out, f"{label}_diff") - column(held_out, f"{label}_delta")
        found = rows(
            build / "lamost.trends" / "trends.parquet", label=label, against="logg", subset="all",
            sample="after", binning="equal-width", method="polynomial",
        ).to_pylist()  # fmt: skip
        assert sum(row["n"] for row in found) == np.isfinite(y).sum()
        for row in found:
            inside = y[(x >= row["low"]) & (x < row["high"])]
            assert row["n"] == len(inside)
            if len(inside):
                assert row["median"] == pytest.approx(np.median(inside), abs=1e-9)


def test_the_trend_is_the_injected_bias(build):
    pairs = used(build)
    pairs = pairs.filter(pc.equal(pairs["survey_ref"], "apogee"))  # has no bias of its own
    truth = [column(pairs, f"{label}_ref") for label in LABELS]
    injected = lamost_bias(*truth)
    for number, label in enumerate(LABELS):
        for against in ("teff", "logg", "feh"):
            x = column(pairs, against)
            found = [
                row
                for row in rows(
                    build / "lamost.trends" / "trends.parquet", label=label, against=against,
                    subset="apogee", sample="before", binning="equal-count",
                ).to_pylist()
                if row["n"] >= 12
            ]  # fmt: skip
            assert len(found) >= 5
            wanted = [
                np.median(injected[(x >= row["low"]) & (x < row["high"]), number]) for row in found
            ]
            medians = np.array([row["median"] for row in found])
            errors = np.array([row["error"] for row in found])
            far = np.abs(medians - wanted) / errors
            assert np.median(far) < 1.5
            assert (far < 6).all()
        # The bias is seen, and is gone after the correction.
        chi2 = {
            sample: np.sum(
                [
                    (row["median"] / row["error"]) ** 2
                    for row in rows(
                        build / "lamost.trends" / "trends.parquet", label=label, against="teff",
                        subset="all", sample=sample, binning="equal-count",
                    ).to_pylist()
                    if row["n"] >= 12
                ]
            )
            for sample in ("before", "after")
        }  # fmt: skip
        assert chi2["before"] > 3 * chi2["after"]


def test_fitted_pairs_are_those_that_trained_the_model(build):
    model = models.load(build / "lamost.model.polynomial")
    pairs = used(build)
    if model.info.train_folds is not None:
        pairs = pairs.filter(pc.is_in(pairs["fold"], pa.array(model.info.train_folds, pa.int8())))
    x = model.problem.matrix(pairs)
    left = column(pairs, "logg_diff") - model.predict(x)[:, 1]
    found = rows(
        build / "lamost.trends" / "trends.parquet", label="logg", against="teff", sample="fitted",
        subset="all", binning="equal-width", method="polynomial",
    ).to_pylist()  # fmt: skip
    assert sum(row["n"] for row in found) == len(left) > 100
    for row in found:
        inside = left[(x[:, 0] * 5040 >= row["low"]) & (x[:, 0] * 5040 < row["high"])]
        if row["n"] == len(inside) > 0:  # rounding of Teff / 5040 K may move one over an edge
            assert row["median"] == pytest.approx(np.median(inside), abs=1e-6)


def test_partitions_and_workers_change_no_byte(build, cluster, tmp_path):
    pairs = Catalog.open(build / "lamost.pairs")
    table = read(pairs.path)
    found = run(build, tmp_path / "a", pairs)
    assert len(found) == len(FILES)
    whole = write_catalog(table, tmp_path / "whole")
    pieces = write_catalog(table, tmp_path / "pieces", 40)
    assert len(whole.pixels) <= len(pairs.pixels) < len(pieces.pixels)
    assert run(build, tmp_path / "b", whole) == found
    assert run(build, tmp_path / "c", pieces, cluster=cluster) == found


def test_common_stars_are_compared_on_the_zero_points_of_the_reference(build, tmp_path):
    run(build, tmp_path / "out", Catalog.open(build / "lamost.pairs"))
    reference = Catalog.open(build / "reference")
    assert reference.manifest is not None
    offsets = reference.manifest.summary["offsets"]
    stars = {}
    for name in ("apogee", "galah"):
        catalog = Catalog.open(build / f"{name}.stars")
        for pixel in catalog.pixels:
            for row in catalog.read(pixel).to_pylist():
                if row["quality"] == 0:
                    stars[f"{name}:{row['star_id']}"] = row
    differences = []
    for pixel in reference.pixels:
        for row in reference.read(pixel, ["sources"])["sources"].to_pylist():
            members: dict[str, dict] = {}
            for source in row.split(";"):
                if source in stars:
                    members.setdefault(source.split(":")[0], stars[source])
            if len(members) == 2 and members["apogee"]["logg"] is not None:
                shift = offsets.get("galah", {}).get("feh", 0.0)
                x, values = members["apogee"]["logg"], [m["feh"] for m in members.values()]
                if None not in values:
                    new = members["galah"]["feh"] - shift - members["apogee"]["feh"]
                    differences.append((x, new))
    x, y = np.array(differences).T
    found = rows(
        tmp_path / "out" / "references.parquet", label="feh", against="logg", binning="equal-width"
    ).to_pylist()
    assert sum(row["n_common"] for row in found) == ((x >= 0) & (x <= 5)).sum() > 20
    for row in found:
        inside = y[(x >= row["low"]) & (x < row["high"])]
        assert row["n_common"] == len(inside)
        if len(inside):
            assert row["median_common"] == pytest.approx(np.median(inside), abs=1e-6)
    summary = Manifest.load(tmp_path / "out").summary
    kinds = {(a["first"], a["second"], a["by"]) for a in summary["agreements"]}
    assert kinds == {("apogee", "galah", "target"), ("apogee", "galah", "common")}
    # One number a star: both agree with the tables.
    assert summary["common_stars"] >= len(x)


def test_the_order_says_whose_difference_it_is(build, tmp_path):
    pairs = Catalog.open(build / "lamost.pairs")
    made = []
    for order in (("apogee", "galah"), ("galah",)):
        directory = tmp_path / order[0]
        trends(pairs, directory, FEW.but(order=order))
        made.append(rows(directory / "references.parquet", label="teff", against="logg"))
    assert set(made[1]["first"].to_pylist()) == {"galah"}
    one, other = (column(table, "difference") for table in made)
    assert np.isfinite(one).any()
    np.testing.assert_array_equal(one, -other)


def test_pairs_without_surveys_magnitudes_or_references(build, tmp_path):
    pairs = Catalog.open(build / "lamost.pairs")
    table = read(pairs.path)
    bare = write_catalog(table.drop_columns(["survey_ref", "logg_ref", "snr"]), tmp_path / "pairs")
    manifest = trends(bare, tmp_path / "out")
    assert manifest.summary["surveys"] == {} and manifest.summary["agreements"] == []
    assert pq.read_schema(tmp_path / "out" / "references.parquet") == CONTRAST_SCHEMA
    made = pq.read_table(tmp_path / "out" / "trends.parquet")
    assert set(made["subset"].to_pylist()) == {"all"}
    assert "snr" not in made["against"].to_pylist()
    none = write_catalog(table.slice(0, 0), tmp_path / "none")
    assert trends(none, tmp_path / "nothing").rows.n_out == 0
    lacking = write_catalog(table.drop_columns(["feh_diff"]), tmp_path / "lacking")
    with pytest.raises(CatalogError, match="feh_diff"):
        trends(lacking, tmp_path / "refused")


def test_a_model_of_other_pairs_is_refused_and_leaves_nothing(build, tmp_path):
    pairs = Catalog.open(build / "lamost.pairs")
    table = read(pairs.path)
    other = write_catalog(table.slice(3), tmp_path / "other")
    models = {"polynomial": build / "lamost.model.polynomial"}
    with pytest.raises(CatalogError, match="does not hold the pairs"):
        trends(other, tmp_path / "out", FEW, models=models)
    run(build, tmp_path / "good", pairs, models=models)


def test_more_pairs_than_a_worker_holds_are_refused(build, tmp_path):
    class Small(Cluster):
        @property
        def memory_limit_bytes(self) -> int | None:
            return 100 << 20

    with pytest.raises(ClusterError, match=r"evidence: .* pairs of"):
        trends(Catalog.open(build / "lamost.pairs"), tmp_path / "out", FEW, cluster=Small())
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_stopped_run_goes_on(build, tmp_path, monkeypatch):
    pairs = Catalog.open(build / "lamost.pairs")
    whole = run(build, tmp_path / "whole", pairs)
    done: list[str] = []
    part = Trends.trends_of

    stop_after = 2

    def stopping(self, output, key, axes):
        if len(done) == stop_after:
            raise KeyboardInterrupt
        done.append(key)
        return part(self, output, key, axes)

    monkeypatch.setattr(Trends, "trends_of", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(build, tmp_path / "out", pairs)
    assert not (tmp_path / "out" / "manifest.json").exists()
    finished = list(done)
    stop_after = 99
    assert run(build, tmp_path / "out", pairs) == whole
    assert len(done) == len(set(done)) and done[:2] == finished
    before = len(done)
    run(build, tmp_path / "out", pairs)
    assert len(done) == before
