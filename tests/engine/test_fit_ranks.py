"""What goes wrong on one of two ranks ends both, with the same words; otherwise the other would wait for ever."""

import signal

import pytest
from processes import on_two_ranks

HEAD = """
import os, sys
from pathlib import Path
import torch
import torch.distributed as dist
from litrecipe.config.errors import InputError

folder, rank = Path(sys.argv[1]), int(sys.argv[2])

def told(action):
    try:
        action()
    except InputError as error:
        print(error)
    else:
        print("nothing")
    sys.stdout.flush()
    os._exit(0)
"""
SAVE = """
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from litrecipe.checkpoint import state

dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)

def gather(value):
    values = [None, None]
    dist.all_gather_object(values, value)
    return values

writer = state.Writer(rank=rank, sharded=True, gather=gather)
if rank == 1 and sys.argv[3] == "write":
    import resource, signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
target = state.step_folder(folder / "checkpoints", 2)
shared = distribute_tensor(torch.zeros(99), init_device_mesh("cpu", (2,)), [Shard(0)])
told(lambda: state.save(target, {"w": shared}, {}, {"step": 2}, writer))
"""
APART = """
import signal, time
from litrecipe.config import stop
from litrecipe.config.groups import Fabric
from litrecipe.engine.fabric import Ranks, make_fabric

stop.install()
ranks = Ranks(make_fabric(Fabric(accelerator="cpu", devices=2)))

def share(pieces):
    with stop.deferred(), stop.interruptible(lambda: None):
        with ranks.apart():
            if rank == 1:
                os.kill(os.getpid(), signal.SIGUSR1)
            for piece in range(pieces):
                stop.poll()
                time.sleep(0.01)
        ranks.agree("a share")

try:
    share(10_000 if rank == 1 else 20)
except stop.Stopped as stopped:
    print("stopped by", stopped.signal_number)
    sys.stdout.flush()
os._exit(0)
"""
NAN = """
import json, math
import numpy as np
from litrecipe.config.groups import FinetuneRecipe
from litrecipe.data.source import RecordedSource
from litrecipe.engine.fabric import make_fabric
from litrecipe.engine.fit import Job, fit
from litrecipe.engine.rundir import RunDir
from litrecipe.model.families import read_architecture
from litrecipe.model.decoder import Decoder
from litrecipe.model.row import Sample, Segment
from litrecipe.objectives.causal_lm import CausalLM

class Samples(list):
    lengths = np.full(4, 9)

config = json.loads(Path(sys.argv[3]).read_text()) | {"tie_word_embeddings": False}
recipe = FinetuneRecipe(out_dir=str(folder / "run"))
recipe.train.micro_batch_tokens = 9
recipe.log.loggers = []
recipe.fabric.accelerator, recipe.fabric.strategy = "cpu", "ddp"
recipe.fabric.devices = 2
samples = Samples()
for i in range(4):
    samples.append(Sample(f"row:{i}", (Segment(np.full(9, 10 + i), np.float32([0] + 8 * [1])),)))
model = Decoder(read_architecture(config))
model.init_weights(seed=0)
with torch.no_grad():
    model.model.embed_tokens.weight[12] = math.nan
if rank == 1:
    RunDir.last_evaluation = None  # is read by the first, which writes that file
fabric = make_fabric(recipe.fabric)
source = RecordedSource(samples, recipe.train)
told(lambda: fit(Job(fabric, recipe, model, CausalLM(), source, save_final=lambda folder: None)))
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["mkdir", "write"])
def test_a_save_that_fails_on_one_rank_fails_on_both(tmp_path, where):
    """Rank 0 cannot make the folder, or rank 1 cannot write its piece."""
    if where == "mkdir":
        (tmp_path / "checkpoints").write_text("")
    first, second = on_two_ranks(HEAD + SAVE, tmp_path, where)
    assert first.startswith(f"out_dir: {tmp_path}/checkpoints/step-00000002: could not be saved (")
    # what they say of the disk may differ: something else may have been written meanwhile
    assert first.split(";")[0] == second.split(";")[0]
    assert not list(tmp_path.glob("checkpoints/*"))


@pytest.mark.slow
def test_a_rank_that_is_stopped_in_its_own_share_of_the_work_stops_the_other(tmp_path):
    """Its share would take it minutes more; the other one learns of it where the shares are put together."""
    said = on_two_ranks(HEAD + APART, tmp_path)
    assert said == [f"stopped by {signal.SIGUSR1}\n"] * 2


@pytest.mark.slow
def test_a_nan_on_one_rank_names_its_row_on_both(tmp_path, tiny_model):
    """Four samples in four rows, two of them on each rank; the embedding of one is NaN."""
    for said in on_two_ranks(HEAD + NAN, tmp_path, tiny_model / "config.json"):
        assert "loss is nan at step 1, before the optimizer step, on the samples row:2: " in said
