"""Stage apply: the correction of every target observation, partition by partition."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field

from sos_dask import corrections
from sos_dask.columns import matrix32
from sos_dask.correct import (
    COVERAGE_MEANINGS,
    FLAG_MEANINGS,
    FLAGS,
    Faded,
    Predictor,
    correct,
    corrected_schema,
    widened,
    with_coverage,
    with_coverage_schema,
)
from sos_dask.errors import CatalogError, ConfigError, ModelError
from sos_dask.evidence.coverage import CoverageModel
from sos_dask.evidence.intervals import ErrorModel, load_errors
from sos_dask.evidence.widening import INSIDE, KIND_FIELD
from sos_dask.settings import Settings
from sos_dask.sky.healpix import HealpixPixel
from sos_dask.stages.base import Made, Role, Run, Stage, by_pixel, partition_record
from sos_dask.storage.artifact import Output
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import Recipe, Rows, sha256_of_file

_SCORES = ("obs_id", "coverage", FLAGS, KIND_FIELD.name)
# What is calculated of rows takes several times the memory of what is kept.
_ROWS_AT_ONCE = 1 << 17
_HOW_TO_COVER = "Make it: sos-dask coverage PAIRS MODEL CATALOG STARS -o OUT."


class ApplySettings(Settings):
    """Settings of the stage."""

    fallback: Literal["polynomial", "none", "edge"] = Field(
        "edge",
        description="What the correction fades to where coverage is low: polynomial, a smooth "
        "model, held constant a little way out; none: no correction; edge: nothing fades",
    )
    partitions: str = Field(
        "all", exclude=True, description="all, i/N, indices 0-9,12 or HEALPix pixels 2:44"
    )


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


class Apply(Stage[ApplySettings]):
    """Correct the labels of every row of a catalog; several processes may share one output.

    Without a coverage there is no ``coverage``, and nothing fades; without errors there are no
    errors of the corrected labels. Whoever makes the last partition commits.

    Example: sos-dask apply model lamost -o corrected --partitions 3/16
    """

    name = "apply"
    version = 9
    Settings = ApplySettings
    roles = (
        Role("model", "Correction.", "output"),
        Role("observations", "Observations or stars of the target."),
        Role("errors", "Output of uncertainty for this correction.", "output", optional=True),
        Role("coverage", "Coverage of this catalog and correction.", optional=True),
        Role("smooth", "Smooth model that the correction fades to.", "output", optional=True),
    )
    partitioned = "observations"
    memory = (200, 5.5)

    @classmethod
    def recipe(cls, settings: ApplySettings, fingerprints: Mapping[str, str]) -> Recipe:
        """See `Stage.recipe`; without a coverage nothing fades, whatever the fallback."""
        if "coverage" not in fingerprints:
            settings = ApplySettings()
        return super().recipe(settings, fingerprints)

    @property
    def observations(self) -> Catalog:
        """Catalog that is corrected."""
        return self.catalog("observations")

    def check(self) -> None:
        """Refuse models, errors and a coverage that do not fit to each other."""
        correction = corrections.load(self.path("model"))
        self.observations.require(*correction.problem.names, *correction.problem.columns)
        parse_partitions(self.settings.partitions, self.observations.pixels)
        if "coverage" in self.inputs:
            self._check_coverage()
        fallback = self.settings.fallback
        fades = "coverage" in self.inputs and fallback == "polynomial"
        if fades != ("smooth" in self.inputs) or (
            fallback != "edge" and "coverage" not in self.inputs
        ):
            raise ConfigError(
                f"the fallback is '{fallback}', but the inputs are {', '.join(self.inputs)}",
                "A fallback needs a coverage; 'polynomial' and only it needs a smooth model, too.",
            )
        if "errors" in self.inputs:
            sha256 = sha256_of_file(self.path("model") / corrections.MODEL_FILE)
            load_errors(self.path("errors"), correction.problem).require(sha256)

    def _check_coverage(self) -> None:
        """Refuse a coverage of other rows, or that tells of another correction or other errors."""
        coverage = self.catalog("coverage")
        if coverage.manifest is None or coverage.manifest.recipe.stage != "coverage":
            raise CatalogError(f"{coverage.path} is no product 'coverage'", _HOW_TO_COVER)
        coverage.require(*_SCORES)
        inputs = coverage.manifest.recipe.inputs
        if inputs["observations"] != self.observations.fingerprint:
            raise CatalogError(
                f"{coverage.path} is not the coverage of {self.observations.path}", _HOW_TO_COVER
            )
        if inputs["model"] != self.manifest("model").fingerprint:
            raise ModelError(f"{coverage.path} was made for another correction", _HOW_TO_COVER)
        if "errors" in self.inputs and inputs.get("errors") != self.manifest("errors").fingerprint:
            errors = self.path("errors")
            raise ModelError(
                f"coverage {coverage.path} was made without these errors",
                f"Rerun sos-dask coverage ... --errors {errors}.",
            )
        fallback = self.settings.fallback
        if "smooth" in self.inputs:
            method = corrections.load(self.path("smooth")).method
            if method != fallback:
                raise ModelError(
                    f"{self.path('smooth')} is a model of method '{method}': the fallback is "
                    f"'{fallback}'"
                )

    def held_bytes(self) -> int:
        """Bytes of the models in memory."""
        used = [self.path(n) for n in ("model", "errors", "smooth") if n in self.inputs]
        return sum(file.stat().st_size for path in used for file in path.iterdir())

    @property
    def _meanings(self) -> dict[int, str]:
        return FLAG_MEANINGS | (COVERAGE_MEANINGS if "coverage" in self.inputs else {})

    def _schema(self, errors: ErrorModel | None, correction: corrections.Correction) -> pa.Schema:
        schema = corrected_schema(self.observations.schema, errors, correction.problem)
        return with_coverage_schema(schema) if "coverage" in self.inputs else schema

    def make(self, run: Run) -> Made | None:
        """Correct the chosen partitions; commit where none is missing."""
        catalog = self.observations
        pixels = by_pixel(catalog.pixels)
        keys = list(pixels)
        chosen = [keys[i] for i in parse_partitions(self.settings.partitions, catalog.pixels)]
        run.run_parts("corrected", {key: pixels[key] for key in chosen}, self.correct_pixel)
        if not run.finished("corrected", keys):
            return None
        done = run.records("corrected", keys)
        correction = corrections.load(self.path("model"))
        errors = load_errors(self.path("errors")) if "errors" in self.inputs else None
        n_out = run.write_catalog(
            self.product, catalog.pixels, done, self._schema(errors, correction)
        )
        summary: dict[str, Any] = {"method": correction.method}
        if "coverage" in self.inputs:
            summary["fallback"] = self.settings.fallback
        summary["flags"] = {
            text: sum(one["flags"][str(bit)] for one in done)
            for bit, text in self._meanings.items()
        }
        return Rows(catalog.n_rows, n_out), summary

    def correct_pixel(self, output: Output, key: str, pixel: HealpixPixel) -> dict[str, Any]:
        """Write the corrected rows of one partition."""
        correction = _load(str(self.path("model")), output.fingerprint)
        errors = None
        if "errors" in self.inputs:
            errors = _load_errors(str(self.path("errors")), output.fingerprint)
        names = self._schema(errors, correction).names
        table, scores = self.observations.read(pixel), None
        if "coverage" in self.inputs:
            scores = self.catalog("coverage").read(pixel, _SCORES)
        pieces = []
        for first in range(0, max(table.num_rows, 1), _ROWS_AT_ONCE):
            rows = table.slice(first, _ROWS_AT_ONCE)
            of_rows = None if scores is None else scores.slice(first, _ROWS_AT_ONCE)
            found = self._corrected(output.fingerprint, correction, errors, rows, of_rows)
            pieces.append(found.select(names))
        corrected = pa.concat_tables(pieces)
        flags = corrected["flag_sos"].to_numpy()
        return {
            "file": partition_record(output, pixel, corrected),
            "flags": {str(bit): int(np.count_nonzero(flags & bit)) for bit in self._meanings},
        }

    def _corrected(
        self,
        key: str,
        correction: corrections.Correction,
        errors: ErrorModel | None,
        rows: pa.Table,
        scores: pa.Table | None,
    ) -> pa.Table:
        """Some rows of a partition with all that is known of their correction."""
        problem = correction.problem
        if scores is None:
            return correct(rows, correction, errors, problem)
        known = _load_coverage(str(self.path("coverage")), key)
        used = self._faded(key, correction, scores, known)
        corrected = with_coverage(correct(rows, used, errors, problem), scores)
        if errors is None:
            return corrected
        half_width = matrix32(corrected, [label.sos_err for label in problem.labels])
        # Rows without a coverage have no errors either.
        kind = pc.fill_null(scores[KIND_FIELD.name], INSIDE).to_numpy()
        error_class = errors.is_sparse(problem.matrix(rows)).astype(np.int64)
        factors = known.widths.widening(kind, error_class, half_width)
        return widened(corrected, factors.astype(np.float32), problem)

    def _faded(
        self, key: str, correction: corrections.Correction, scores: pa.Table, known: CoverageModel
    ) -> Predictor:
        """The correction that fades to the fallback with falling coverage of these rows."""
        if self.settings.fallback == "edge":
            return correction
        fallback = None
        if "smooth" in self.inputs:
            smooth = _load(str(self.path("smooth")), key)

            def fallback(features: NDArray[np.float32]) -> NDArray[np.float32]:
                return smooth.predict(known.within_reach(features))

        coverage = pc.fill_null(scores["coverage"], np.nan).to_numpy()
        return Faded(correction, coverage, known.limits.inside, known.limits.outside, fallback)


# A worker reads a model once for an output; the same directory may hold another one later.


@lru_cache(maxsize=2)
def _load_coverage(directory: str, key: str) -> CoverageModel:
    return CoverageModel.load(Path(directory))


@lru_cache(maxsize=4)
def _load(model: str, key: str) -> corrections.Correction:
    return corrections.load(Path(model), check=False)  # the driver has checked it


@lru_cache(maxsize=4)
def _load_errors(errors: str, key: str) -> ErrorModel:
    return load_errors(Path(errors))
