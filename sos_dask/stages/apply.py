"""Stage apply: the correction of every target observation, partition by partition."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import pyarrow.compute as pc

from sos_dask import models
from sos_dask.artifact import Manifest, Output, Recipe, Rows, sha256_of_file
from sos_dask.catalog import Catalog, write_partition
from sos_dask.cluster import Cluster, Report, silent
from sos_dask.correct import FLAG_MEANINGS, correct, corrected_schema
from sos_dask.errors import ConfigError
from sos_dask.healpix import HealpixPixel
from sos_dask.schema import LABELS
from sos_dask.stages.parts import (
    commit_catalog,
    key_of,
    records,
    require_memory,
    run_parts,
    unless_complete,
)
from sos_dask.uncertainty import ErrorModel, load_errors

VERSION = 2


@dataclass(frozen=True)
class _Part:
    output: Output
    catalog: Catalog
    pixel: HealpixPixel
    model: str
    model_fingerprint: str
    errors: str | None


def parse_partitions(text: str, pixels: Sequence[HealpixPixel]) -> list[int]:
    """Which partitions a text names.

    Parameters
    ----------
    text : str
        ``all``; a shard ``i/N`` (i from 1 to N: partitions i, i+N, ...); indices and ranges
        ``0-9,12``; HEALPix pixels ``2:44``, each meaning all partitions inside it or around it.
    pixels : sequence of HealpixPixel
        Partitions of the catalog, in its order.

    Returns
    -------
    list of int
        Sorted indices.

    Raises
    ------
    ConfigError
        Bad syntax, an index or a pixel that the catalog does not have.
    """
    text = text.strip()
    if text == "all":
        return list(range(len(pixels)))
    if shard := re.fullmatch(r"(\d+)/(\d+)", text):
        number, total = int(shard[1]), int(shard[2])
        if not 1 <= number <= total:
            raise ConfigError(
                f"--partitions {text}: there is no shard {number} of {total}",
                f"Shards are counted from 1/{max(total, 1)} to {max(total, 1)}/{max(total, 1)}.",
            )
        return list(range(number - 1, len(pixels), total))
    chosen: set[int] = set()
    for item in text.split(","):
        item = item.strip()
        if ":" in item:
            pixel = HealpixPixel.parse(item)
            found = {i for i, other in enumerate(pixels) if pixel.overlaps(other)}
            if not found:
                raise ConfigError(f"--partitions {item}: the catalog has no rows in that pixel")
            chosen |= found
        elif span := re.fullmatch(r"(\d+)(?:-(\d+))?", item):
            first, last = int(span[1]), int(span[2] or span[1])
            if first > last or last >= len(pixels):
                raise ConfigError(f"--partitions {item}: partitions are 0 to {len(pixels) - 1}")
            chosen |= set(range(first, last + 1))
        else:
            raise ConfigError(
                f"--partitions '{item}' is not understood",
                "Write all, i/N, indices and ranges like 0-9,12, or pixels like 2:44.",
            )
    return sorted(chosen)


def apply_recipe(model: str, catalog: str, errors: str | None = None) -> Recipe:
    """Recipe of `apply` for a model, a catalog and an error model of these fingerprints."""
    inputs = {"model": model, "observations": catalog}
    return Recipe("apply", VERSION, {}, inputs if errors is None else {**inputs, "errors": errors})


def apply(
    model: Path,
    catalog: Catalog,
    directory: Path,
    *,
    partitions: str = "all",
    name: str = "",
    overwrite: bool = False,
    cluster: Cluster | None = None,
    report: Report = silent,
    model_fingerprint: str = "",
    errors: Path | None = None,
) -> Manifest | None:
    """Correct the labels of every row of a catalog.

    Parameters
    ----------
    model : Path
        Directory of a saved correction.
    catalog : Catalog
        Observations or stars with ``teff``, ``logg``, ``feh``.
    directory : Path
        Where the corrected catalog goes; several processes may share it.
    partitions : str
        See `parse_partitions`.
    errors : Path, optional
        Output of uncertainty for this very correction: errors of the corrected labels are added.

    Returns
    -------
    Manifest or None
        None while partitions of other processes are missing; whoever finishes last commits.

    Raises
    ------
    ConfigError
        ``partitions`` is wrong.
    ModelError
        The model cannot be loaded, or the errors are those of another one.
    """
    catalog.require(*LABELS)
    chosen = parse_partitions(partitions, catalog.pixels)
    correction = models.load(model)
    fingerprint = model_fingerprint or sha256_of_file(model / "model.json")
    half_widths = None if errors is None else load_errors(errors)
    if half_widths is not None:
        half_widths.require(sha256_of_file(model / "model.json"))
    error_fingerprint = None if errors is None else Manifest.load(errors).fingerprint
    recipe = apply_recipe(fingerprint, catalog.fingerprint, error_fingerprint)
    output = Output.prepare(directory, recipe, overwrite)
    if output.complete:
        return output.load_manifest()
    cluster = cluster or Cluster()
    require_memory(cluster, catalog, "apply")
    with unless_complete(output):
        parts = {
            key_of(pixel): _Part(
                output,
                catalog,
                pixel,
                str(model),
                fingerprint,
                None if errors is None else str(errors),
            )
            for pixel in catalog.pixels
        }
        keys = list(parts)
        run_parts(
            output,
            "corrected",
            {keys[index]: parts[keys[index]] for index in chosen},
            _apply_part,
            cluster,
            "apply",
            report,
        )
        done = records(output, "corrected", keys)
        if done is None:
            return None
        n_rows = catalog.n_rows
        commit_catalog(
            output,
            name or catalog.name.removesuffix(".observations") + ".corrected",
            list(zip(catalog.pixels, done, strict=True)),
            corrected_schema(catalog.schema, half_widths),
            Rows(n_rows, sum(record["file"]["rows"] for record in done)),
            {
                "method": correction.method,
                "flags": {
                    FLAG_MEANINGS[bit]: sum(record["flags"][str(bit)] for record in done)
                    for bit in FLAG_MEANINGS
                },
            },
        )
    return output.load_manifest()


@lru_cache(maxsize=4)
def _load(model: str, fingerprint: str) -> models.Correction:
    return models.load(Path(model), check=False)  # the driver has checked it


@lru_cache(maxsize=4)
def _load_errors(errors: str) -> ErrorModel:
    return load_errors(Path(errors))


def _apply_part(part: _Part) -> None:
    table = part.catalog.read(part.pixel)
    errors = None if part.errors is None else _load_errors(part.errors)
    corrected = correct(table, _load(part.model, part.model_fingerprint), errors)
    flags = pc.value_counts(corrected["flag_sos"]).to_pylist()
    record = write_partition(part.output, part.pixel, corrected)
    counts = {
        str(bit): sum(item["counts"] for item in flags if item["values"] & bit)
        for bit in FLAG_MEANINGS
    }
    part.output.put_record(
        "corrected", key_of(part.pixel), {"file": asdict(record), "flags": counts}
    )
