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

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np

from sos_dask.corrections import (
    Content,
    Fitted,
    Float32Array,
    FloatArray,
    ModelInfo,
    Param,
    Progress,
    Rows,
    Summary,
    TrainingSource,
    engines,
    map_batches,
    parse_json,
    summarise,
    to_json,
)
from sos_dask.corrections.expression import Expression
from sos_dask.corrections.formula import Formula
from sos_dask.corrections.refine import MAD_TO_SIGMA, bisquare_loss, fit_sample, in_units, refine
from sos_dask.corrections.sample import Scale, draw_sample
from sos_dask.errors import ModelError
from sos_dask.schema import LABELS

FILE = "formula.json"
MIN_PAIRS = 200
CLIP = 4.0

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
    """Fit; see `sos_dask.corrections.fit`.

    With a client the labels evolve on its workers, at the same time. The formulas are the same.
    """
    summary = summarise(source, train_folds, client, "symbolic", MIN_PAIRS)
    engines.require(params["engine"])
    scale = Scale.of(summary)
    sample = draw_sample(source, train_folds, client, scale, params["n_sample"])
    job = _Job(sample, scale, summary, params)
    found = map_batches(_search, cast(TrainingSource, job), client)
    progress("symbolic", 1, 2)
    fitted = refine(source, train_folds, client, scale, summary, [f.best for f in found])
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


@dataclass(frozen=True)
class _Job:
    """Work to do, one label an index, as `map_batches` takes it."""

    sample: Rows
    scale: Scale
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
    evolved = engines.evolve(z, np.clip(y[:half], -CLIP, CLIP), job.params)
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
        better = fit_sample(expression, u[:, :half], y[:half])
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
    losses = [bisquare_loss(residual / sigma) for residual in residuals]
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
        whole = in_units(expressions[i], center, spread)
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


def _short(value: float) -> float:
    return float(f"{value:.4g}")
