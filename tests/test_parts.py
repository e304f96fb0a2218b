"""Parts of a stage and their records."""

import pytest

from sos_dask.errors import StorageError
from sos_dask.run.cluster import Cluster, silent
from sos_dask.stages.base import Run
from sos_dask.storage.artifact import Output
from sos_dask.storage.manifest import Recipe


def test_a_missing_record_is_an_error_not_an_empty_product(tmp_path):
    output = Output.prepare(tmp_path / "out", Recipe("dedupe", 1, {}, {}))
    run = Run(output, Cluster(), silent)
    output.put_record("stars", "0-1", {"rows": 3})
    assert run.finished("stars", ["0-1"])
    assert run.records("stars", ["0-1"]) == [{"rows": 3}]
    assert not run.finished("stars", ["0-1", "0-2"])
    with pytest.raises(StorageError, match="'stars/0-2' of a finished part is missing"):
        run.records("stars", ["0-1", "0-2"])
