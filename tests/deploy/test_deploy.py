"""Files of deploy/: each is valid, and what checks it finds a mistake."""

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from sos_dask.cli import app
from sos_dask.rebuild.job import load_job
from tests.services import TOOLS, require

ROOT = Path(__file__).parent.parent.parent
DEPLOY = ROOT / "deploy"
OVERLAYS = ("volume", "s3")
BIN = Path(sys.executable).parent


def run(*command: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, **options
    )


def assert_valid(*command: str | Path, **options: Any) -> None:
    done = run(*command, **options)
    assert done.returncode == 0, done.stdout + done.stderr


def changed(file: Path, folder: Path, old: str, new: str) -> Path:
    """A copy of a file in which one thing is another."""
    text = file.read_text()
    assert old in text
    copy = folder / file.name
    copy.write_text(text.replace(old, new))
    return copy


# -- Kubernetes


@cache
def operator_schemas() -> dict[str, dict[str, Any]]:
    """Schemas of the operator's kinds, in which an unknown key is an error."""

    def close(schema: Any, is_top: bool) -> None:
        for part in schema if isinstance(schema, list) else ():
            close(part, False)
        if isinstance(schema, dict):
            is_open = "additionalProperties" in schema or schema.get(
                "x-kubernetes-preserve-unknown-fields"
            )
            if "properties" in schema and not is_open and not is_top:
                schema["additionalProperties"] = False
            for part in schema.values():
                close(part, False)

    import dask_kubernetes

    found = {}
    folder = Path(dask_kubernetes.__file__).parent / "operator" / "deployment"
    for file in folder.glob("helm/*/crds/*.yaml"):
        for definition in yaml.load_all(file.read_text(), yaml.CSafeLoader):
            [version] = definition["spec"]["versions"]
            schema = version["schema"]["openAPIV3Schema"]
            close(schema, True)
            found[definition["spec"]["names"]["kind"]] = schema
    return found


def problems_of(text: str, known: str = "") -> list[str]:
    """What is wrong with manifests, but for those that are known to be right."""
    import jsonschema
    import kubernetes_validate

    schemas, problems = operator_schemas(), []
    right = list(yaml.safe_load_all(known))
    for document in yaml.safe_load_all(text):
        if document in right:
            continue
        try:
            if document["apiVersion"].startswith("kubernetes.dask.org/"):
                jsonschema.validate(document, schemas[document["kind"]])
            else:
                kubernetes_validate.validate(document, "1.37", strict=True)
        except (jsonschema.ValidationError, kubernetes_validate.ValidationError) as error:
            problems.append(f"{document['kind']}: {error.message}")
    return problems


@cache
def manifests(overlay: str) -> str:
    require("kubectl")
    kubectl = TOOLS / "kubectl"
    done = run(kubectl if kubectl.exists() else "kubectl", "kustomize",
               DEPLOY / "kubernetes" / overlay)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.services
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_manifests(overlay):
    text = manifests(overlay)
    assert problems_of(text) == []
    kinds = {document["kind"]: document for document in yaml.safe_load_all(text)}
    assert kinds["CronJob"]["spec"]["concurrencyPolicy"] == "Forbid"
    pods = {
        "rebuild": kinds["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"],
        "worker": kinds["DaskCluster"]["spec"]["worker"]["spec"],
        "scheduler": kinds["DaskCluster"]["spec"]["scheduler"]["spec"],
    }
    for name, pod in pods.items():
        assert pod["automountServiceAccountToken"] is False, name
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        [container] = pod["containers"]
        assert container["image"] == "sos-dask:cpu"
        assert container["securityContext"]["readOnlyRootFilesystem"] is True, name
        mounted = {one["mountPath"] for one in container["volumeMounts"]}
        secrets = [one["secretRef"]["name"] for one in container.get("envFrom", [])]
        if name != "scheduler":
            assert ("/data" in mounted, secrets == ["s3"]) == (overlay == "volume", overlay == "s3")
    # No role is bound to the account.
    assert not {"Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding"} & set(kinds)


@pytest.mark.services
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("concurrencyPolicy", "concurencyPolicy"),
        ("backoffLimit: 6", "backoffLimit: six"),
        ("maximum: 16", "maximum: many"),
        ("cluster: sos-dask", "clusters: sos-dask"),
        ("readinessProbe", "readynessProbe"),
        ("policyTypes", "policyType"),
    ],
)
def test_a_wrong_manifest_is_found(old, new):
    text = manifests("volume")
    assert old in text
    assert problems_of(text.replace(old, new), known=text)


def test_jobs_of_the_overlays_are_jobs():
    for overlay in OVERLAYS:
        job = load_job(DEPLOY / "kubernetes" / overlay / "job.toml")
        assert job.target_name == "lamost"


# -- images


