"""Whether a process was started in its allocation as it has to be: variables as Slurm 22.05 sets them."""

from __future__ import annotations

import os

import pytest
from lightning_fabric.plugins.environments import SLURMEnvironment

from litrecipe.config.errors import InputError
from litrecipe.config.groups import Fabric
from litrecipe.engine.allocation import join, meeting_place, refuse_plain_start
from litrecipe.engine.fabric import make_fabric, world_size

OF_TWO = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
STEP = {"SLURM_STEP_ID": "0"}
INTERACTIVE = {"SLURM_STEP_ID": "4294967290"}
"""What a shell of salloc's has for a step."""


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        *filter(lambda name: name.startswith("SLURM_"), os.environ),
        "TORCHELASTIC_RUN_ID",
        "LOCAL_WORLD_SIZE",
    ):
        monkeypatch.delenv(name, raising=False)


def put(monkeypatch: pytest.MonkeyPatch, *told: dict[str, str]) -> None:
    for one in told:
        for name, value in one.items():
            monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("told", "name"),
    [
        (OF_TWO, "SLURM_NTASKS: 2"),
        (OF_TWO | INTERACTIVE, "SLURM_NTASKS: 2"),
        ({"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "2"}, "SLURM_NTASKS_PER_NODE: 2"),
        ({"SLURM_JOB_ID": "7", "SLURM_NNODES": "2"}, "SLURM_NNODES: 2"),
    ],
)
def test_python_without_srun_is_told_so_at_once(
    monkeypatch: pytest.MonkeyPatch, told: dict[str, str], name: str
) -> None:
    put(monkeypatch, told)
    with pytest.raises(
        InputError, match=f"^{name}: litrecipe was started without srun: start it as `srun litrecipe …`"
    ):
        make_fabric(Fabric(accelerator="cpu", devices=2))


@pytest.mark.parametrize(
    "told",
    [
        {},
        {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_NTASKS": "1"},
        OF_TWO | STEP,
        OF_TWO | {"TORCHELASTIC_RUN_ID": "x"},
    ],
)
def test_what_is_right_is_let_through(monkeypatch: pytest.MonkeyPatch, told: dict[str, str]) -> None:
    put(monkeypatch, told)
    refuse_plain_start()


def test_the_tasks_are_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` is what srun started on each machine; another number is refused, with both."""
    put(monkeypatch, OF_TWO, STEP)
    assert world_size(Fabric(accelerator="cpu", num_nodes=3)) == 6
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    join(2, 1)
    assert SLURMEnvironment.detect(), "of a job of salloc's, too"
    with pytest.raises(InputError) as wrong:
        join(4, 2)
    assert [line.partition(":")[0] for line in wrong.value.mistakes] == ["fabric.devices", "fabric.num_nodes"]
    assert "SLURM_NTASKS_PER_NODE is 2: make them the same (srun --ntasks-per-node=4)" in wrong.value.mistakes[0]
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    with pytest.raises(InputError, match=r"^SLURM_NTASKS: 2: .* use srun --ntasks-per-node"):
        join(2, 1)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    with pytest.raises(InputError, match=r"^SLURM_NTASKS: 1: fabric.devices × fabric.num_nodes is 2: make them the"):
        join(2, 1)


@pytest.mark.parametrize("told", [{"MASTER_ADDR": "nowhere.invalid"}, STEP | {"SLURM_STEP_NODELIST": "nowhere[3-7,9]"}])
def test_where_the_ranks_meet_is_known_or_told(monkeypatch: pytest.MonkeyPatch, told: dict[str, str]) -> None:
    """Rather than tried for hours; where Slurm knows a node's address that is taken, see `cluster/test_submit`."""
    monkeypatch.setenv("MASTER_ADDR", "")  # so that it is put back
    monkeypatch.setenv("PATH", "")
    assert meeting_place() == "127.0.0.1"
    put(monkeypatch, told)
    with pytest.raises(
        InputError, match=r"^MASTER_ADDR: nowhere(\.invalid|3): no machine of this name is known here: "
    ):
        meeting_place()
