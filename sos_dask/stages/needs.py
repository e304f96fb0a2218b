"""Memory that a stage needs for a partition: what does not fit is refused before it starts."""

from __future__ import annotations

from sos_dask.run.cluster import Cluster
from sos_dask.storage.catalog import Catalog

# Measured with partitions of 68,000 to 929,000 rows, in processes of their own and in workers of a
# rebuild, and a tenth more: MiB of a worker's process in a stage, and what it holds at its peak
# beside that, in bytes of its partition. Compiled loops are 115 MiB, 165 where they are compiled.
_NEEDS = {
    "ingest": (280, 5.0),
    "dedupe": (320, 4.0),
    "crossmatch": (280, 4.0),
    "coverage": (290, 3.5),
    "apply": (260, 5.5),
}
_OTHER_NEEDS = (290, 6.0)


def require_memory(cluster: Cluster, catalog: Catalog, step: str, model_bytes: int = 0) -> None:
    """Refuse a stage whose largest partition does not fit into a worker.

    Parameters
    ----------
    step : str
        The stage.
    model_bytes : int
        What every worker holds beside its partition.

    Raises
    ------
    ClusterError
        Naming the partition, what it needs and what a worker has.
    """
    if not catalog.pixels or cluster.memory_limit_bytes is None:
        return
    pixel, n_bytes = catalog.largest_partition()
    what = f"partition {pixel} of {catalog.path} ({catalog.partition_rows(pixel):,} rows)"
    cluster.require_memory(needed_bytes(step, n_bytes) + model_bytes, f"{step}: {what}")


def needed_bytes(step: str, n_bytes: int) -> int:
    """What a worker needs in a stage for a partition of so many bytes."""
    process_mib, copies = _NEEDS.get(step, _OTHER_NEEDS)
    return int((process_mib << 20) + copies * n_bytes)
