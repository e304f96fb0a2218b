"""Stages of a job as they are collected: where each output lies, and why it would be made."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sos_dask.errors import ConfigError
from sos_dask.rebuild.job import Job
from sos_dask.run.cluster import Cluster, Report
from sos_dask.storage.artifact import WORK, Manifest, Output, Recipe
from sos_dask.storage.catalog import Catalog
from sos_dask.storage.manifest import canonical_json
from sos_dask.storage.store import current_recipes, home, published


@dataclass(frozen=True)
class Stage:
    """One stage of a plan.

    Parameters
    ----------
    product : str
        Name of what it makes, unique in the plan.
    recipe : Recipe
    directory : Path
        Where the output is or will be.
    run : callable
        Makes the output; takes the cluster and a report.
    complete : bool
    reason : str
        Why it would run, or ``unchanged``.
    """

    product: str
    recipe: Recipe
    directory: Path
    run: Callable[[Cluster, Report], Manifest | None]
    complete: bool
    reason: str


class Planner:
    """Collects the stages of a job in order."""

    def __init__(self, job: Job, store: Path) -> None:
        self.job = job
        self.store = store
        self.stages: list[Stage] = []
        self.published = published(store)
        self.previous = current_recipes(store)
        self.names: dict[str, str] = {}  # of products and files, by fingerprint

    def add(
        self, product: str, recipe: Recipe, run: Callable[[Path, Cluster, Report], Manifest | None]
    ) -> str:
        """Add a stage; returns the fingerprint of its output."""
        if any(stage.product == product for stage in self.stages):
            raise ConfigError(f"two stages would make '{product}': give the surveys other names")
        directory = self.store / "artifacts" / recipe.stage / recipe.fingerprint
        place = home(recipe.stage, directory)
        complete = Output(place, recipe).complete
        self.names[recipe.fingerprint] = product
        reason = "unchanged" if complete else self._reason(product, recipe, place)
        self.stages.append(
            Stage(
                product,
                recipe,
                directory,
                lambda cluster, report: run(directory, cluster, report),
                complete,
                reason,
            )
        )
        return recipe.fingerprint

    def directory(self, fingerprint: str) -> Path:
        """Directory of an output planned before."""
        return next(s.directory for s in self.stages if s.recipe.fingerprint == fingerprint)

    def catalog(self, fingerprint: str) -> Catalog:
        """Catalog planned before; it exists once its stage has run."""
        return Catalog.open(self.directory(fingerprint))

    def chosen(self, comparison: str, trained: Mapping[str, str], rule: str) -> str:
        """Fingerprint of the model that corrects the catalog: that of the comparison until it ran.

        What is made with the model depends on the model alone, not on how it was chosen.
        """
        stage = next(s for s in self.stages if s.recipe.fingerprint == comparison)
        if rule in trained:
            return trained[rule]
        if not stage.complete:
            return comparison
        return trained[Manifest.load(stage.directory).summary["method"]]

    def _reason(self, product: str, recipe: Recipe, directory: Path) -> str:
        if (directory / WORK).is_dir():
            return "unfinished: goes on where it stopped"
        if self.published.get(product) == recipe.fingerprint:
            return "its output was removed"
        before = self.previous.get(product)
        if before is None:
            return "not built before"
        if before.stage != recipe.stage or before.version != recipe.version:
            return f"version of the stage {before.version} -> {recipe.version}"
        settings = _differences(before.params, recipe.params)
        inputs = [
            f"{self.names.get(now, name)} changed"
            for name, now in recipe.inputs.items()
            if now not in before.inputs.values()
        ]
        removed = [f"{name} removed" for name in before.inputs if name not in recipe.inputs]
        return "; ".join([*settings, *inputs, *removed])


def _differences(before: Any, after: Any, where: str = "") -> list[str]:
    """What differs between two JSON values, as ``key old -> new``."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        found = []
        for key in sorted({*before, *after}):
            inner = f"{where}.{key}" if where else str(key)
            found += _differences(before.get(key), after.get(key), inner)
        return found
    if canonical_json(before) == canonical_json(after):
        return []
    short = where.removeprefix("settings.").removeprefix("survey.")
    return [f"{short} {_brief(before)} -> {_brief(after)}"]


def _brief(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
