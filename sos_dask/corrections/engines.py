"""Programs that evolve formulas: Operon, and PySR where it is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from sos_dask.corrections import FloatArray
from sos_dask.corrections.expression import Expression
from sos_dask.corrections.formula import Formula
from sos_dask.errors import ModelError
from sos_dask.problem import FEATURES


def require(engine: str) -> None:
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


def evolve(z: FloatArray, y: FloatArray, params: Mapping[str, Any]) -> list[Expression]:
    """Formulas that an engine finds.

    Parameters
    ----------
    z : ndarray of float64, shape (n, 3)
        Scaled features.
    y : ndarray of float64, shape (n,)
    params : mapping
        Those of method ``symbolic``; ``engine`` says which one.
    """
    return (_operon if params["engine"] == "operon" else _pysr)(z, y, params)


def _operon(z: FloatArray, y: FloatArray, params: Mapping[str, Any]) -> list[Expression]:
    """Formulas that Operon finds, of scaled features."""
    require("operon")
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
    require("pysr")
    from pysr import PySRRegressor

    with tempfile.TemporaryDirectory() as folder:
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