def test_dockerfile_and_compose(tmp_path):
    assert_valid(BIN / "hadolint", DEPLOY / "Dockerfile")
    untagged = changed(DEPLOY / "Dockerfile", tmp_path, "FROM cpu AS cuda", "FROM debian:latest")
    assert run(BIN / "hadolint", untagged).returncode
    check = (BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec")
    assert_valid(*check, DEPLOY / "compose.yaml")
    wrong = changed(DEPLOY / "compose.yaml", tmp_path, "restart: unless", "restarts: unless")
    assert run(*check, wrong).returncode
    [base] = re.findall("^ARG BASE=(.*)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert re.fullmatch(r"\S+:\S+@sha256:[0-9a-f]{64}", base)


# -- systemd, cron, workflows


@pytest.mark.services
def test_units(tmp_path):
    require("systemd-analyze")
    program = tmp_path / "sos-dask"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    service = DEPLOY / "systemd" / "sos-dask-rebuild.service"
    timer = DEPLOY / "systemd" / "sos-dask-rebuild.timer"
    changed(timer, tmp_path, "", "")
    here = changed(service, tmp_path, "/opt/sos-dask/bin/sos-dask", str(program))
    # It ends well with an unknown key, too, but tells it.
    for file in (here, tmp_path / timer.name):
        done = run("systemd-analyze", "verify", "--man=no", file)
        assert (done.returncode, done.stdout + done.stderr) == (0, "")
    changed(here, tmp_path, "ProtectSystem", "ProtectsSystem")
    assert "ProtectsSystem" in run("systemd-analyze", "verify", "--man=no", here).stderr
    safety = ("systemd-analyze", "security", "--offline=true", "--threshold=20")
    assert_valid(*safety, service)
    [when] = re.findall("^OnCalendar=(.*)$", timer.read_text(), re.MULTILINE)
    assert_valid("systemd-analyze", "calendar", when)
    assert run("systemd-analyze", "calendar", when.replace("02:30", "26:30")).returncode


@pytest.mark.services
def test_cron_lines():
    require("airflow")
    asked = "import sys; from croniter import croniter; croniter(sys.argv[1])"
    for name in ("crontab", "scrontab"):
        [line] = [
            line for line in (DEPLOY / name).read_text().splitlines() if not line.startswith("#")
        ]
        fields = " ".join(line.split()[:5])
        assert_valid(TOOLS / "python", "-c", asked, fields)
        assert run(TOOLS / "python", "-c", asked, fields.replace("30", "61")).returncode


@pytest.mark.services
def test_airflow(tmp_path):
    require("airflow")
    asked = (
        "import sys; from airflow.dag_processing.dagbag import DagBag\n"
        "bag = DagBag(sys.argv[1], safe_mode=False)\n"
        "sys.exit(str(bag.import_errors) if bag.import_errors else bag.dags != {} and "
        "list(bag.dags) != ['sos_dask_rebuild'])"
    )
    environment = os.environ | {
        "AIRFLOW_HOME": str(tmp_path / "home"),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "false",
    }
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    for folder, new in ((right, "retries"), (wrong, "retrys")):
        folder.mkdir()
        changed(DEPLOY / "airflow_dag.py", folder, "retries", new)
    assert_valid(TOOLS / "python", "-c", asked, right, env=environment)
    done = run(TOOLS / "python", "-c", asked, wrong, env=environment)
    assert done.returncode and "retrys" in done.stderr


@pytest.mark.services
def test_snakemake(tmp_path):
    require("snakemake")
    (tmp_path / "job.toml").touch()
    dry = (TOOLS / "snakemake", "--cores", "2", "-n", "--config", "job=job.toml", "-s")
    assert_valid(*dry, DEPLOY / "Snakefile", cwd=tmp_path)
    wrong = changed(DEPLOY / "Snakefile", tmp_path, "rebuilt.done", "rebuild.done")
    wrong.write_text(wrong.read_text().replace("rebuild.done", "rebuilt.done", 1))
    assert run(*dry, wrong, cwd=tmp_path).returncode


# -- commands


def commands(file: Path) -> list[list[str]]:
    """Arguments of every command of this package in a file."""
    found: list[list[str]] = []
    text = re.sub(r"\\\n", " ", file.read_text())
    if file.suffix == ".yaml":
        for words in re.findall(r"\[sos-dask, ([^\]]*)\]", text):
            found.append(yaml.safe_load(f"[{words}]"))
        return found
    # In a script double quotes are around words, else around the command.
    end = "" if file.suffix == ".sbatch" else '"'
    for line in text.splitlines():
        is_said = line.lstrip().startswith("#") and not line.startswith("#   ")
        match = re.search(rf"(?:^|[\s=\"/`])sos-dask (?=[a-z-])([^{end}`]*)", line)
        if match and not is_said:
            words = shlex.split(re.split(r">>|\|\||&&|2>|;", match[1])[0], comments=True)
            words = [word for word in words if word != "${@:4}"]
            found.append([re.sub(r"\$\{?[\w@][^}\s/]*\}?|\{[\w.]+\}", "1", word) for word in words])
    return found


FILES = [
    file
    for folder in (DEPLOY, ROOT / "jobs")
    for file in sorted(folder.rglob("*"))
    if file.is_file() and file.suffix not in (".png", ".toml", ".md") and commands(file)
]


def parse(words: list[str]) -> None:
    """Parse the arguments of a command without running it."""
    command: Any = typer.main.get_command(app)
    with command.make_context("sos-dask", list(words)) as context:
        left = [*context._protected_args, *context.args]
        name, sub, rest = command.resolve_command(context, left)
        while hasattr(sub, "resolve_command"):
            with sub.make_context(name, rest, parent=context) as context:
                left = [*context._protected_args, *context.args]
                name, sub, rest = sub.resolve_command(context, left)
        sub.make_context(name, rest, parent=context)


def test_files_with_commands():
    names = {file.name for file in FILES}
    assert {"compose.yaml", "rebuild.yaml", "crontab", "scrontab", "Snakefile"} <= names
    assert {"sos-dask-rebuild.service", "airflow_dag.py", "rebuild.sbatch"} <= names


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_commands_are_ours(file):
    for words in commands(file):
        parse(words)
        with pytest.raises(Exception, match=r"[Nn]o such option"):
            parse([*words, "--partition-count"])
