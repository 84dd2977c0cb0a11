"""Deployment: kubernetes.yaml agrees with docker-compose.yml and with pod security."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parent.parent
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
PODS: dict[str, Any] = {
    document["metadata"]["name"]: document["spec"]["template"]["spec"]
    for document in yaml.safe_load_all((ROOT / "kubernetes.yaml").read_text())
    if "template" in document.get("spec", {})
}
SERVICES = {name: COMPOSE["services"][name] for name in PODS}
CONTAINERS = {name: pod["containers"][0] for name, pod in PODS.items()}
RESTRICTED = {
    "runAsNonRoot": True,
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}

each_service = pytest.mark.parametrize("name", SERVICES)


def compose_image(name: str) -> str:
    inline = SERVICES[name].get("build", {}).get("dockerfile_inline", "")
    if base := re.search(r"^FROM (\S+)", inline, re.MULTILINE):
        return base[1]
    return str(SERVICES[name].get("image", f"{COMPOSE['name']}-{name}"))


def flags(arguments: list[str]) -> list[str]:
    """Return the arguments; of a shell script, the command that it executes."""
    script = re.search(r"^exec (.+)", arguments[-1], re.MULTILINE)
    return script[1].split() if script else arguments


@each_service
def test_image_arguments_memory_and_environment_are_those_of_compose(name: str) -> None:
    service, container = SERVICES[name], CONTAINERS[name]
    expected = {
        variable: re.sub(r"\$\{(\w+).*\}", r"secret \1", value)
        for variable, value in service.get("environment", {}).items()
    }

    environment = {
        entry["name"]: entry.get("value") or f"secret {entry['valueFrom']['secretKeyRef']['key']}"
        for entry in container.get("env", [])
    }

    assert container["image"] == compose_image(name)
    assert flags(container["args"]) == flags(service["command"])
    assert container["resources"]["limits"]["memory"] == service["mem_limit"].upper() + "i"
    assert environment == expected


@each_service
def test_pod_meets_the_restricted_standard(name: str) -> None:
    pod, (container,) = PODS[name], PODS[name]["containers"]

    context = pod["securityContext"] | container["securityContext"]
    volumes = {kind for volume in pod.get("volumes", []) for kind in volume}

    assert context == context | RESTRICTED
    assert context["runAsUser"] > 0
    assert volumes <= {"name", "configMap", "emptyDir"}
    assert not re.search("host(Network|PID|IPC|Port)|privileged|initContainers", str(pod))


def test_a_database_outage_neither_restarts_nor_removes_a_container() -> None:
    transaksi, mutasi = CONTAINERS["transaksi"], CONTAINERS["mutasi"]

    for probe in ("readinessProbe", "livenessProbe"):
        assert transaksi[probe]["httpGet"]["path"] == "/docs"
    health_check = SERVICES["mutasi"]["healthcheck"]["test"]
    assert mutasi["readinessProbe"]["exec"]["command"] == health_check[1:]
    assert not mutasi.keys() & {"livenessProbe", "startupProbe"}


def test_dockerfiles_differ_only_in_the_name_of_the_service() -> None:
    transaksi = (ROOT / "transaksi/Dockerfile").read_text()

    assert transaksi.replace("transaksi", "mutasi") == (ROOT / "mutasi/Dockerfile").read_text()
