"""Commands on the evidence for a correction: compare, trends."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sos_dask.cli.options import OptionalOut, StepOptions, Store, find_store, with_step_options
from sos_dask.cli.output import LABEL_UNITS, console, print_json, say, show_table
from sos_dask.cli.steps import run_step
from sos_dask.errors import ConfigError

if TYPE_CHECKING:
    from sos_dask.storage.artifact import Manifest

_WIDE = 110  # columns of a terminal
_SUBSETS = ("all", "dense", "sparse", "logg < 1", "teff > 7000", "feh < -2", "feh > 0.2")

Inputs = Annotated[
    list[Path] | None,
    typer.Argument(
        metavar="PAIRS MODEL",
        help="Pairs and models trained on them; without: the current build of the store.",
        show_default=False,
    ),
]
Label = Annotated[
    str | None, typer.Option("--label", metavar="NAME", help="Only teff, logg or feh.")
]


@with_step_options
def compare(
    inputs: Inputs = None,
    out: OptionalOut = None,
    store: Store = None,
    label: Label = None,
    sample: Annotated[
        str | None,
        typer.Option(
            "--sample",
            metavar="NAME",
            help="test (held out) or train. Default: test; with --json both.",
            show_default=False,
        ),
    ] = None,
    rule: Annotated[
        str,
        typer.Option("--rule", metavar="NAME", help="With PAIRS: balanced, scatter or a method."),
    ] = "balanced",
    *,
    options: StepOptions,
) -> None:
    """Show how the methods compare: scatter, trends left, artifacts, and which is chosen and why.

    Example: sos-dask compare --store store --label feh
    """
    from sos_dask.stages.compare import CompareSettings, read_comparison
    from sos_dask.stages.compare import compare as run

    label, sample = _one_of("label", label, LABEL_UNITS), _one_of("sample", sample, _SAMPLES)
    costs = None
    if inputs:
        options.refuse(("store",), "with PAIRS")
        directory = _single_step(
            partial(run, settings=CompareSettings(rule=rule)),
            inputs,
            out,
            options,
        )
    else:
        from sos_dask.storage.store import current_product

        options.refuse_all_but("label", "sample")
        place = find_store(store)
        directory = current_product(place, "comparison")
        costs = _costs(place)
    found = read_comparison(directory)
    if options.as_json:
        for name in ("figures", "artifacts", "outside"):
            found[name] = [r for r in found[name] if label in (None, r["label"])]
        found["figures"] = [r for r in found["figures"] if sample in (None, r["sample"])]
        print_json({"path": directory, **found, "costs": costs})
        return
    sample = sample or "test"
    for name in [label] if label else LABEL_UNITS:
        rows = [r for r in found["figures"] if (r["label"], r["sample"]) == (name, sample)]
        _show_figures(name, sample, rows, found["method"])
        _show_subsets(name, sample, rows)
    _show_artifacts([r for r in found["artifacts"] if label in (None, r["label"])])
    _show_outside([r for r in found["outside"] if label in (None, r["label"])])
    if costs is not None:
        _show_costs(costs)
    say(f"Rule '{found['rule']}' chose {found['why']}.")


_SAMPLES = {"test": "held-out", "train": "training"}


def _one_of(what: str, value: Any, known: Any) -> Any:
    if value is not None and value not in known:
        from sos_dask.schema import nearest

        raise ConfigError(
            f"--{what} '{value}' is not one of {', '.join(known)}", nearest(value, list(known))
        )
    return value


def _single_step(
    run: Callable[..., Manifest], inputs: Sequence[Path], out: Path | None, options: StepOptions
) -> Path:
    """Run a stage on pairs and models given by path; where its output is."""
    from sos_dask.storage.artifact import Manifest
    from sos_dask.storage.catalog import Catalog

    if out is None:
        raise ConfigError("--out is missing", "Give a directory for the output: -o DIR.")
    models: dict[str, Path] = {}
    for path in inputs[1:]:
        manifest = Manifest.load(path)
        method = manifest.recipe.stage.removeprefix("train-")
        if method in models:
            raise ConfigError(f"{path} and {models[method]} are both models of '{method}'")
        models[method] = path

    run_step(partial(run, Catalog.open(inputs[0]), directory=out, models=models), options)
    return out


def _costs(store: Path) -> dict[str, dict[str, float | None]]:
    """Cost of training, where it is known."""
    from sos_dask.storage.store import costs, published

    known = costs(store)
    found: dict[str, dict[str, float | None]] = {}
    for product, fingerprint in published(store).items():
        if product.startswith("model."):
            cost = known.get(fingerprint)
            found[product.removeprefix("model.")] = {
                "train_cpu_s": cost.cpu_s if cost else None,
                "train_wall_s": cost.wall_s if cost else None,
            }
    return found


def _is_wide() -> bool:
    """Show every interval in the terminal; --json always contains them."""
    return console().width >= _WIDE


def _number(value: float | None, label: str, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.{1 if label == 'teff' else 4}f}"


def _with_interval(row: dict[str, Any], name: str = "", mark: str = "") -> str:
    """A figure with its interval on the line below."""
    prefix = f"{name}_" if name else ""
    value, low, high = row[name or "value"], row[f"{prefix}low"], row[f"{prefix}high"]
    if value is None:
        return "-"
    label = row["label"] if name != "roughness" else ""
    interval = f"{_number(low, label)}, {_number(high, label)}"
    if not _is_wide() and label != "teff":
        interval = re.sub(r"\b0\.", ".", interval)
    return f"{_number(value, label)}{mark}\n{interval}"


def _mark(row: dict[str, Any]) -> str:
    behind = row["behind_low"]
    return " +" if behind is not None and behind > 0 else ""


def _show_figures(label: str, sample: str, rows: Sequence[dict[str, Any]], chosen: str) -> None:
    whole = {(r["method"], r["statistic"]): r for r in rows if r["subset"] == "all"}
    statistics = ["median", "mad", "width", "rms_binned"]
    headers = [">median", ">scatter", ">half-width", ">rms of bins"]
    if not _is_wide():
        del statistics[2], headers[2]
    table = []
    for method in dict.fromkeys(method for method, _ in whole):
        worst = whole[method, "worst_bin"]
        place = "-"
        if worst["value"] is not None:
            value, error = (_number(worst[name], label) for name in ("value", "error"))
            low, high = (f"{worst[name]:g}" for name in ("bin_low", "bin_high"))
            place = f"{value} ± {error}\n{worst['against']} {low}..{high}"
        table.append(
            [
                method + (" *" if method == chosen else ""),
                *(
                    _with_interval(whole[method, name], mark=_mark(whole[method, name]))
                    for name in statistics
                ),
                place,
            ]
        )
    n = next(iter(whole.values()))["n"]
    title = f"{label} [{LABEL_UNITS[label]}]: target - reference of {n:,} {_SAMPLES[sample]} pairs"
    show_table(f"{title}, with 95 % intervals", ["method", *headers, ">worst bin"], table)


def _show_subsets(label: str, sample: str, rows: Sequence[dict[str, Any]]) -> None:
    found = {(r["subset"], r["method"]): r for r in rows if r["statistic"] == "mad"}
    methods = list(dict.fromkeys(method for _, method in found))
    table = []
    for subset in _SUBSETS:
        ours = [found[subset, method] for method in methods]
        cells = [_with_interval(row, mark=_mark(row)) for row in ours]
        table.append(
            [subset, f"{ours[0]['n']:,}", *(c if _is_wide() else c.split("\n")[0] for c in cells)]
        )
    show_table(
        f"{label} [{LABEL_UNITS[label]}]: scatter (1.4826 MAD) of {_SAMPLES[sample]} pairs",
        ["subset", ">pairs", *(f">{method}" for method in methods)],
        table,
    )
    say("+ larger than the best correction: the interval of the difference excludes 0")
    if any(row["value"] is None for row in found.values()):
        say("- too few pairs")
    say("")


def _show_artifacts(rows: Sequence[dict[str, Any]]) -> None:
    table = [
        [
            f"{row['label']} [{LABEL_UNITS[row['label']]}]",
            row["method"],
            _with_interval(row, "roughness"),
            _with_interval(row, "jump"),
            _number(row["noise"], row["label"]),
            str(row["n_cells"]),
        ]
        for row in sorted(rows, key=lambda r: list(LABEL_UNITS).index(r["label"]))
    ]
    show_table(
        "Artifacts: second differences over the noise, largest step, with 95 % intervals",
        ["label", "method", ">roughness", ">jump", ">noise", ">cells"],
        table,
    )


def _show_outside(rows: Sequence[dict[str, Any]]) -> None:
    table = [
        [
            f"{row['label']} [{LABEL_UNITS[row['label']]}]",
            row["method"],
            row["where"],
            _with_interval(row, "exceeds") if _is_wide() else _number(row["exceeds"], row["label"]),
            "-" if row["share"] is None else f"{100 * row['share']:.0f} %",
            _with_interval(row, "step") if _is_wide() else _number(row["step"], row["label"]),
        ]
        for row in sorted(rows, key=lambda r: list(LABEL_UNITS).index(r["label"]))
    ]
    if table:
        show_table(
            "Outside the overlap: how far past the values inside, and the step at the edge",
            ["label", "method", "where", ">exceeds", ">of cells", ">step"],
            table,
        )


def _show_costs(costs: dict[str, dict[str, float | None]]) -> None:
    table = [
        [
            method,
            *("-" if value is None else f"{value:,.1f}" for value in cost.values()),
        ]
        for method, cost in costs.items()
    ]
    show_table(
        "Cost of training when it was run",
        ["method", ">CPU s", ">wall s"],
        table,
    )


@with_step_options
def trends(
    inputs: Inputs = None,
    out: OptionalOut = None,
    store: Store = None,
    label: Label = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="NAME",
            help="Only bins of this quantity: teff, logg, feh, snr, ...",
        ),
    ] = None,
    method: Annotated[
        str | None, typer.Option("--method", metavar="NAME", help="Only after this correction.")
    ] = None,
    *,
    options: StepOptions,
) -> None:
    """Show the trends of target - reference before and after each correction.

    Without --label and --against a summary; with either the medians of the bins.

    Example: sos-dask trends --store store --label feh --against logg
    """
    from sos_dask.stages.trends import read_trends
    from sos_dask.stages.trends import trends as run

    if inputs:
        options.refuse(("store",), "with PAIRS")
        directory = _single_step(run, inputs, out, options)
    else:
        from sos_dask.storage.store import current_product

        options.refuse_all_but("label", "against", "method")
        directory = current_product(find_store(store), "trends")
    _one_of("label", label, LABEL_UNITS)
    found = read_trends(directory)
    rows = found["trends"]
    _one_of("against", against, list(dict.fromkeys(row["against"] for row in rows)))
    methods = [name for name in dict.fromkeys(row["method"] for row in rows) if name]
    _one_of("method", method, methods)
    rows = [
        row
        for row in rows
        if label in (None, row["label"])
        and against in (None, row["against"])
        and (method is None or row["method"] in (None, method))
    ]
    if options.as_json:
        print_json({"path": directory, "trends": rows, "agreements": found["agreements"]})
        return
    shown = [method] if method else methods
    tables: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if (row["subset"], row["binning"]) == ("all", "equal-width"):
            tables.setdefault((row["label"], row["against"]), []).append(row)
    if label is None and against is None:
        _show_summary(tables, shown)
        return
    for (name, quantity), bins in tables.items():
        _show_bins(name, quantity, bins, shown)


def _show_summary(
    tables: dict[tuple[str, str], list[dict[str, Any]]], methods: Sequence[str]
) -> None:
    from sos_dask.stats.binned import rms_of_medians

    table = []
    for label, against in sorted(tables, key=lambda key: list(LABEL_UNITS).index(key[0])):
        bins = tables[label, against]
        found = [
            rms_of_medians([b["n"] for b in some], [b["median"] for b in some])
            for some in ([b for b in bins if b["method"] == m] for m in (None, *methods))
        ]
        bins_used = [str(found[0][1])] if _is_wide() else []
        table.append([label, against, *bins_used, *(_number(rms, label) for rms, _ in found)])
    show_table(
        "Target - reference: rms of the medians of bins, before and after each correction",
        [
            "label",
            "against",
            *([">bins"] if _is_wide() else []),
            ">before",
            *(f">{method}" for method in methods),
        ],
        table,
    )
    say("K for teff, dex otherwise. After: of held-out pairs. Bins with 20 pairs or more count.")
    say("Give --label and --against to see the bins.")


def _show_bins(
    label: str, against: str, bins: Sequence[dict[str, Any]], methods: Sequence[str]
) -> None:
    by_bin: dict[int, dict[str | None, dict[str, Any]]] = {}
    for row in bins:
        by_bin.setdefault(row["bin"], {})[row["method"]] = row
    wide = _is_wide()
    table = []
    for found in by_bin.values():
        before = found[None]
        if not before["n"]:
            continue
        cells = []
        for method in (None, *methods):
            one = found.get(method, {"median": None, "error": None})
            text = _number(one["median"], label, "+")
            error = f" ± {_number(one['error'], label)}" if one["error"] is not None else ""
            cells.append(text + (error if wide else ""))
        after = max((found[m]["n"] for m in methods if m in found), default=0)
        held_out = [f"{after:,}"] if wide else []
        place = f"{before['low']:g}..{before['high']:g}"
        table.append([place, f"{before['n']:,}", *held_out, *cells])
    show_table(
        f"{label} [{LABEL_UNITS[label]}] against {against}: median of target - reference",
        [
            against,
            ">pairs",
            *([">held\nout"] if wide else []),
            ">before",
            *(f">{'after' if i == 0 else ''}\n{method}" for i, method in enumerate(methods)),
        ],
        table,
    )
