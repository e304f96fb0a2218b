"""How well corrections do, side by side: figures with intervals, artifacts, and the choice of one.

`metrics` has what a single method says of itself, `figures` all methods on the same pairs with
`bootstrap` intervals, `artifact` whether a correction is smooth, and `choice` the rule that picks
one.
"""

from sos_dask.compare.metrics import (
    BinnedMedians,
    Metric,
    binned_median_rms,
    held_out_metrics,
    scatter,
)

__all__ = ["BinnedMedians", "Metric", "binned_median_rms", "held_out_metrics", "scatter"]
