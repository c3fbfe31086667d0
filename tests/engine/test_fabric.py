"""What the `fabric` group means on the machine it is read on."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from litrecipe import cli
from litrecipe.config import stop
from litrecipe.config.errors import InputError
from litrecipe.config.groups import Fabric
from litrecipe.engine import fabric
from litrecipe.engine.fabric import accelerator_of, devices_of, make_fabric, world_size


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch):
    """As many GPUs as a test says, as far as torch's counting goes."""

    def there(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return there


def test_auto_takes_every_gpu_of_every_node(gpus) -> None:
    gpus(4)
    assert accelerator_of(Fabric()) == "cuda"
    assert world_size(Fabric(num_nodes=2)) == 8
    assert world_size(Fabric(devices=3)) == 3
    assert world_size(Fabric(accelerator="cpu")) == 1


def test_without_a_gpu_auto_is_one_process_unless_a_launcher_says_more(gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus(0)
    assert accelerator_of(Fabric()) == "cpu"
    assert world_size(Fabric()) == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert world_size(Fabric(num_nodes=2)) == 6


def test_what_is_not_there_is_wrong_input(gpus) -> None:
    gpus(0)
    with pytest.raises(InputError, match=r"fabric\.accelerator: cuda: torch finds none"):
        make_fabric(Fabric(accelerator="cuda"))
    gpus(2)
    with pytest.raises(InputError, match=r"fabric\.devices: 3: torch finds 2 on this machine"):
        devices_of(Fabric(devices=3))


def test_a_node_that_knows_no_other_does_not_wait_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "SLURM_NTASKS", "TORCHELASTIC_RUN_ID", "GROUP_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=r"^fabric\.num_nodes: 2: nothing says where .* MASTER_ADDR"):
        make_fabric(Fabric(accelerator="cpu", num_nodes=2))


@pytest.mark.parametrize(("local", "said"), [("0", "litrecipe: waiting for the others at n1\n"), ("1", "")])
def test_who_waits_long_for_the_others_says_so_once_a_machine(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], local: str, said: str
) -> None:
    monkeypatch.setattr(fabric, "MEETS", 0.05)
    monkeypatch.setenv("LOCAL_RANK", local)
    with fabric._told_if_slow("waiting for the others at n1"):
        assert capfd.readouterr().err == ""
        time.sleep(0.5)
    assert capfd.readouterr().err == said


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_wait_longer_for_the_first_than_it_reads_a_checkpoint(gpus, strategy: str, monkeypatch) -> None:
    """A terabyte, at 200 MB/s."""
    gpus(0)
    monkeypatch.setattr("lightning_fabric.Fabric", lambda **given: SimpleNamespace(launch=lambda: None, **given))
    made: Any = make_fabric(Fabric(accelerator="cpu", strategy=strategy))
    assert made.strategy._timeout >= timedelta(seconds=1e12 / 200e6)


@pytest.mark.parametrize("ending", [0, stop.Stopped(signal.SIGTERM)])
def test_who_is_done_or_stopped_leaves_the_other_ranks(ending, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of the process group that meet the end of the interpreter now and then abort it."""

    def call(*_: object, **__: object) -> int:
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        if isinstance(ending, stop.Stopped):
            raise ending
        return ending

    monkeypatch.setattr(cli, "call", call)
    with pytest.raises(stop.Stopped) if ending else nullcontext():
        cli.main(["recipes", "ls"])
    assert not torch.distributed.is_initialized()


def test_torchmetrics_is_not_imported_along_and_can_be_afterwards() -> None:
    if importlib.util.find_spec("torchmetrics") is None:
        pytest.skip("torchmetrics is not installed: nobody imports it")
    code = (
        "import sys; from litrecipe.config.groups import Fabric; from litrecipe.engine.fabric import make_fabric; "
        "make_fabric(Fabric(accelerator='cpu')); assert not {'torchmetrics', 'scipy'} & set(sys.modules); "
        "import torchmetrics; print(torchmetrics.MeanMetric.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip().endswith("MeanMetric"), done.stderr
