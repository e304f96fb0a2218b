"""Run the command line as a user does, and check what it says."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sos_dask.cli import main
from sos_dask.storage.manifest import MANIFEST

LAMOST = "lamost-dr11-lrs"


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """What stands on stderr but for the progress, and what a rebuild will take."""
        lines, progress = self.err.splitlines(), re.compile(r": \d+/\d+$|^This run: ")
        return "\n".join(line for line in lines if not progress.search(line))

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Cli = Callable[..., Ran]


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path) -> Cli:
    """Run the command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["sos-dask", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return Ran(int(end.value.code or 0), out, err)

    return run


def command(*arguments: object) -> list[str]:
    """The installed command as another process."""
    return [str(Path(sys.executable).with_name("sos-dask")), *map(str, arguments)]


def assert_error(ran: Ran, code: int, *says: str) -> None:
    assert ran.code == code, ran.err
    assert ran.out == ""
    assert ran.message.startswith("error: "), ran.err
    for text in says:
        assert re.search(text, ran.message), (text, ran.message)
    assert "Traceback" not in ran.err and "unexpected" not in ran.err
    assert len(ran.message.splitlines()) <= 3, "an error is a sentence, and what to do"


def assert_nothing_final(folder: Path) -> None:
    """No complete output and no data of one under its own name."""
    names = {path.name for path in folder.rglob("*") if ".work" not in path.parts}
    assert not names & {MANIFEST, "hats.properties", "partition_info.csv"}
    assert not [name for name in names if name.endswith((".parquet", ".tmp"))]


def assert_shape(value: Any, shape: Any, where: str = "document") -> None:
    """The value has just the keys and types of the shape; ``{str: ...}`` is any mapping."""
    if isinstance(shape, dict):
        assert isinstance(value, dict), where
        if list(shape) == [str]:
            assert value, where
            shape = dict.fromkeys(value, shape[str])
        assert set(value) == set(shape), where
        for key, inner in shape.items():
            assert_shape(value[key], inner, f"{where}.{key}")
    elif isinstance(shape, list):
        assert isinstance(value, list) and value, where
        for number, item in enumerate(value):
            assert_shape(item, shape[0], f"{where}[{number}]")
    else:
        assert type(value) is shape, f"{where} is {value!r}"


ROWS = {"in": int, "out": int, "rejected": int, "dropped": dict, "added": dict}


STEP = {"complete": bool, "path": str, "stage": str, "rows": ROWS, "summary": dict}


STAGE = {"stage": str, "rows": ROWS, "path": str, "summary": dict}


METRIC = {
    "method": str, "label": str, "subset": str, "n": int, "median_before": float,
    "scatter_before": float, "median_after": float, "scatter_after": float,
}  # fmt: skip


BUILD = {
    "build": str, "path": str, "outcome": str, "reasons": list,
    "corrections": {str: {"chosen": str, "why": str, "metrics": [METRIC]}},
    "stages": {str: {"ran": bool, "why": str, "parts": dict, **STAGE}},
    "products": {str: str},
}  # fmt: skip
