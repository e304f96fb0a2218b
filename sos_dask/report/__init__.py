"""Report: figures and one page that a person can look at. Tables and counts in, bytes out."""

import importlib
import os

if named := os.environ.pop("MPLBACKEND", None):
    # A notebook names a backend there that other programs may not have; matplotlib then cannot be
    # imported. Figures here need none: they are drawn by Agg and the writer of PDF, not by pyplot.
    try:
        importlib.import_module("matplotlib")
    finally:
        os.environ["MPLBACKEND"] = named
