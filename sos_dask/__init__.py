"""Put stellar spectroscopic surveys on one scale: out of core, exact on the sky, restartable."""

import importlib
import os
from typing import Any

# Threads that wait for each other sleep: on a busy machine they would burn what the others need.
# OpenMP reads it when it is loaded, with XGBoost or scikit-learn.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__version__ = "0.1.0"
_ESTIMATORS = ("Boosted", "Hybrid", "Polynomial", "Symbolic")
_PUBLIC = dict.fromkeys(_ESTIMATORS, "corrections.estimators") | {"Correction": "tables"}


def __getattr__(name: str) -> Any:
    """Import a public class where it is first asked for: most programs need none of them."""
    if name not in _PUBLIC:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    """Names of the module."""
    return sorted([*globals(), *_PUBLIC])
