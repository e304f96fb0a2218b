"""Parts of a stage and their records."""

from typing import Any

import pytest

from sos_dask.errors import ClusterError, StorageError
from sos_dask.run.cluster import Cluster, silent
from sos_dask.stages.base import Run
from sos_dask.stages.dedupe import Dedupe
from sos_dask.stars.group import DedupeSettings
from sos_dask.storage.artifact import Output
from sos_dask.storage.manifest import Recipe
from tests.sky import observations, write_catalog


def test_a_run_that_is_refused_leaves_no_claim(tmp_path):
    class Small(Cluster):
        @property
        def memory_limit_bytes(self) -> int:
            return 1 << 20

    catalog = write_catalog(observations(500), tmp_path / "obs")
    out = tmp_path / "stars"
    with pytest.raises(ClusterError, match="dedupe: partition"):
        Dedupe({"observations": catalog}).run(out, cluster=Small())
    assert not out.exists()
    made = Dedupe({"observations": catalog}, DedupeSettings(max_spread=2.0)).run(out)
    assert made.rows.n_in == 500


def _part(output: Output, key: str, item: int) -> dict[str, int]:
    return {"rows": item}


def test_a_missing_record_is_an_error_not_an_empty_product(tmp_path):
    class Forgetful(Cluster):
        def run(self, *arguments: Any) -> list[Any]:
            return []

    output = Output.prepare(tmp_path / "out", Recipe("dedupe", 1, {}, {}))
    assert Run(output, Cluster(), silent).parts("stars", {"0-1": 3}, _part) == [{"rows": 3}]
    run = Run(output, Forgetful(), silent)
    assert run.parts("stars", {"0-1": 4}, _part) == [{"rows": 3}], "made before"
    with pytest.raises(StorageError, match="'stars/0-2' of a finished part is missing"):
        run.parts("stars", {"0-1": 3, "0-2": 5}, _part)
