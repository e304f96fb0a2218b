"""Survey files -> canonical observations; repeats and conflicts of keys; what a file looks like.

Nothing is lost: a value that cannot be is null and counted, and a row without a usable key or
position is in ``rejected`` with its reason.
"""

from sos_dask.ingest.canonical import Batch, Chunk, Quality, plan_chunks, read_chunk
from sos_dask.ingest.histogram import HISTOGRAM_ORDER, histogram_of, partition_edges
from sos_dask.ingest.keys import (
    check_conflicts,
    conflicting_keys,
    holders,
    key_ranges,
    sorted_hashes,
)
from sos_dask.ingest.merge import (
    CONFLICT,
    FILE,
    REJECTED_SCHEMA,
    ROW,
    Merged,
    losing_rows,
    merge_rows,
    rejected_rows,
)
from sos_dask.ingest.profile import Profile, check_profile
from sos_dask.ingest.readers import Source, open_source

__all__ = [
    "CONFLICT", "FILE", "HISTOGRAM_ORDER", "REJECTED_SCHEMA", "ROW", "Batch", "Chunk", "Merged",
    "Profile", "Quality", "Source", "check_conflicts", "check_profile", "conflicting_keys",
    "histogram_of", "holders", "key_ranges", "losing_rows", "merge_rows", "open_source",
    "partition_edges", "plan_chunks", "read_chunk", "rejected_rows", "sorted_hashes",
]  # fmt: skip
