"""MKL's vector functions, called for the first time; to be imported before anything computes.

They look at the processor when they are first called. Where two threads do that at once, one of them now and then
computes its share of that first call with four digits instead of seven (benchmarks/first_use.py), and a run differs
from its like in its first step. So one thread calls them first.
"""

import torch

for _function in (torch.exp, torch.log, torch.tanh, torch.sin, torch.cos, torch.erf, torch.sigmoid, torch.log1p):
    _function(torch.ones(1))
