"""A sweep on a real local Ray cluster: a head without cores, and two nodes with one each."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from quant import pool
from quant.schemes.registry import installed
from quant.sweep import sweep
from tests.conftest import Commands

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not installed("ray"), reason="ray is not installed: pip install -e '.[ray]'"
    ),
]


class Nodes:
    """The cluster's two worker nodes."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
        self.nodes = [self.cluster.add_node(num_cpus=1) for _ in range(2)]
        self.cluster.wait_for_nodes()

    def node_of(self, process: int) -> int:
        """Return which node a worker process belongs to: the one whose raylet is its ancestor."""
        ancestors = {parent.pid for parent in psutil.Process(process).parents()}
        raylets = [{one.process.pid for one in node.all_processes["raylet"]} for node in self.nodes]
        return next(i for i, pids in enumerate(raylets) if pids & ancestors)

    def kill(self, index: int) -> None:
        """End a node as a power cut does."""
        self.cluster.remove_node(self.nodes[index], allow_graceful=False)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    """Start a cluster, which `RAY_ADDRESS` names meanwhile."""
    import ray

    found = Nodes()
    monkeypatch.setenv("RAY_ADDRESS", found.cluster.address)
    yield found
    ray.shutdown()
    found.cluster.shutdown()


def say_and_wait(task: tuple[str, str]) -> None:
    """Say in a folder that a task runs in this process, and wait until the file `go` is there."""
    folder, name = Path(task[0]), task[1]
    (folder / f"{name}-{os.getpid()}").touch()
    deadline = time.monotonic() + 300
    while not (folder / "go").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_killed_node_costs_what_it_was_doing_and_no_more(nodes: Nodes, tmp_path: Path) -> None:
    names = {"one", "two", "three", "four"}
    tasks = [(str(tmp_path), name) for name in sorted(names)]
    with ThreadPoolExecutor(1) as thread:
        outcomes = thread.submit(lambda: dict(pool.on_ray(say_and_wait, tasks)))
        deadline = time.monotonic() + 120
        while len(begun := list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        running = {
            name: nodes.node_of(int(process))
            for name, process in (file.name.split("-") for file in begun)
        }
        assert sorted(running.values()) == [0, 1]
        nodes.kill(0)
        (tmp_path / "go").touch()
        found = {name: outcome for (_, name), outcome in outcomes.result(timeout=240).items()}
    (lost,) = (name for name, node in running.items() if node == 0)
    failed = {name for name, outcome in found.items() if isinstance(outcome, pool.Failure)}
    assert set(found) == names and failed <= {lost}


def test_results_come_to_the_driver(
    nodes: Nodes, softpick: Path, texts: list[str], tmp_path: Path, commands: Commands
) -> None:
    """The same figures as in this process, and the files are the driver's."""
    options = ["--bits", "3", "--what", "weights", "--schemes", "rtn", "--json"]
    printed = [
        json.loads(commands.run(sweep, str(softpick), *texts, *options, *more))
        for more in (
            ["--ray", f"--out={tmp_path / 'ray'}"],
            ["--jobs", "1", f"--out={tmp_path / 'here'}"],
        )
    ]
    assert printed[0]["test KL"] == printed[1]["test KL"]
    assert not printed[0]["failed"]
