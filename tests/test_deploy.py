"""What deploy/ says is what the code has: files, options, routes, times; systemd and kubectl judge where they are."""

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from genrec.cli import app
from genrec.serving.access import PUBLIC
from genrec.serving.body_limit import MAX_BODY_BYTES
from genrec.serving.desk import Settings
from genrec.serving.server import STOP_S

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
CONTAINERS = [DEPLOY / "Containerfile.cpu", DEPLOY / "Containerfile.gpu"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DRAIN_S = STOP_S + Settings().drain_s
PORT = 8000


def parsed(command: list[str]) -> dict[str, Any]:
    """The options of a `genrec serve`, by the command line's own parser.

    Raises:
        click's errors: an unknown option or a value that does not fit.
    """
    assert command[0] == "serve"
    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    return dict(serve.make_context("serve", list(command[1:])).params)


def instructions(file: Path) -> list[tuple[str, str]]:
    """Of a Containerfile, continued lines joined."""
    text = re.sub(r"\\\n\s*", " ", re.sub(r"^#.*\n", "", file.read_text(), flags=re.MULTILINE))
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("file", CONTAINERS, ids=lambda f: f.suffix[1:])
def test_a_containerfile_names_what_is_there(file: Path) -> None:
    found = instructions(file)
    copied = {source for name, rest in found if name == "COPY" for source in rest.split()[:-1]}
    assert [source for source in copied if not (ROOT / source).exists()] == []
    needed = {path.split("/")[0] for path in PROJECT["tool"]["setuptools"]["package-dir"].values()}
    needed |= {PROJECT["project"]["readme"], *PROJECT["project"]["license-files"], "pyproject.toml", "constraints"}
    assert copied == needed, "the build inside the container would miss a file, or gets one that it does not need"
    (install,) = [rest for name, rest in found if name == "RUN" and "pip install" in rest]
    assert (ROOT / re.findall(r"-c (\S+)", install)[0]).is_file()
    assert file.suffix[1:] in re.findall(r"-c constraints/(\w+)\.txt", install)
    (extras,) = re.findall(r"'\.\[(.*)\]'", install)
    assert set(extras.split(",")) <= set(PROJECT["project"]["optional-dependencies"])


@pytest.mark.parametrize("file", CONTAINERS, ids=lambda f: f.suffix[1:])
def test_a_container_serves_as_nobody_with_keys(file: Path) -> None:
    found = dict(instructions(file))
    assert int(found["USER"]) > 0
    assert json.loads(found["ENTRYPOINT"]) == ["genrec"]
    options = parsed(json.loads(found["CMD"]))
    assert (options["host"], options["port"]) == ("0.0.0.0", int(found["EXPOSE"]))
    assert options["engine"] == {"cpu": "torch", "gpu": "vllm"}[file.suffix[1:]]
    environment = dict(pair.split("=", 1) for pair in shlex.split(found["ENV"]))
    assert {"GENREC_KEYS", "GENREC_STORE"} <= environment.keys()
    known = {p.envvar for p in typer.main.get_command(app).commands["serve"].params}  # type: ignore[attr-defined]
    assert {name for name in environment if name.startswith("GENREC_")} <= known
    assert environment["GENREC_STORE"].startswith(
        "sqlite:////srv/state/"
    )  # owned by the user, who may write nothing else


def unit() -> configparser.ConfigParser:
    read = configparser.ConfigParser(strict=False, interpolation=None)
    read.optionxform = str  # type: ignore[assignment,method-assign]
    read.read(DEPLOY / "genrec.service")
    return read


def test_the_unit_serves_and_lets_the_drain_end() -> None:
    service = unit()["Service"]
    program, *rest = shlex.split(service["ExecStart"])
    assert Path(program).name == "genrec"
    options = parsed(rest)
    assert (options["host"], options["port"]) == ("127.0.0.1", PORT)
    writable = f"/var/lib/{service['StateDirectory']}/"
    assert str(options["keys"]).startswith(writable)
    assert int(service["TimeoutStopSec"]) > DRAIN_S
    assert service["KillSignal"] == "SIGTERM"
    assert service["User"] != "root"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_systemd_knows_every_line_of_the_unit(tmp_path: Path) -> None:
    text = (DEPLOY / "genrec.service").read_text().replace("/opt/genrec/.venv/bin/genrec", sys.executable)

    def complaints(unit_text: str) -> str:
        file = tmp_path / "genrec.service"
        file.write_text(unit_text)
        command = ["systemd-analyze", "verify", "--man=no", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stderr

    assert complaints(text) == ""
    assert "Unknown key 'ProtectClok'" in complaints(text.replace("ProtectClock", "ProtectClok"))
    command = ["systemd-analyze", "security", "--offline=yes", "--threshold=25", str(tmp_path / "genrec.service")]
    (tmp_path / "genrec.service").write_text(text)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-500:]  # an exposure of 2.5 of 10 at most


@pytest.fixture(scope="module")
def objects() -> dict[str, Any]:
    """Kind -> object of kubernetes.yaml."""
    found = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
    assert len({each["kind"] for each in found}) == len(found)
    return {each["kind"]: each for each in found}


def test_the_probes_ask_routes_that_need_no_key(objects) -> None:
    (container,) = objects["Deployment"]["spec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    paths = {name: container[f"{name}Probe"]["httpGet"] for name in ("startup", "liveness", "readiness")}
    assert {name: probe["path"] for name, probe in paths.items()} == {
        "startup": "/healthz",
        "liveness": "/healthz",
        "readiness": "/readyz",
    }
    assert {probe["path"] for probe in paths.values()} <= PUBLIC
    assert {ports[probe["port"]] for probe in paths.values()} == {parsed(container["args"])["port"]} == {PORT}


def test_the_pod_drains_and_mounts_what_it_names(objects) -> None:
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["terminationGracePeriodSeconds"] > DRAIN_S
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    environment = {each["name"]: each for each in container["env"]}
    assert str(Path(environment["GENREC_KEYS"]["value"]).parent) in mounts
    assert mounts[str(parsed(container["args"])["export"])]["readOnly"]
    (keys,) = [volume["secret"] for volume in pod["volumes"] if "secret" in volume]
    assert keys["defaultMode"] & 0o007 == 0  # `read_keys` refuses a file that everyone may read
    assert keys["defaultMode"] & 0o040  # and the pod's group reads it
    assert pod["securityContext"]["runAsUser"] == int(dict(instructions(CONTAINERS[0]))["USER"])


def test_service_ingress_and_scaler_lead_to_the_pods(objects) -> None:
    deployment, service, ingress = (objects[kind] for kind in ("Deployment", "Service", "Ingress"))
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    selectors = [deployment["spec"]["selector"]["matchLabels"], service["spec"]["selector"]]
    selectors.append(objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"])
    assert all(selector.items() <= labels.items() for selector in selectors)
    (port,) = service["spec"]["ports"]
    assert port["targetPort"] == deployment["spec"]["template"]["spec"]["containers"][0]["ports"][0]["name"]
    (rule,) = ingress["spec"]["rules"]
    backend = rule["http"]["paths"][0]["backend"]["service"]
    assert backend == {"name": service["metadata"]["name"], "port": {"name": port["name"]}}
    target = objects["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
    notes = {name.rpartition("/")[2]: value for name, value in ingress["metadata"]["annotations"].items()}
    assert notes["upstream-hash-by"] == "$http_x_genrec_user"
    assert int(notes["proxy-body-size"].removesuffix("k")) * 1024 == MAX_BODY_BYTES
    assert 30 < int(notes["proxy-read-timeout"]) <= STOP_S


def kept(given: Any, found: Any, path: str = "") -> list[str]:
    """Paths of `given` that are not in `found`."""
    if isinstance(given, dict):
        found = found if isinstance(found, dict) else {}
        lost = [f"{path}.{key}" for key in given if key not in found]
        return lost + [p for key in given.keys() & found.keys() for p in kept(given[key], found[key], f"{path}.{key}")]
    if isinstance(given, list):
        assert len(given) == len(found)
        return [p for i, each in enumerate(given) for p in kept(each, found[i], f"{path}[{i}]")]
    return []


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl here")
def test_kubectl_knows_every_field_of_the_deployment(objects) -> None:
    """It decodes the object into its own types and prints it: a field that it does not know is gone."""

    def lost(deployment: Any) -> list[str]:
        command = ["kubectl", "set", "image", "--local", "-f", "-", "genrec=genrec:other", "-o", "json"]
        text = json.dumps(deployment)
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        return kept(deployment, json.loads(done.stdout))

    assert lost(objects["Deployment"]) == []
    wrong = json.loads(json.dumps(objects["Deployment"]).replace("failureThreshold", "failureTreshold"))
    assert any("failureTreshold" in path for path in lost(wrong))
