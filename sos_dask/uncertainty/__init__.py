"""How far a corrected label may be from its reference: calibrated intervals.

A *scale* model says how the size of target - reference - correction depends on the star:
log|residual| is the sum of a function of (Teff, log g, [Fe/H]), boosted trees on the cells of a
grid over the training box, and of a falling function of log S/N (isotonic regression); with fewer
than 2,000 pairs the first is a constant. The scale model need not be right: the factor
that turns it into an interval is counted on pairs it has not seen. That is split-conformal
prediction (Lei et al. 2018, JASA 113, 1094) with locally weighted scores |residual| / scale, in
its cross-conformal form (Vovk 2015, Ann. Math. Artif. Intell. 74, 9), separately for the *dense*
and the *sparse* class of cells (Mondrian: Vovk et al. 2005, Algorithmic Learning in a Random
World, ch. 4.5). The coverage that is reported is that of the whole procedure on pairs that
neither its scales nor its factors have seen: every part of the stars is left out in turn, and the
others go through all of it, with scales fitted without two parts for their scores.

An interval is that of the residual: it holds the error of the reference, too. Less that error, in
quadrature, it is as good as the errors that the reference states; only the whole is checked.

All is compiled into two tables, one over the cells and one over S/N, so that a row costs two
look-ups whatever the model.
"""

from sos_dask.uncertainty.conformal import (
    DENSE,
    LEVELS,
    SPARSE,
    Checked,
    Coverage,
    HeldOut,
    LabelErrors,
    Sparseness,
    binomial_interval,
    coverages,
    error_model,
    fit_label,
)
from sos_dask.uncertainty.tables import ErrorModel, Grid, load_errors

__all__ = [
    "DENSE",
    "LEVELS",
    "SPARSE",
    "Checked",
    "Coverage",
    "ErrorModel",
    "Grid",
    "HeldOut",
    "LabelErrors",
    "Sparseness",
    "binomial_interval",
    "coverages",
    "error_model",
    "fit_label",
    "load_errors",
]
