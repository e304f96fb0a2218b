"""Stage apply: the correction of every target observation, partition by partition."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from sos_dask import corrections as models
from sos_dask.columns import floats32, matrix32
from sos_dask.correct import FLAG_MEANINGS, Predictor, correct, corrected_schema
from sos_dask.errors import CatalogError, ConfigError, ModelError
from sos_dask.evidence.coverage import CoverageModel
from sos_dask.evidence.error_tables import ErrorModel, load_errors
from sos_dask.evidence.widening import INSIDE, KIND_FIELD
from sos_dask.problem import features
from sos_dask.run.cluster import Cluster, Report, silent
from sos_dask.schema import LABELS
from sos_dask.sky.healpix import HealpixPixel
from sos_dask.stages.needs import require_memory
from sos_dask.stages.parts import (
    commit_catalog,
    finished,
    key_of,
    records,
    run_parts,
    unless_complete,
)
from sos_dask.storage.artifact import Manifest, Output, Recipe, Rows
from sos_dask.storage.catalog import Catalog, write_partition
from sos_dask.storage.manifest import sha256_of_file
from sos_dask.trust import FLAG_MEANINGS as TRUST_MEANINGS
from sos_dask.trust import FLAGS, Faded, trusted_schema, widened, with_coverage

VERSION = 8
_SCORES = ("obs_id", "coverage", FLAGS, KIND_FIELD.name)
# What is calculated of rows takes several times the memory of what is kept.
_ROWS_AT_ONCE = 1 << 17
_HOW_TO_COVER = "Make it: sos-dask coverage PAIRS MODEL CATALOG STARS -o OUT."


@dataclass(frozen=True)
class Trust:
    """How far the correction is trusted, and what stands in for it where it is not.

    Parameters
    ----------
    coverage : Catalog
        Output of the stage coverage for the same catalog.
    fallback : str
        ``polynomial``: a smooth model, held constant a little way out; ``none``: no correction;
        ``edge``: the correction itself.
    smooth : Path, optional
        Directory of the smooth model.
    """

    coverage: Catalog
    fallback: str = "edge"
    smooth: Path | None = None


@dataclass(frozen=True)
class _Part:
    output: Output
    catalog: Catalog
    pixel: HealpixPixel
    model: str
    errors: str | None = None
    trust: Trust | None = None


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
    if shard := re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text):
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
        elif span := re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", item):
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


def apply_recipe(
    model: str,
    catalog: str,
    errors: str = "",
    coverage: str = "",
    fallback: str = "",
    smooth: str = "",
) -> Recipe:
    """Recipe of `apply` for inputs of these fingerprints; those that are empty take no part."""
    inputs = {
        "model": model,
        "observations": catalog,
        "errors": errors,
        "coverage": coverage,
        "smooth": smooth,
    }
    return Recipe(
        "apply",
        VERSION,
        {"fallback": fallback} if coverage else {},
        {name: fingerprint for name, fingerprint in inputs.items() if fingerprint},
    )


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
    trust: Trust | None = None,
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
    trust : Trust, optional
        Without it there is no ``coverage``, and nothing fades.

    Returns
    -------
    Manifest or None
        None while partitions of other processes are missing; whoever finishes last commits.

    Raises
    ------
    ConfigError
        ``partitions`` is wrong.
    ModelError
        A model cannot be loaded, or errors or coverage are those of another one.
    CatalogError
        The coverage is not that of this catalog.
    """
    catalog.require(*LABELS)
    chosen = parse_partitions(partitions, catalog.pixels)
    correction = models.load(model)
    if trust:
        _require_trust(trust, model, catalog, errors)
    fingerprint = model_fingerprint or sha256_of_file(model / "model.json")
    half_widths = None if errors is None else load_errors(errors)
    if half_widths is not None:
        half_widths.require(sha256_of_file(model / "model.json"))
    recipe = apply_recipe(
        fingerprint,
        catalog.fingerprint,
        "" if errors is None else Manifest.checked(errors).fingerprint,
        trust.coverage.fingerprint if trust else "",
        trust.fallback if trust else "",
        Manifest.checked(trust.smooth).fingerprint if trust and trust.smooth else "",
    )
    inputs = [model, catalog.path, errors]
    if trust:
        inputs += [trust.coverage.path, trust.smooth]
    output = Output.prepare(directory, recipe, overwrite, inputs)
    if output.complete:
        return output.load_manifest()
    cluster = cluster or Cluster()
    used = [path for path in (model, errors, trust.smooth if trust else None) if path]
    held = sum(file.stat().st_size for path in used for file in path.iterdir() if file.is_file())
    require_memory(cluster, catalog, "apply", held)
    with unless_complete(output):
        parts = {
            key_of(pixel): _Part(
                output,
                catalog,
                pixel,
                str(model),
                None if errors is None else str(errors),
                trust,
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
        if not finished(output, "corrected", keys):
            return None
        done = records(output, "corrected", keys)
        n_rows = catalog.n_rows
        commit_catalog(
            output,
            name or catalog.name.removesuffix(".observations") + ".corrected",
            list(zip(catalog.pixels, done, strict=True)),
            _schema(catalog, half_widths, trust),
            Rows(n_rows, sum(record["file"]["rows"] for record in done)),
            {
                "method": correction.method,
                **({"fallback": trust.fallback} if trust else {}),
                "flags": {
                    text: sum(record["flags"][str(bit)] for record in done)
                    for bit, text in _meanings(trust).items()
                },
            },
        )
    return output.load_manifest()


def _require_trust(trust: Trust, model: Path, catalog: Catalog, errors: Path | None) -> None:
    """Refuse a coverage of other rows, or that tells of another correction or other errors."""
    coverage = trust.coverage
    if coverage.manifest is None or coverage.manifest.recipe.stage != "coverage":
        raise CatalogError(f"{coverage.path} is no product 'coverage'", _HOW_TO_COVER)
    coverage.require(*_SCORES)
    inputs = coverage.manifest.recipe.inputs
    if inputs["observations"] != catalog.fingerprint:
        raise CatalogError(f"{coverage.path} is not the coverage of {catalog.path}", _HOW_TO_COVER)
    if inputs["model"] != Manifest.load(model).fingerprint:
        raise ModelError(f"{coverage.path} was made for another correction", _HOW_TO_COVER)
    if errors is not None and inputs.get("errors") != Manifest.load(errors).fingerprint:
        raise ModelError(
            f"{coverage.path} does not tell how far {errors} must be widened",
            "Make the coverage with the same --errors.",
        )
    if trust.smooth is not None and (method := models.load(trust.smooth).method) != trust.fallback:
        raise ModelError(
            f"{trust.smooth} is a model of method '{method}': the fallback is '{trust.fallback}'"
        )


def _schema(catalog: Catalog, errors: ErrorModel | None, trust: Trust | None) -> pa.Schema:
    schema = corrected_schema(catalog.schema, errors)
    return trusted_schema(schema) if trust else schema


def _meanings(trust: Trust | None) -> dict[int, str]:
    return FLAG_MEANINGS if trust is None else {**FLAG_MEANINGS, **TRUST_MEANINGS}


def _faded(
    correction: Predictor, scores: pa.Table, trust: Trust, known: CoverageModel, key: str
) -> Predictor:
    """The correction that fades to the fallback with falling coverage of these rows."""
    if trust.fallback == "edge":
        return correction
    fallback = None
    if trust.smooth is not None:
        smooth = _load(str(trust.smooth), key)

        def fallback(features: NDArray[np.float32]) -> NDArray[np.float32]:
            return smooth.predict(known.within_reach(features))

    coverage = pc.fill_null(scores["coverage"], np.nan).to_numpy()
    return Faded(correction, coverage, known.limits.inside, known.limits.outside, fallback)


# A worker reads a model once for an output; the same directory may hold another one later.


@lru_cache(maxsize=2)
def _load_coverage(directory: str, key: str) -> CoverageModel:
    return CoverageModel.load(Path(directory))


@lru_cache(maxsize=4)
def _load(model: str, key: str) -> models.Correction:
    return models.load(Path(model), check=False)  # the driver has checked it


@lru_cache(maxsize=4)
def _load_errors(errors: str, key: str) -> ErrorModel:
    return load_errors(Path(errors))


def _widened(
    corrected: pa.Table, scores: pa.Table, errors: ErrorModel, known: CoverageModel
) -> pa.Table:
    """Corrected rows with errors that hold where the coverage is low, too."""
    x = features(*(floats32(corrected, label) for label in LABELS))
    half_width = matrix32(corrected, [f"{label}_sos_err" for label in LABELS])
    # Rows without a coverage have no errors either.
    kind = pc.fill_null(scores[KIND_FIELD.name], INSIDE).to_numpy()
    factors = known.widths.widening(kind, errors.is_sparse(x).astype(np.int64), half_width)
    return widened(corrected, factors.astype(np.float32))


def _corrected(
    part: _Part, key: str, errors: ErrorModel | None, rows: pa.Table, scores: pa.Table | None
) -> pa.Table:
    """Some rows of a partition with all that is known of their correction."""
    correction: Predictor = _load(part.model, key)
    if part.trust is None or scores is None:
        return correct(rows, correction, errors)
    known = _load_coverage(str(part.trust.coverage.path), key)
    corrected = correct(rows, _faded(correction, scores, part.trust, known, key), errors)
    corrected = with_coverage(corrected, scores)
    return corrected if errors is None else _widened(corrected, scores, errors, known)


def _apply_part(part: _Part) -> None:
    key = part.output.fingerprint
    errors = None if part.errors is None else _load_errors(part.errors, key)
    schema = _schema(part.catalog, errors, part.trust)
    table = part.catalog.read(part.pixel)
    scores = None
    if part.trust is not None:
        scores = part.trust.coverage.read(part.pixel, _SCORES)
    pieces = []
    for first in range(0, max(table.num_rows, 1), _ROWS_AT_ONCE):
        rows = table.slice(first, _ROWS_AT_ONCE)
        of_rows = None if scores is None else scores.slice(first, _ROWS_AT_ONCE)
        pieces.append(_corrected(part, key, errors, rows, of_rows).select(schema.names))
    corrected = pa.concat_tables(pieces)
    flags = corrected["flag_sos"].to_numpy()
    record = write_partition(part.output, part.pixel, corrected)
    counts = {str(bit): int(np.count_nonzero(flags & bit)) for bit in _meanings(part.trust)}
    part.output.put_record(
        "corrected", key_of(part.pixel), {"file": asdict(record), "flags": counts}
    )
