"""Parts of a stage: finished ones are skipped; a catalog of all is committed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import pyarrow as pa

from sos_dask.errors import StorageError, SurveyError
from sos_dask.run.cluster import Cluster, Report
from sos_dask.sky.healpix import HealpixPixel
from sos_dask.storage.artifact import FileRecord, Manifest, Output, Rows
from sos_dask.storage.catalog import write_catalog_metadata

T = TypeVar("T")


def key_of(pixel: HealpixPixel) -> str:
    """Name of a partition's record."""
    return f"{pixel.order}-{pixel.pixel}"


def run_parts(
    output: Output,
    kind: str,
    parts: Mapping[str, T],
    function: Callable[[T], None],
    cluster: Cluster,
    step: str,
    report: Report,
) -> None:
    """Run ``function`` on the parts without a sound record; it writes that of its part last."""
    missing = [part for key, part in parts.items() if not output.intact(kind, key)]
    if missing:
        cluster.run(function, missing, step, report)
    else:
        report(step, len(parts), len(parts))


def finished(output: Output, kind: str, keys: Sequence[str]) -> bool:
    """Whether all parts have a record."""
    return all(output.get_record(kind, key) is not None for key in keys)


def records(output: Output, kind: str, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Records of all parts in order.

    Raises
    ------
    StorageError
        One is missing: it was removed meanwhile, or the workers run another version.
    """
    found = []
    for key in keys:
        record = output.get_record(kind, key)
        if record is None:
            raise StorageError(
                f"{output.work}: the record '{kind}/{key}' of a finished part is missing",
                "Run again; driver and workers must run the same version.",
            )
        found.append(record)
    return found


@contextmanager
def unless_complete(output: Output) -> Iterator[None]:
    """Ignore an error that came only because another process completed the same output.

    A run that failed before it made anything leaves no trace of itself; nor does one whose survey
    files were refused, since what was made of them is of no use.
    """
    try:
        yield
    except SurveyError:
        if not output.complete:
            output.discard()
            raise
        output.tidy()
    except Exception:
        if not output.complete:
            output.release()
            raise
        output.tidy()


def file_of(record: Mapping[str, Any]) -> FileRecord:
    """The `FileRecord` inside a part's record."""
    return FileRecord(**record["file"])


def commit_catalog(
    output: Output,
    name: str,
    parts: Sequence[tuple[HealpixPixel, Mapping[str, Any]]],
    schema: pa.Schema,
    rows: Rows,
    summary: Mapping[str, Any],
    extra_files: Sequence[FileRecord] = (),
    properties: Mapping[str, str] | None = None,
    catalog_type: str = "object",
) -> Manifest:
    """Write a catalog's own files and its manifest; partitions without rows are left out."""
    kept = [(pixel, record) for pixel, record in parts if record["file"] is not None]
    files = [file_of(record) for _, record in kept]
    metadata = write_catalog_metadata(
        output,
        name,
        [pixel for pixel, _ in kept],
        schema,
        sum(record.rows for record in files),
        catalog_type=catalog_type,
        extra=properties,
    )
    return output.commit(rows, (*files, *metadata, *extra_files), summary)
