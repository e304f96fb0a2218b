"""Repeats of one star: which rows are the same star (`group`), and one row for each (`combine`)."""

from sos_dask.dedupe.combining import combine
from sos_dask.dedupe.edges import Edges
from sos_dask.dedupe.grouping import Groups, group
from sos_dask.dedupe.settings import METHODS, DedupeSettings

__all__ = ["METHODS", "DedupeSettings", "Edges", "Groups", "combine", "group"]
