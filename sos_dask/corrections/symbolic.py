"""A readable formula for each difference, found by symbolic regression.

1. A sample of the training pairs, fewer of them where pairs are dense: each cell of a coarse grid
   gives in proportion to the square root of its pairs. A hash of their numbers says which, so the
   sample is the same in any order of the pairs and any partitions.
2. Half of the sample evolves formulas: genetic programming with two goals, accuracy and length
   (Operon: Burlacu, Kronberger & Kommenda 2020, GECCO Companion, 1562), on differences clipped at
   ``CLIP`` spreads. One thread and one seed give the same formulas again.
3. Every formula of the front is brought to a normal form (SymPy), refused where it is not finite
   all over the training box, and its numbers are fitted robustly (bisquare).
4. The other half of the sample judges: of the formulas that lose to the best by no more than one
   standard error of the difference, the least complex is taken (Breiman et al. 1984,
   Classification and Regression Trees, section 3.4.3).
5. Its numbers are fitted once more, to all training pairs or ``MOST_PAIRS`` of them by chance.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from sos_dask import settings
from sos_dask.columns import Float32Array, FloatArray, IntArray
from sos_dask.corrections import base
from sos_dask.corrections.base import Content, Correction, ModelInfo, Rows, Summary, Training
from sos_dask.corrections.formula import Formula, Template
from sos_dask.corrections.polynomial import BISQUARE, one_thread
from sos_dask.errors import ConfigError, ModelError
from sos_dask.settings import to_json
from sos_dask.stats.numbers import MAD_TO_SIGMA

FILE = "formula.json"
MOST_PAIRS = 200_000
CLIP = 4.0
# Cells of the grid of the sample, over +- 3 standard deviations of each of the first inputs.
CELLS = 8
_MOST_AXES = 6


class Settings(settings.Settings):
    """Parameters of the method."""

    n_sample: int = Field(
        4000, ge=200, le=100_000, description="Pairs that search and judge formulas, half each"
    )
    max_length: int = Field(30, ge=3, le=200, description="Most nodes of an evolving formula")
    population: int = Field(400, ge=10, le=100_000, description="Formulas alive at once")
    generations: int = Field(50, ge=1, le=100_000, description="Generations")
    operators: Literal["polynomial", "rational"] = Field(
        "rational", description="Whether formulas may divide"
    )
    standard_errors: float = Field(
        1.0, ge=0.0, le=100.0, description="A simpler formula may be worse by so many of them"
    )
    engine: Literal["operon", "pysr"] = Field("operon", description="Program for the evolution")
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Seed of the evolution")
    min_pairs: int = Field(200, ge=10, le=10**6, description="Fewest training pairs of a label")


class Candidate(settings.Settings):
    """A formula of the front, with numbers fitted to the sample and figures of its judging half."""

    formula: str  # of the inputs; Python and SymPy read it
    latex: str
    complexity: int  # numbers, inputs (less a fixed number) and operators
    loss: float  # mean bisquare loss, 0 (perfect) to 1
    scatter: float  # 1.4826 times the median absolute residual
    behind: float  # loss less that of the best
    standard_error: float  # of behind


class Choice(settings.Settings):
    """The formula of one label, with numbers fitted to the training pairs and their scatter."""

    formula: str
    latex: str
    complexity: int
    scatter: float
    chosen: int  # position in the front
    front: list[Candidate]  # by complexity; each is better than all before it


@dataclass(eq=False)
class SymbolicCorrection(Correction):
    """One formula a label."""

    method = "symbolic"
    parameters = Settings

    choices: tuple[Choice, ...]
    n_sample: int  # pairs that searched and judged

    @cached_property
    def formulas(self) -> list[Formula]:
        """The formulas of the labels, parsed."""
        return [Formula.parse(one.formula, self.problem.features) for one in self.choices]

    def evaluate(self, features: Float32Array) -> Float32Array:
        """Differences at finite inputs inside the box, shape (n, l)."""
        columns = [formula.evaluate(features) for formula in self.formulas]
        return np.stack(columns, axis=1).astype(np.float32)

    def files(self) -> Mapping[str, bytes]:
        """``formula.json``: formulas as text, which is what is evaluated, LaTeX, and the fronts."""
        document = {
            "features": list(self.problem.features),
            "n_sample": self.n_sample,
            "labels": base.by_name(self.problem.names, [choice.as_json for choice in self.choices]),
        }
        return {FILE: to_json(document)}

    @classmethod
    def restore(cls, info: ModelInfo, files: Mapping[str, Content]) -> SymbolicCorrection:
        """Read a model from its own files; `ModelError` where they are more than arithmetic."""
        document = base.parse_json(bytes(files.get(FILE, b"")), FILE)
        choices = []
        try:
            for label in info.problem.names:
                choice = Choice(**document["labels"][label])
                formula = Formula.parse(choice.formula, info.problem.features)
                if not formula.is_finite(info.minimum, info.maximum):
                    raise ModelError(f"the formula of {label} is not finite in the training range")
                choices.append(choice)
            return cls(info, tuple(choices), int(document["n_sample"]))
        except (ConfigError, KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{FILE}: incomplete or damaged ({error!r})") from None
        except ModelError as error:
            raise ModelError(f"{FILE}: {label}: {error.message}", error.hint) from None

    @classmethod
    def fit(cls, training: Training, settings: Settings) -> SymbolicCorrection:
        """Fit; see `sos_dask.corrections.fit`. Labels evolve on the workers of a client at once."""
        summary = base.summarise(training, cls.method, settings, settings.min_pairs)
        _require(settings.engine)
        scale = Scale.of(summary)
        sample = draw_sample(training, scale, settings.n_sample)
        pairs = draw_sample(training, scale, MOST_PAIRS, even=False)
        search = partial(_search, scale, summary, settings, sample, pairs)
        labels = range(len(summary.center))
        what, advice = "symbolic: the search of formulas", "give workers more, or lower n_sample."
        choices = base.run_tasks(search, labels, training.client, what, advice)
        return cls(summary.info, tuple(choices), len(sample.features))


# --- the search --------------------------------------------------------------------------------


def _search(
    scale: Scale, summary: Summary, settings: Settings, sample: Rows, pairs: Rows, label: int
) -> Choice:
    """Evolve formulas of one label and choose one."""
    center, spread = float(summary.center[label]), float(summary.spread[label])

    def scaled(rows: Rows) -> tuple[FloatArray, FloatArray, FloatArray]:
        x, differences, weight = rows.of_label(label)
        y = (differences.astype(np.float64) - center) / spread
        return scale.shift(x), y, weight.astype(np.float64) / summary.mean_weight

    def fitted(form: Template, *pairs: FloatArray) -> Template:
        better = fit_numbers(form, *pairs)
        return better if scale.finite(better) else form  # a pole may have come near

    def written(form: Template) -> dict[str, Any]:
        text, latex = form.written(scale.pivot, center, spread)
        return {"formula": text, "latex": latex, "complexity": form.complexity}

    u, y, weight = scaled(sample)
    # The sample is in the order of its hash: any two halves are alike.
    half = len(y) // 2
    z = np.clip((u.T / np.array(scale.width))[:half], -5, 5)
    evolve, names = _ENGINES[settings.engine], scale.info.problem.features
    texts = evolve(z, np.clip(y[:half], -CLIP, CLIP), settings, list(names))
    forms: dict[str, Template] = {}
    for text in ["0", *texts]:
        found = Template.of(text, names, scale.width)
        if found is not None and found.formula.text not in forms and scale.finite(found):
            forms[found.formula.text] = found
    with one_thread():
        tried = [fitted(form, u[:, :half], y[:half], weight[:half]) for form in forms.values()]
        front, chosen = _front(tried, u[:, half:], y[half:], settings.standard_errors)
        u, y, weight = scaled(pairs)
        best = fitted(front[chosen][0], u, y, weight)
    candidates = []
    for form, judged in front:
        judged["scatter"] *= spread
        figures: Any = {name: float(f"{value:.4g}") for name, value in judged.items()}
        candidates.append(Candidate(**written(form), **figures))
    left = float(f"{_scatter(best.values(u) - y) * spread:.4g}")
    return Choice(**written(best), scatter=left, front=candidates, chosen=chosen)


def _front(
    forms: Sequence[Template], u: FloatArray, y: FloatArray, standard_errors: float
) -> tuple[list[tuple[Template, dict[str, float]]], int]:
    """The front with its figures, and the position of the chosen formula in it."""
    residuals = [y - form.values(u) for form in forms]
    scales = [_scatter(residual) for residual in residuals]
    # One scale for all, or a formula could buy a small loss with a large scale.
    sigma = max(min(s for s in scales if np.isfinite(s)), 1e-6)
    losses = [1.0 - np.maximum(0.0, 1.0 - np.square(r / sigma / BISQUARE)) ** 3 for r in residuals]
    means = [float(np.mean(loss)) for loss in losses]
    front: list[int] = []
    for i in sorted(range(len(forms)), key=lambda i: (forms[i].complexity, means[i], i)):
        if np.isfinite(means[i]) and (not front or means[i] < means[front[-1]]):
            front.append(i)
    best, entries, close = front[-1], [], []
    for i in front:
        judged = {"loss": means[i], "scatter": scales[i], "behind": means[i] - means[best]}
        error = float(np.std(losses[i] - losses[best])) / math.sqrt(len(y))
        entries.append((forms[i], {**judged, "standard_error": error}))
        close.append(judged["behind"] <= standard_errors * error)
    return entries, close.index(True)


def fit_numbers(form: Template, u: FloatArray, y: FloatArray, weight: FloatArray) -> Template:
    """Fit the numbers of a formula robustly, from those it has, which set the scale of the loss.

    By the bisquare (Beaton & Tukey 1974, Technometrics 16, 147).
    """
    from scipy.optimize import least_squares

    sigma = max(_scatter(form.values(u) - y), 1e-6)

    def loss(z: FloatArray) -> FloatArray:
        left = np.maximum(0.0, 1.0 - z / BISQUARE**2)
        parts = [BISQUARE**2 / 3 * (1 - left**3), left**2, -2 / BISQUARE**2 * left]
        return np.asarray(weight * np.stack(parts))

    try:
        found = least_squares(
            lambda numbers: (form.with_numbers(numbers).values(u) - y) / sigma,
            form.numbers,
            lambda numbers: form.with_numbers(numbers).gradient(u) / sigma,
            **{"loss": loss, "x_scale": "jac", "ftol": 1e-6, "max_nfev": 30},
        )
    except (ValueError, np.linalg.LinAlgError):  # not finite at a pair
        return form
    return form.with_numbers(found.x)


def _scatter(residual: FloatArray) -> float:
    return MAD_TO_SIGMA * float(np.median(np.abs(residual)))


# --- engines -----------------------------------------------------------------------------------


def _require(engine: str) -> None:
    """Raise `ModelError` where an engine is not installed, without importing it."""
    # Importing pysr without Julia would download one.
    needed = {"operon": ["pyoperon"], "pysr": ["pysr", "juliacall"]}[engine] + ["sympy"]
    missing = [n for n in needed if sys.modules.get(n, n) is None or not find_spec(n)]
    how = "Install it with: pip install 'sos_dask[symbolic]'"
    if engine == "pysr":
        how = "Install Julia and 'pip install pysr', or set engine = 'operon'."
        if not (shutil.which("julia") or os.environ.get("PYTHON_JULIACALL_EXE")):
            missing.append("julia")
    if missing:
        needs = f"symbolic.engine = '{engine}' needs {', '.join(missing)}"
        raise ModelError(f"{needs}, which is not installed", how)


def _operon(z: FloatArray, y: FloatArray, settings: Settings, names: list[str]) -> list[str]:
    from pyoperon.sklearn import SymbolicRegressor

    symbols = ["add", "sub", "mul", "constant", "variable"]
    if settings.operators == "rational":
        symbols.append("div")
    regressor = SymbolicRegressor(
        allowed_symbols=",".join(symbols),
        objectives=["r2", "length"],
        max_length=settings.max_length,
        population_size=settings.population,
        generations=settings.generations,
        max_evaluations=10**9,
        optimizer_iterations=3,
        epsilon=1e-6,
        n_threads=1,
        random_state=settings.seed,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        regressor.fit(z, y)
        trees = [entry["tree"] for entry in regressor.pareto_front_]
        return [regressor.get_model_string(tree, precision=15, names=names) for tree in trees]


def _pysr(z: FloatArray, y: FloatArray, settings: Settings, names: list[str]) -> list[str]:
    # Cranmer 2023, arXiv:2305.01582
    from pysr import PySRRegressor

    with tempfile.TemporaryDirectory() as folder:
        regressor = PySRRegressor(
            binary_operators=["+", "-", "*", *["/"] * (settings.operators == "rational")],
            maxsize=max(7, settings.max_length),
            population_size=max(20, settings.population // 10),
            niterations=settings.generations,
            random_state=settings.seed,
            deterministic=True,
            parallelism="serial",
            progress=False,
            verbosity=0,
            output_directory=folder,
        )
        regressor.fit(z, y, variable_names=names)
        return [str(text) for text in regressor.equations_["equation"]]


_ENGINES = {"operon": _operon, "pysr": _pysr}


# --- the sample --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """Inputs are shifted by a short number; while formulas evolve they are scaled too."""

    info: ModelInfo
    pivot: tuple[float, ...]
    width: tuple[float, ...]

    @classmethod
    def of(cls, summary: Summary) -> Scale:
        """Of the pairs that are trained with."""
        width = [float(f"{deviation:.1e}") for deviation in summary.deviation.tolist()]
        # A short number within half of the width.
        pivot = [
            round(mean, -math.floor(math.log10(size))) + 0.0
            for mean, size in zip(summary.mean.tolist(), width, strict=True)
        ]
        return cls(summary.info, tuple(pivot), tuple(width))

    def shift(self, features: Float32Array) -> FloatArray:
        """Columns of inputs less their pivots, shape (k, n)."""
        return np.ascontiguousarray((features.astype(np.float64) - np.array(self.pivot)).T)

    def finite(self, form: Template) -> bool:
        """Tell whether a formula is finite in the training box."""
        if not np.isfinite(form.numbers).all():
            return False
        formula = Formula.parse(form.written(self.pivot)[0], self.info.problem.features)
        return formula.is_finite(self.info.minimum, self.info.maximum)


def draw_sample(training: Training, scale: Scale, wanted: int, *, even: bool = True) -> Rows:
    """Draw about so many training pairs, the same in any order and any partitions.

    Fewer are taken where pairs are dense, unless ``even`` is false. They are sorted by their hash.
    """
    counts = np.sum(training.map(_cell_counts, scale), axis=0)
    chosen = training.map(_chosen_rows, scale, _shares(counts, wanted, even))
    hashes, *columns = (np.concatenate(parts) for parts in zip(*chosen, strict=True))
    # Rows of one hash are equal, but for one in 1e19.
    order = np.argsort(hashes, kind="stable")
    return Rows(*(column[order] for column in columns))


def _shares(counts: IntArray, wanted: int, even: bool) -> FloatArray:
    """Share of the pairs of each cell that is taken: about a / sqrt(pairs), at most all."""
    from scipy.optimize import brentq

    if counts.sum() <= wanted:
        return np.ones(len(counts))
    root = np.sqrt(np.maximum(counts, 1)) if even else np.ones(len(counts))
    a: float = brentq(
        lambda a: counts @ np.minimum(1.0, a / root) - wanted, 0.0, root.max(), xtol=1e-12
    )
    return np.minimum(1.0, a / root)


def _cells(rows: Rows, scale: Scale) -> IntArray:
    z = (scale.shift(rows.features) / np.array(scale.width)[:, None])[:_MOST_AXES]
    places = np.clip(np.floor((z + 3) * (CELLS / 6)), 0, CELLS - 1).astype(np.int64)
    return np.asarray(np.ravel_multi_index(tuple(places), (CELLS,) * len(places)))


def _cell_counts(rows: Rows, scale: Scale) -> IntArray:
    return np.bincount(_cells(rows, scale), minlength=CELLS ** len(scale.pivot[:_MOST_AXES]))


def _chosen_rows(rows: Rows, scale: Scale, share: FloatArray) -> tuple[NDArray[Any], ...]:
    hashes = base.hash_rows(rows.features, rows.differences, rows.weight[:, None])
    chosen = (hashes >> np.uint64(11)) * 2.0**-53 < share[_cells(rows, scale)]
    columns = (hashes, rows.features, rows.differences, rows.weight)
    return tuple(column[chosen] for column in columns)
