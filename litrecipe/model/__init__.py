"""The decoder, its heads, adapters and decoding. Knows tensors; knows no files, no Fabric, no recipes."""

import logging

import torch

# On import it warns of kernels that are not used here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# MKL's vector functions look at the processor when they are first called. Where two threads do that at once, one of
# them now and then computes its share of that first call with four digits instead of seven (benchmarks/first_use.py),
# and a run differs from its like in its first step. So one thread calls them first.
for _first in (torch.exp, torch.log, torch.tanh, torch.sin, torch.cos, torch.erf, torch.sigmoid, torch.log1p):
    _first(torch.ones(1))
