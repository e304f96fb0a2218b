"""A readable formula for each difference, found by symbolic regression.

1. A sample of the training pairs: where pairs are dense fewer of them are taken (each cell of a
   coarse grid gives in proportion to the square root of its pairs). Which ones, a hash of their
   numbers says, so the sample is the same in any order of the pairs and any partitions.
2. Half of the sample evolves formulas: genetic programming with two goals, accuracy and length
   (Operon: Burlacu, Kronberger & Kommenda 2020, GECCO Companion, 1562), on differences clipped at
   ``CLIP`` spreads. One thread and one seed give the same formulas again.
3. Every formula of the front is brought to a normal form, refused where it is not finite all over
   the training box, and its numbers are fitted robustly (bisquare weights).
4. The other half of the sample judges: of the formulas that lose to the best by no more than one
   standard error of the difference, the least complex is taken (Breiman et al. 1984,
   Classification and Regression Trees, section 3.4.3).
5. Its numbers are fitted once more to all training pairs, batch by batch.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from sos_dask.errors import ModelError
from sos_dask.features import BLOCK_ROWS, FEATURES
from sos_dask.models import (
    Content,
    Fitted,
    Float32Array,
    FloatArray,
    Histogram,
    IntArray,
    ModelInfo,
    Param,
    Progress,
    Rows,
    Summary,
    TrainingSource,
    count,
    map_batches,
    parse_json,
    summarise,
    to_json,
    training_rows,
)
from sos_dask.models.formula import Expression, Formula
from sos_dask.schema import LABELS

FILE = "formula.json"
MIN_PAIRS = 200
CLIP = 4.0
BISQUARE = 4.685
MAD_TO_SIGMA = 1.4826
# Cells of the grid of the sample, over +- 3 standard deviations of each feature.
CELLS = 8
STEPS = 12
CALM = 1e-4

PARAMS = {
    "n_sample": Param(4000, "Pairs that search and judge formulas, half each", 200, 100_000),
    "max_length": Param(30, "Most nodes of a formula while it evolves", 3, 200),
    "population": Param(400, "Formulas alive at once", 10, 100_000),
    "generations": Param(50, "Generations", 1, 100_000),
    "operators": Param(
        "rational",
        "Whether formulas may divide",
        choices=("polynomial", "rational"),
    ),
    "standard_errors": Param(
        1.0, "How much worse than the best a simpler formula may be, in standard errors", 0.0, 100.0
    ),
    "engine": Param("operon", "What evolves the formulas", choices=("operon", "pysr")),
    "seed": Param(0, "Seed of the evolution", 0, 2**31 - 1),
}


@dataclass(frozen=True)
class Candidate:
    """A formula of the front.

    Parameters
    ----------
    formula : str
        Of the features; Python and SymPy read it.
    latex : str
    complexity : int
        Numbers, features and operators; a feature less a fixed number counts as one.
    loss : float
        Mean bisquare loss of the judging half, 0 (perfect) to 1.
    scatter : float
        1.4826 times the median absolute residual of the judging half, K or dex.
    behind, standard_error : float
        Loss less that of the best, and the standard error of that.
    """

    formula: str
    latex: str
    complexity: int
    loss: float
    scatter: float
    behind: float
    standard_error: float


@dataclass(frozen=True)
class Choice:
    """The formula of one label.

    Parameters
    ----------
    formula : Formula
        Numbers fitted to all training pairs.
    latex : str
    complexity : int
    scatter : float
        Of all training pairs, K or dex.
    front : tuple of Candidate
        By complexity, numbers fitted to the sample; each is better than all before it.
    chosen : int
        Position in the front.
    """

    formula: Formula
    latex: str
    complexity: int
    scatter: float
    front: tuple[Candidate, ...]
    chosen: int


class SymbolicCorrection(Fitted):
    """One formula a label.

    Parameters
    ----------
    info : ModelInfo
    choices : tuple of Choice
    n_sample : int
        Pairs that searched and judged.
    """

    def __init__(self, info: ModelInfo, choices: tuple[Choice, ...], n_sample: int) -> None:
        super().__init__(info)
        self.choices = choices
        self.n_sample = n_sample

    def evaluate(self, features: Float32Array) -> Float32Array:
        """Differences at finite features inside the box, shape (n, 3)."""
        columns = [choice.formula.evaluate(features) for choice in self.choices]
        return np.stack(columns, axis=1).astype(np.float32)

    def files(self) -> Mapping[str, bytes]:
        """``formula.json``: formulas as text, which is what is evaluated, LaTeX, and the fronts."""
        document: dict[str, Any] = {
            "features": "teff_5040 = Teff / 5040 K, logg, feh",
            "n_sample": self.n_sample,
            "labels": {},
        }
        for label, choice in zip(LABELS, self.choices, strict=True):
            document["labels"][label] = {
                "formula": choice.formula.text,
                "latex": choice.latex,
                "complexity": choice.complexity,
                "scatter": choice.scatter,
                "chosen": choice.chosen,
                "front": [asdict(candidate) for candidate in choice.front],
            }
        return {FILE: to_json(document)}


def restore(info: ModelInfo, files: Mapping[str, Content]) -> SymbolicCorrection:
    """Model from its files; `ModelError` where they are incomplete or hold more than arithmetic."""
    document = parse_json(bytes(files.get(FILE, b"")), FILE)
    choices = []
    try:
        for label in LABELS:
            entry = document["labels"][label]
            front = tuple(Candidate(**candidate) for candidate in entry["front"])
            choices.append(
                Choice(
                    formula=Formula.parse(str(entry["formula"])),
                    latex=str(entry["latex"]),
                    complexity=int(entry["complexity"]),
                    scatter=float(entry["scatter"]),
                    front=front,
                    chosen=int(entry["chosen"]),
                )
            )
        n_sample = int(document["n_sample"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{FILE}: incomplete or damaged ({error!r})") from None
    except ModelError as error:
        raise ModelError(f"{FILE}: {label}: {error.message}", error.hint) from None
    for label, choice in zip(LABELS, choices, strict=True):
        if not choice.formula.is_finite(info.minimum, info.maximum):
            raise ModelError(f"{FILE}: the formula of {label} is not finite in the training range")
    return SymbolicCorrection(info, tuple(choices), n_sample)


def fit(
    source: TrainingSource,
    train_folds: Sequence[int] | None,
    params: Mapping[str, Any],
    client: Any,
    progress: Progress,
) -> SymbolicCorrection:
    """Fit; see `sos_dask.models.fit`.

    With a client the labels evolve on its workers, at the same time. The formulas are the same.
    """
    summary = summarise(source, train_folds, client, "symbolic", MIN_PAIRS)
    _require(params["engine"])
    scale = _Scale.of(summary)
    sample = _sample(source, train_folds, client, scale, params["n_sample"])
    job = _Job(sample, scale, summary, params)
    found = map_batches(_search, cast(TrainingSource, job), client)
    progress("symbolic", 1, 2)
    fitted = _refine(source, train_folds, client, scale, summary, [f.best for f in found])
    choices = []
    for one, (expression, scatter) in zip(found, fitted, strict=True):
        text = expression.text(scale.pivot)
        choices.append(
            Choice(
                formula=Formula.parse(text),
                latex=expression.latex(scale.pivot),
                complexity=expression.complexity,
                scatter=_short(scatter),
                front=one.front,
                chosen=one.chosen,
            )
        )
    progress("symbolic", 2, 2)
    info = summary.info("symbolic", params, train_folds)
    return SymbolicCorrection(info, tuple(choices), len(sample.features))


# --- what the formulas are of -------------------------------------------------------------------


@dataclass(frozen=True)
class _Scale:
    """Features are shifted by a short number; while formulas evolve they are scaled too."""

    pivot: tuple[float, ...]
    width: tuple[float, ...]
    minimum: tuple[float, ...]
    maximum: tuple[float, ...]

    @classmethod
    def of(cls, summary: Summary) -> _Scale:
        pivot, width = [], []
        for mean, deviation in zip(summary.mean.tolist(), summary.deviation.tolist(), strict=True):
            wide = deviation > 1e-6 * max(1.0, abs(mean))
            size = float(f"{deviation:.1e}") if wide else 1.0
            # A short number within half of the width.
            pivot.append(round(mean, -math.floor(math.log10(size))) + 0.0)
            width.append(size)
        return cls(
            tuple(pivot),
            tuple(width),
            tuple(summary.minimum.tolist()),
            tuple(summary.maximum.tolist()),
        )

    def shift(self, features: Float32Array) -> FloatArray:
        """Columns of features less their pivots, shape (3, n)."""
        return np.ascontiguousarray((features.astype(np.float64) - np.array(self.pivot)).T)

    def finite(self, expression: Expression) -> bool:
        """Whether an expression is finite in the training box."""
        return Formula.parse(expression.text(self.pivot)).is_finite(self.minimum, self.maximum)


# --- the sample ---------------------------------------------------------------------------------


def _sample(
    source: TrainingSource,
    train_folds: Sequence[int] | None,
    client: Any,
    scale: _Scale,
    wanted: int,
) -> Rows:
    """Pairs to search and judge with, sorted by their hash."""
    parts = map_batches(_cell_counts, source, client, train_folds, scale)
    counts = np.sum(parts, axis=0)
    share = _shares(counts, wanted)
    chosen = map_batches(_chosen_rows, source, client, train_folds, scale, share)
    hashes = np.concatenate([part[0] for part in chosen])
    rows = [
        np.concatenate([getattr(part[1], name) for part in chosen])
        for name in ("features", "differences", "weight")
    ]
    # Rows of one hash are equal, but for one in 1e19.
    order = np.argsort(hashes, kind="stable")
    return Rows(*(values[order] for values in rows))


def _shares(counts: IntArray, wanted: int) -> FloatArray:
    """Share of the pairs of each cell that is taken: about a / sqrt(pairs), at most all."""
    if counts.sum() <= wanted:
        return np.ones(len(counts))
    root = np.sqrt(np.maximum(counts, 1))
    low, high = 0.0, float(root.max())
    for _ in range(60):
        middle = (low + high) / 2
        if (counts * np.minimum(1.0, middle / root)).sum() < wanted:
            low = middle
        else:
            high = middle
    return np.minimum(1.0, low / root)


def _cells(rows: Rows, scale: _Scale) -> IntArray:
    z = scale.shift(rows.features) / np.array(scale.width)[:, None]
    places = np.clip(np.floor((z + 3) * (CELLS / 6)), 0, CELLS - 1).astype(np.int64)
    return np.asarray((places[0] * CELLS + places[1]) * CELLS + places[2])


def _cell_counts(
    source: TrainingSource, index: int, train_folds: Sequence[int] | None, scale: _Scale
) -> IntArray:
    rows = training_rows(source.load(index), train_folds)
    return np.bincount(_cells(rows, scale), minlength=CELLS**3)


def _chosen_rows(
    source: TrainingSource,
    index: int,
    train_folds: Sequence[int] | None,
    scale: _Scale,
    share: FloatArray,
) -> tuple[NDArray[np.uint64], Rows]:
    rows = training_rows(source.load(index), train_folds)
    hashes = _hash(rows)
    chosen = (hashes >> np.uint64(11)) * 2.0**-53 < share[_cells(rows, scale)]
    picked = Rows(rows.features[chosen], rows.differences[chosen], rows.weight[chosen])
    return hashes[chosen], picked


def _hash(rows: Rows) -> NDArray[np.uint64]:
    """Of the numbers of each row (the finaliser of splitmix64, Steele et al. 2014)."""
    values = np.concatenate([rows.features, rows.differences, rows.weight[:, None]], axis=1)
    # One bit pattern for all nan, one for both zeros.
    values = np.where(np.isnan(values), np.float32(np.nan), values + np.float32(0))
    state = np.zeros(len(values), dtype=np.uint64)
    for column in np.ascontiguousarray(values.T, dtype=np.float32).view(np.uint32):
        state += column + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        state ^= state >> np.uint64(31)
    return state


# --- search and choice --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """Work to do, one label an index, as `map_batches` takes it."""

    sample: Rows
    scale: _Scale
    summary: Summary
    params: Mapping[str, Any]

    @property
    def n_batches(self) -> int:
        return len(LABELS)


@dataclass(frozen=True)
class _Found:
    front: tuple[Candidate, ...]
    chosen: int
    best: Expression


def _search(source: TrainingSource, label: int) -> _Found:
    """The front of one label and the formula chosen from it."""
    job = cast(_Job, source)
    scale, center, spread = job.scale, job.summary.center[label], job.summary.spread[label]
    known = np.isfinite(job.sample.differences[:, label])
    u = scale.shift(job.sample.features[known])
    y = (job.sample.differences[known, label].astype(np.float64) - center) / spread
    # The sample is in the order of its hash: any two halves are alike.
    half = len(y) // 2
    z = np.clip((u.T / np.array(scale.width))[:half], -5, 5)
    evolved = (_operon if job.params["engine"] == "operon" else _pysr)(
        z, np.clip(y[:half], -CLIP, CLIP), job.params
    )
    forms: dict[tuple[Any, ...], Expression] = {}
    for expression in [Expression.number(0.0), *evolved]:
        # Unscaled, with a constant of its own: there is nothing that all formulas need more.
        own = expression.rescaled(scale.width)
        if not any(product == () for product, _ in own.terms):
            own = Expression(((((), 0.0)), *own.terms))
        forms.setdefault(own.form(), own)
    fitted = []
    for expression in forms.values():
        if not np.isfinite(expression.parameters()).all() or not scale.finite(expression):
            continue
        better = _fit_sample(expression, u[:, :half], y[:half])
        fitted.append(better if scale.finite(better) else expression)
    return _choose(fitted, job, label, u[:, half:], y[half:])


def _choose(
    expressions: Sequence[Expression], job: _Job, label: int, u: FloatArray, y: FloatArray
) -> _Found:
    center, spread = float(job.summary.center[label]), float(job.summary.spread[label])
    with np.errstate(all="ignore"):
        residuals = [y - e.value_and_gradient(u)[0] for e in expressions]
    scales = [MAD_TO_SIGMA * float(np.median(np.abs(r))) for r in residuals]
    # One scale for all, or a formula could buy a small loss with a large scale.
    sigma = max(min(s for s in scales if np.isfinite(s)), 1e-6)
    losses = [_loss(residual / sigma) for residual in residuals]
    means = [float(np.mean(loss)) for loss in losses]
    order = sorted(range(len(expressions)), key=lambda i: (expressions[i].complexity, means[i], i))
    front: list[int] = []
    for i in order:
        if np.isfinite(means[i]) and (not front or means[i] < means[front[-1]]):
            front.append(i)
    best = front[-1]
    candidates = []
    chosen = len(front) - 1
    for place, i in reversed(list(enumerate(front))):
        difference = losses[i] - losses[best]
        error = float(np.std(difference)) / math.sqrt(len(difference))
        behind = means[i] - means[best]
        if behind <= job.params["standard_errors"] * error:
            chosen = place
        whole = _in_units(expressions[i], center, spread)
        candidates.append(
            Candidate(
                formula=whole.text(job.scale.pivot),
                latex=whole.latex(job.scale.pivot),
                complexity=whole.complexity,
                loss=_short(means[i]),
                scatter=_short(scales[i] * spread),
                behind=_short(behind),
                standard_error=_short(error),
            )
        )
    return _Found(tuple(reversed(candidates)), chosen, expressions[front[chosen]])


def _in_units(expression: Expression, center: float, spread: float) -> Expression:
    """A formula of scaled differences as one in K or dex."""
    return expression.scaled(spread) + Expression.number(center)


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _weight(u: FloatArray) -> FloatArray:
    return np.square(np.maximum(0.0, 1.0 - np.square(u / BISQUARE)))


def _loss(u: FloatArray) -> FloatArray:
    """Bisquare loss, 0 to 1 (Beaton & Tukey 1974, Technometrics 16, 147)."""
    return np.asarray(1.0 - np.maximum(0.0, 1.0 - np.square(u / BISQUARE)) ** 3)


# --- numbers ------------------------------------------------------------------------------------


def _fit_sample(expression: Expression, u: FloatArray, y: FloatArray) -> Expression:
    """Robust fit of the numbers of an expression to pairs in memory."""

    def look(trial: Expression, sigma: float | None) -> _Look:
        return _look(trial, u, y, np.ones(len(y)), sigma)

    first = look(expression, None)
    fitter = _Fitter(expression, max(first.sigma(), 1e-6))
    while not fitter.done:
        fitter.take(look(fitter.trial, fitter.sigma))
    return fitter.best


@dataclass(frozen=True)
class _Look:
    """Weighted normal equations of an expression, its loss, and its residuals."""

    normal: FloatArray
    right: FloatArray
    loss: float
    total: float
    counts: tuple[NDArray[np.uint16], IntArray]

    def sigma(self) -> float:
        return _sigma([self.counts])


def _sigma(counts: Sequence[tuple[NDArray[np.uint16], IntArray]]) -> float:
    histogram = Histogram()
    for part in counts:
        histogram.add(part)
    return MAD_TO_SIGMA * float(histogram.quantiles((0.5,))[0])


def _look(
    expression: Expression, u: FloatArray, y: FloatArray, weight: FloatArray, sigma: float | None
) -> _Look:
    m = len(expression.parameters())
    normal, right = np.zeros((m, m)), np.zeros(m)
    loss, total = 0.0, 0.0
    sizes = np.empty(len(y), dtype=np.float32)
    for start in range(0, len(y), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        with np.errstate(all="ignore"):
            value, gradient = expression.value_and_gradient(u[:, block])
            residual = y[block] - value
            sizes[block] = np.abs(residual)
            if sigma is None:
                continue
            loss += float(weight[block] @ _loss(residual / sigma))
            total += float(weight[block].sum())
            weighted = gradient * (weight[block] * _weight(residual / sigma))
            # Not a matrix product: its last bits may depend on the number of threads.
            normal += np.einsum("in,jn->ij", weighted, gradient)
            right += np.einsum("in,n->i", weighted, residual)
    return _Look(normal, right, loss, total, count(sizes))


class _Fitter:
    """Levenberg-Marquardt steps for the bisquare loss: a step that does not help is taken back."""

    def __init__(self, start: Expression, sigma: float) -> None:
        self.best = self.trial = start
        self.sigma = sigma
        self.done = not start.parameters()
        self._loss = math.inf
        self._damping = 1e-3
        self._left = STEPS
        self._normal = self._right = np.zeros(0)

    def take(self, look: _Look) -> None:
        """Go on from what was seen at ``trial``."""
        loss = look.loss / look.total if look.total else math.inf
        finite = np.isfinite(look.normal).all() and np.isfinite(look.right).all()
        if math.isfinite(loss) and finite and loss < self._loss:
            calm = self._loss - loss < CALM * loss
            self.best, self._loss = self.trial, loss
            self._normal, self._right = look.normal, look.right
            self._damping /= 10
        else:
            calm = self._damping > 1e3
            self._damping *= 30
        self._left -= 1
        if calm or self._left <= 0 or not math.isfinite(self._loss):
            self.done = True
            return
        size = np.sqrt(np.diag(self._normal))
        size = np.where(size > 0, size, 1.0)
        matrix = self._normal / np.outer(size, size)
        matrix[np.diag_indices_from(matrix)] += self._damping
        step = np.linalg.lstsq(matrix, self._right / size, rcond=1e-12)[0] / size
        self.trial = self.best.with_parameters(np.array(self.best.parameters()) + step)


def _refine(
    source: TrainingSource,
    train_folds: Sequence[int] | None,
    client: Any,
    scale: _Scale,
    summary: Summary,
    expressions: Sequence[Expression],
) -> list[tuple[Expression, float]]:
    """Numbers fitted to all training pairs, and the scatter, per label, in K or dex."""

    def looks(trials: Sequence[Expression], sigma: Sequence[float] | None) -> list[list[_Look]]:
        parts = map_batches(
            _look_at_batch, source, client, train_folds, scale, summary, trials, sigma
        )
        return [list(of_label) for of_label in zip(*parts, strict=True)]

    start = looks(expressions, None)
    sigma = [max(_sigma([part.counts for part in parts]), 1e-6) for parts in start]
    fitters = [_Fitter(e, s) for e, s in zip(expressions, sigma, strict=True)]
    while not all(fitter.done for fitter in fitters):
        seen = looks([fitter.trial for fitter in fitters], sigma)
        for fitter, parts in zip(fitters, seen, strict=True):
            if not fitter.done:
                fitter.take(_added(parts))
    final = []
    for label, (fitter, before) in enumerate(zip(fitters, expressions, strict=True)):
        center, spread = float(summary.center[label]), float(summary.spread[label])
        # A pole may have come near.
        best = fitter.best if scale.finite(fitter.best) else before
        whole = _in_units(best, center, spread)
        # The formula is what its text says.
        short = [float(f"{value:.6g}") for value in whole.parameters()]
        final.append((best, whole.with_parameters(short)))
    ends = looks([best for best, _ in final], None)
    scatter = [_sigma([part.counts for part in parts]) for parts in ends]
    return [
        (whole, s * float(summary.spread[label]))
        for label, ((_, whole), s) in enumerate(zip(final, scatter, strict=True))
    ]


def _look_at_batch(
    source: TrainingSource,
    index: int,
    train_folds: Sequence[int] | None,
    scale: _Scale,
    summary: Summary,
    expressions: Sequence[Expression],
    sigma: Sequence[float] | None,
) -> list[_Look]:
    rows = training_rows(source.load(index), train_folds)
    u = scale.shift(rows.features)
    weight = rows.weight.astype(np.float64) / summary.mean_weight
    out = []
    for label, expression in enumerate(expressions):
        known = np.isfinite(rows.differences[:, label])
        y = rows.differences[known, label].astype(np.float64)
        y = (y - summary.center[label]) / summary.spread[label]
        one = None if sigma is None else sigma[label]
        out.append(_look(expression, u[:, known], y, weight[known], one))
    return out


def _added(parts: Sequence[_Look]) -> _Look:
    total = parts[0]
    for part in parts[1:]:
        total = _Look(
            total.normal + part.normal,
            total.right + part.right,
            total.loss + part.loss,
            total.total + part.total,
            part.counts,
        )
    return total


# --- engines ------------------------------------------------------------------------------------


def _require(engine: str) -> None:
    """Raise `ModelError` where an engine is not installed, without importing it."""
    if engine == "operon":
        if not _installed("pyoperon"):
            raise ModelError(
                "method 'symbolic' needs pyoperon, which is not installed",
                "Install it with: pip install 'sos_dask[symbolic]'",
            )
        return
    # Importing pysr without Julia would download one.
    missing = [name for name in ("pysr", "juliacall") if not _installed(name)]
    if not (shutil.which("julia") or os.environ.get("PYTHON_JULIACALL_EXE")):
        missing.append("julia")
    if missing:
        raise ModelError(
            f"symbolic.engine = 'pysr' needs {', '.join(missing)}, which is not there",
            "Install Julia and 'pip install pysr', or set engine = 'operon'.",
        )


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:
        return False


def _operon(z: FloatArray, y: FloatArray, params: Mapping[str, Any]) -> list[Expression]:
    """Formulas that Operon finds, of scaled features."""
    _require("operon")
    from pyoperon.sklearn import SymbolicRegressor

    symbols = ["add", "sub", "mul", "constant", "variable"]
    if params["operators"] == "rational":
        symbols.append("div")
    regressor = SymbolicRegressor(
        allowed_symbols=",".join(symbols),
        objectives=["r2", "length"],
        max_length=params["max_length"],
        population_size=params["population"],
        generations=params["generations"],
        max_evaluations=10**9,
        optimizer_iterations=3,
        epsilon=1e-6,
        n_threads=1,
        random_state=params["seed"],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        regressor.fit(z, y)
    positions = {key: number for number, key in enumerate(regressor.variables_)}
    found = []
    for entry in regressor.pareto_front_:
        with contextlib.suppress(ZeroDivisionError, OverflowError):
            found.append(_from_operon(entry["tree"].Nodes, positions))
    return found


def _from_operon(nodes: Sequence[Any], positions: Mapping[int, int]) -> Expression:
    """A tree of Operon: postfix, the first argument next to its operator."""
    stack: list[Expression] = []
    for node in nodes:
        kind = str(node.Type).rpartition(".")[2]
        if node.IsVariable:
            stack.append(Expression.name(positions[node.HashValue]).scaled(float(node.Value)))
        elif node.IsConstant:
            stack.append(Expression.number(float(node.Value)))
        else:
            value, *others = [stack.pop() for _ in range(node.Arity)]
            for other in others:
                match kind:
                    case "Add":
                        value = value + other
                    case "Sub":
                        value = value - other
                    case "Mul":
                        value = value * other
                    case "Div":
                        value = value / other
                    case _:
                        raise ModelError(f"Operon gave a formula with '{kind}'")
            stack.append(value)
    (whole,) = stack
    return whole


def _pysr(z: FloatArray, y: FloatArray, params: Mapping[str, Any]) -> list[Expression]:
    """Formulas that PySR finds (Cranmer 2023, arXiv:2305.01582), of scaled features."""
    _require("pysr")
    from pysr import PySRRegressor

    with _scratch() as folder:
        regressor = PySRRegressor(
            binary_operators=["+", "-", "*", *["/"] * (params["operators"] == "rational")],
            maxsize=max(7, params["max_length"]),
            population_size=max(20, params["population"] // 10),
            niterations=params["generations"],
            random_state=params["seed"],
            deterministic=True,
            parallelism="serial",
            progress=False,
            verbosity=0,
            output_directory=folder,
        )
        regressor.fit(z, y, variable_names=list(FEATURES))
        texts = [str(text) for text in regressor.equations_["equation"]]
    found = []
    for text in texts:
        with contextlib.suppress(ZeroDivisionError, OverflowError):
            found.append(Formula.parse(text).run(Expression.names(), Expression.number))
    return found


@contextlib.contextmanager
def _scratch() -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        yield folder
