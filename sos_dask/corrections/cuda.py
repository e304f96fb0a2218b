"""What is known of the GPU of a process before anything is trained on it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sos_dask.errors import ModelError


@dataclass(frozen=True)
class Gpu:
    """The GPU that XGBoost would use in a process.

    Parameters
    ----------
    problem, hint : str
        Why it would quietly train on the CPU, and what to do; empty where it would not.
    device : tuple of str
        Equal for processes that share a GPU.
    """

    problem: str
    hint: str = ""
    device: tuple[str, ...] = ()

    def require(self) -> None:
        """Raise `ModelError` where there is a problem."""
        if self.problem:
            raise ModelError(f"device = 'cuda': {self.problem}", self.hint)


def find_gpu() -> Gpu:
    """Look for the GPU of this process by training a tree on it."""
    import xgboost

    if not xgboost.build_info().get("USE_CUDA", False):
        return Gpu(
            f"XGBoost {xgboost.__version__} was built without CUDA",
            "Install 'xgboost' (not 'xgboost-cpu'), or set device = 'cpu'.",
        )
    x = np.zeros((4, 1), dtype=np.float32)
    params = {"device": "cuda", "tree_method": "hist", "verbosity": 0}
    with warnings.catch_warnings():
        # It warns and goes on with the CPU; what it used is in its configuration.
        warnings.simplefilter("ignore")
        try:
            booster = xgboost.train(params, xgboost.QuantileDMatrix(x, x[:, 0]), 1)
            used = json.loads(booster.save_config())["learner"]["generic_param"]["device"]
        except xgboost.core.XGBoostError as error:
            used = str(error).strip().splitlines()[0]
    if str(used).startswith("cuda"):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        return Gpu("", device=(socket.gethostname(), visible, _uuids()))
    return Gpu(
        f"no usable GPU here (XGBoost answers '{used}')",
        "Run where 'nvidia-smi' lists a GPU, or set device = 'cpu'.",
    )


def _uuids() -> str:
    """The GPUs that this process may see: a batch system may number them all 0."""
    command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def one_each(gpus: Mapping[str, Gpu]) -> list[str]:
    """The first of all workers that share a GPU: NCCL takes one process a GPU.

    Parameters
    ----------
    gpus : mapping of str to Gpu
        By worker.

    Raises
    ------
    ModelError
        One of them has none.
    """
    first: dict[tuple[str, ...], str] = {}
    for worker, gpu in gpus.items():
        gpu.require()
        first.setdefault(gpu.device, worker)
    return list(first.values())
