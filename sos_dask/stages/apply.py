"""Stage apply: the correction of every target observation, partition by partition."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from sos_dask import correct, corrections
from sos_dask.columns import Float32Array
from sos_dask.errors import CatalogError, ConfigError, ModelError
from sos_dask.evidence import beyond
from sos_dask.evidence.coverage import CoverageModel
from sos_dask.evidence.intervals import load_errors
from sos_dask.evidence.widening import KIND_FIELD
from sos_dask.schema import nearest
from sos_dask.settings import Settings
from sos_dask.sky.healpix import HealpixPixel
from sos_dask.stages.base import Made, Role, Run, Stage, by_pixel, loaded, partition_record
from sos_dask.storage.artifact import Output
from sos_dask.storage.manifest import Recipe, Rows, files_below, local_copy, sha256_of_file
from sos_dask.storage.objects import at_once

_SCORES = ("obs_id", "coverage", correct.FLAGS, KIND_FIELD.name)
# What is calculated of rows takes several times the memory of what is kept.
_ROWS_AT_ONCE = 1 << 17


def _unchecked(directory: Path) -> corrections.Correction:
    return corrections.load(local_copy(directory), check=False)  # the driver has checked it


_LOAD: dict[str, Callable[[Path], Any]] = {
    "model": _unchecked,
    "smooth": _unchecked,
    "errors": load_errors,
    "coverage": CoverageModel.load,
}
_HOW_TO_COVER = "Make it: sos-dask coverage PAIRS MODEL CATALOG STARS -o OUT."


class ApplySettings(Settings):
    """Settings of the stage."""

    fallback: Literal["measured", "polynomial", "none", "edge"] = Field(
        "edge",
        description="What the correction fades to where coverage is low: measured, what was best "
        "where regions were left out of the training; polynomial, a smooth "
        "model, held constant a little way out; none: no correction; edge: nothing fades",
    )
    suffix: str = Field(
        "",
        pattern="^(_[a-z0-9_]+)?$",
        description="Ends the names of coverage and flags, where a catalog has several corrections",
    )
    partitions: str = Field(
        "all", exclude=True, description="all, i/N, indices 0-9,12 or HEALPix pixels 2:44"
    )


def parse_partitions(text: str, pixels: Sequence[HealpixPixel]) -> list[int]:
    """Parse which partitions of a catalog are meant; gives their sorted indices.

    The text is ``all``; a shard ``i/N`` (i from 1 to N: partitions i, i+N, ...); indices and ranges
    ``0-9,12``; HEALPix pixels ``2:44``, each meaning all partitions inside it or around it. Raises
    `ConfigError`: bad syntax, an index or a pixel that the catalog does not have.
    """
    if text.strip() == "all":
        return list(range(len(pixels)))
    if shard := re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text.strip()):
        number, total = int(shard[1]), int(shard[2])
        if not 1 <= number <= total:
            raise ConfigError(
                f"--partitions {text}: there is no shard {number} of {total}",
                f"Shards are counted from 1/{max(total, 1)} to {max(total, 1)}/{max(total, 1)}.",
            )
        return list(range(number - 1, len(pixels), total))
    chosen: set[int] = set()
    for item in map(str.strip, text.split(",")):
        if ":" in item:
            pixel = HealpixPixel.parse(item)
            found = {i for i, other in enumerate(pixels) if pixel.overlaps(other)}
            if not found:
                raise ConfigError(f"--partitions {item}: the catalog has no rows in that pixel")
        elif span := re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", item):
            first, last = int(span[1]), int(span[2] or span[1])
            if not first <= last < len(pixels):
                raise ConfigError(f"--partitions {item}: partitions are 0 to {len(pixels) - 1}")
            found = set(range(first, last + 1))
        else:
            raise ConfigError(
                f"--partitions '{item}' is not understood",
                "Write all, i/N, indices and ranges like 0-9,12, or pixels like 2:44.",
            )
        chosen |= found
    return sorted(chosen)


class Apply(Stage[ApplySettings]):
    """Correct the labels of every row of a catalog; several processes may share one output.

    Without a coverage there is no ``coverage``, and nothing fades; without errors there are no
    errors of the corrected labels. The process that makes the last partition commits.
    """

    name = "apply"
    version = 12
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
            settings = ApplySettings(suffix=settings.suffix)
        return super().recipe(settings, fingerprints)

    def check(self) -> None:
        """Refuse models, errors and a coverage that do not fit to each other."""
        correction = corrections.load(self.files("model"))
        catalog = self.catalog("observations")
        for name in (*correction.problem.names, *correction.problem.columns):
            if name not in catalog.schema.names:
                raise CatalogError(
                    f"{catalog.path} has no column '{name}': the model {self.path('model')} "
                    f"corrects {correction.problem.words}",
                    nearest(name, catalog.schema.names),
                )
        parse_partitions(self.settings.partitions, catalog.pixels)
        if "coverage" in self.inputs:
            self._check_coverage()
        wanted = {"edge": set(), "none": {"coverage"}, "polynomial": {"coverage", "smooth"}}
        wanted["measured"] = {"coverage"}
        fallback, needed = self.settings.fallback, wanted[self.settings.fallback]
        if needed - {"coverage"} != {"smooth"} & set(self.inputs) or needed - set(self.inputs):
            raise ConfigError(
                f"the fallback is '{fallback}', but the inputs are {', '.join(self.inputs)}",
                "A fallback needs a coverage; 'polynomial' alone needs a smooth model, too.",
            )
        if "errors" in self.inputs:
            sha256 = sha256_of_file(self.files("model") / corrections.MODEL_FILE)
            load_errors(self.path("errors"), correction.problem).require(sha256)

    def _check_coverage(self) -> None:
        """Refuse a coverage of other rows, or that tells of another correction or other errors."""
        coverage, catalog = self.catalog("coverage"), self.catalog("observations")
        if coverage.manifest is None or coverage.manifest.recipe.stage != "coverage":
            raise CatalogError(f"{coverage.path} is not a product 'coverage'", _HOW_TO_COVER)
        coverage.require(*_SCORES)
        inputs = coverage.manifest.recipe.inputs
        if inputs["observations"] != catalog.fingerprint:
            raise CatalogError(
                f"{coverage.path} is not the coverage of {catalog.path}", _HOW_TO_COVER
            )
        if inputs["model"] != self.manifest("model").fingerprint:
            raise ModelError(f"{coverage.path} was made for another correction", _HOW_TO_COVER)
        if "errors" in self.inputs and inputs.get("errors") != self.manifest("errors").fingerprint:
            raise ModelError(
                f"coverage {coverage.path} was made without these errors",
                f"Rerun sos-dask coverage ... --errors {self.path('errors')}.",
            )
        if "smooth" in self.inputs:
            path = self.path("smooth")
            smooth = corrections.load(self.files("smooth"))
            problem = corrections.load(self.files("model")).problem
            if (smooth.method, smooth.problem) != ("polynomial", problem):
                raise ModelError(
                    f"{path} is a model of method '{smooth.method}' for {smooth.problem.words}: "
                    f"the fallback is a polynomial for {problem.words}"
                )

    def held_bytes(self) -> int:
        """Bytes of the models in memory."""
        used = [self.path(n) for n in ("model", "errors", "smooth") if n in self.inputs]
        return sum(file.stat().st_size for path in used for file in files_below(path))

    def make(self, run: Run) -> Made | None:
        """Correct the chosen partitions; commit where none is missing."""
        catalog = self.catalog("observations")
        pixels = by_pixel(catalog.pixels)
        chosen = parse_partitions(self.settings.partitions, catalog.pixels)
        mine = {key: pixels[key] for i, key in enumerate(pixels) if i in set(chosen)}
        run.parts("corrected", mine, self.correct_pixel)
        done = at_once(run.output.directory, partial(run.output.get_record, "corrected"), pixels)
        found = [record for record in done if record is not None]
        if len(found) < len(pixels):
            return None
        correction = corrections.load(self.files("model"))
        errors = load_errors(self.path("errors")) if "errors" in self.inputs else None
        covered = "coverage" in self.inputs
        given = errors, correction.problem, covered, self.settings.suffix
        schema = correct.corrected_schema(catalog.schema, *given)
        n_out = run.write_catalog(self.product, catalog.pixels, found, schema)
        return Rows(catalog.n_rows, n_out), {
            "method": correction.method,
            **({"fallback": self.settings.fallback} if covered else {}),
            "flags": {
                text: sum(one["flags"][str(bit)] for one in found)
                for bit, text in self._meanings.items()
            },
        }

    @property
    def _meanings(self) -> dict[int, str]:
        return correct.FLAG_MEANINGS | (
            correct.COVERAGE_MEANINGS if "coverage" in self.inputs else {}
        )

    def correct_pixel(self, output: Output, key: str, pixel: HealpixPixel) -> dict[str, Any]:
        """Write the corrected rows of one partition."""
        given = {
            kind: loaded(load, self.path(kind), output.fingerprint)
            for kind, load in _LOAD.items()
            if kind in self.inputs
        }
        model, known, smooth = given["model"], given.get("coverage"), given.get("smooth")
        table = self.catalog("observations").read(pixel)
        if known is not None:
            scores = self.catalog("coverage").read(pixel, _SCORES)
            limits = None if self.settings.fallback == "edge" else known.limits
            fallback = None if smooth is None else partial(_within_reach, smooth, known)
            measured = self.settings.fallback == "measured"
            widening = partial(known.widening, measured=measured)
            if measured:
                fallback = partial(_best_guess, model, known)
        pieces = []
        for first in range(0, max(table.num_rows, 1), _ROWS_AT_ONCE):
            covered, rows = None, table.slice(first, _ROWS_AT_ONCE)
            if known is not None:
                some = scores.slice(first, _ROWS_AT_ONCE)
                covered = correct.Covered(some, widening, limits, fallback)
            how = given.get("errors"), model.problem, covered, self.settings.suffix
            pieces.append(correct.correct(rows, model, *how))
        corrected = pa.concat_tables(pieces)
        flags = corrected[f"flag_sos{self.settings.suffix}"].to_numpy()
        return {
            "file": partition_record(output, pixel, corrected),
            "flags": {str(bit): int(np.count_nonzero(flags & bit)) for bit in self._meanings},
        }


def _best_guess(
    model: corrections.Correction,
    known: CoverageModel,
    features: Float32Array,
    kind: NDArray[np.int8],
) -> Float32Array:
    """Differences (n, l) by what was measured to be best at places of some kinds (n,)."""
    of_star = model.problem.star_places
    guess = known.standing_at(features[:, of_star], kind).guess
    found = np.zeros(guess.shape, dtype=np.float32)
    for number in range(beyond.ZERO_POINT, len(beyond.GUESSES)):
        rows = np.flatnonzero((guess == number).any(axis=1))
        if not len(rows):
            continue
        is_edge = number == beyond.EDGE
        values = model.predict(features[rows]) if is_edge else known.zero_point
        found[rows] = np.where(guess[rows] == number, values, found[rows])
    return found


def _within_reach(
    smooth: corrections.Correction,
    known: CoverageModel,
    features: Float32Array,
    kind: NDArray[np.int8],
) -> Float32Array:
    """Differences (n, l) by a smooth model, held constant a little beyond its pairs."""
    near, of_star = features.copy(), smooth.problem.star_places
    near[:, of_star] = known.within_reach(features[:, of_star])
    return smooth.predict(near)
