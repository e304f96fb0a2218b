"""Loading numba, and compiling loops with it.

The machine code is kept on disk, beside the file of a loop or else in the user's cache folder, so
that it is made once on a machine. No operation is reordered or fused: results are those of the same
sums written in numpy.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar, cast

from numba import njit, types

F = TypeVar("F", bound=Callable[..., Any])


def _load_numba() -> None:
    """Load what numba needs for any loop without its look for BLAS: no loop here uses it.

    It would import `scipy.linalg`, as long as all the rest, and forget all but that it is there.
    """
    name = "scipy.linalg.cython_blas"
    if name in sys.modules:
        return
    sys.modules[name] = ModuleType(name)
    try:
        importlib.import_module("numba.np.arraymath")
    finally:
        del sys.modules[name]


_load_numba()


def read_only(dtype: Any) -> Any:
    """An array that is only read: also one that shares the memory of an Arrow column."""
    return types.Array(dtype, 1, "C", readonly=True)


def compiled(*signatures: tuple[Any, ...]) -> Callable[[F], F]:
    """Compile a loop for arguments of these types; it returns nothing and holds no lock."""
    voids = [types.void(*one) for one in signatures]

    def decorate(function: F) -> F:
        try:
            made = njit(voids, error_model="numpy", nogil=True, cache=True)(function)
        except RuntimeError:  # no folder can be written: each process compiles for itself
            made = njit(voids, error_model="numpy", nogil=True)(function)
        return cast(F, made)

    return decorate
