"""Where a process stands, from what its launcher left in the environment."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.pretrain.job import TrainingError
from tasks.pretrain.launch import environment

STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_NODELIST": "gpu[06-08]",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_NTASKS": "16",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_NODEID": "1",
}


def test_a_slurm_task_gets_torchs_variables_from_its_step() -> None:
    environ = dict(STEP)
    environment.complete(environ, launcher="slurm", processes=16)
    assert {name: environ[name] for name in environment.TORCH[:4]} == {
        "RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "MASTER_ADDR": "gpu07"
    }  # fmt: skip
    assert int(environ["MASTER_PORT"]) in environment.PORTS


def test_all_tasks_of_a_step_meet_at_one_port_and_the_steps_of_a_job_at_others() -> None:
    def port(**fields: str) -> str:
        return environment.from_slurm(STEP | fields)["MASTER_PORT"]

    assert port(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0") == port()
    assert len({port(SLURM_STEP_ID=str(step)) for step in range(5)}) == 5


def test_a_task_that_sees_one_gpu_alone_uses_that_one() -> None:
    assert environment.from_slurm(STEP | {"CUDA_VISIBLE_DEVICES": "0"})["LOCAL_RANK"] == "0"
    assert environment.from_slurm(STEP | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"})["LOCAL_RANK"] == "1"


def test_slurms_variables_are_left_alone_where_another_launcher_is_set() -> None:
    environ = STEP | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    environment.complete(environ, launcher="local", processes=2)
    assert (environ["RANK"], environ["WORLD_SIZE"]) == ("1", "2")
    assert "MASTER_ADDR" not in environ


@pytest.mark.parametrize("missing", ["SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID"])
def test_a_worker_outside_a_step_is_told_what_is_missing(missing: str) -> None:
    environ = {name: value for name, value in STEP.items() if name != missing}
    with pytest.raises(TrainingError, match=rf"{missing} is not set.*sbatch"):
        environment.from_slurm(environ)


@pytest.mark.parametrize("environ", [{"WORLD_SIZE": "4"}, {}])
def test_another_number_of_processes_than_the_settings_say_is_refused(environ: dict[str, str]) -> None:
    with pytest.raises(TrainingError, match=rf"processes = 2, and {environ.get('WORLD_SIZE', 1)} were started"):
        environment.complete(dict(environ), launcher="local", processes=2)


@pytest.mark.parametrize(
    ("nodes", "hosts"),
    [
        ("n1", ["n1"]),
        ("a[1-3,7]", ["a1", "a2", "a3", "a7"]),
        ("n[008-011]", ["n008", "n009", "n010", "n011"]),
        ("a[1-2],login,b[05,9]-ib", ["a1", "a2", "login", "b05-ib", "b9-ib"]),
        ("r[1-2]n[0-1]", ["r1n0", "r1n1", "r2n0", "r2n1"]),
    ],
)
def test_a_node_list_is_expanded_in_order(nodes: str, hosts: list[str]) -> None:
    assert list(environment.hosts(nodes)) == hosts


runs = st.lists(st.tuples(st.integers(0, 999), st.integers(0, 5), st.integers(1, 4)), min_size=1, max_size=4)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["a", "node-", "x0y"]), runs), min_size=1, max_size=3))
def test_any_folded_node_list_expands_to_the_names_it_was_folded_from(groups: list[Any]) -> None:
    folded, names = [], []
    for prefix, ranges in groups:
        inside = []
        for start, more, width in ranges:
            padded = [f"{number:0{width}d}" for number in range(start, start + more + 1)]
            inside.append(f"{padded[0]}-{padded[-1]}" if more else padded[0])
            names += [f"{prefix}{number:0{len(padded[0])}d}" for number in range(start, start + more + 1)]
        folded.append(f"{prefix}[{','.join(inside)}]")
    assert list(environment.hosts(",".join(folded))) == names


@pytest.mark.parametrize(
    ("environ", "count"),
    [
        ({}, 1),
        ({"LOCAL_WORLD_SIZE": "4"}, 4),
        ({"LOCAL_SIZE": "2"}, 2),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x3),4", "SLURM_NODEID": "2"}, 8),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x3),4", "SLURM_NODEID": "3"}, 4),
        ({"SLURM_STEP_TASKS_PER_NODE": "2,1,5(x2)", "SLURM_NODEID": "1"}, 1),
    ],
)
def test_the_processes_beside_this_one_are_those_of_its_machine(environ: dict[str, str], count: int) -> None:
    assert environment.local_processes(environ) == count
    cores = len(os.sched_getaffinity(0))
    assert environment.threads(environ) == max(1, cores // count)


def test_threads_are_those_that_slurm_gave_a_task_and_never_override_the_users() -> None:
    assert environment.threads(STEP | {"SLURM_CPUS_PER_TASK": "12"}) == 12
    environ = STEP | {"OMP_NUM_THREADS": "3"}
    environment.complete(environ, launcher="slurm", processes=16)
    assert environ["OMP_NUM_THREADS"] == "3"
