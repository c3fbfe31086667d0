"""Ranks that compute one copy of a model together, and what they say to one another in its forward and backward pass.

Where each has some of the outputs of a first layer and the inputs of a second that belong to these (Megatron-LM,
1909.08053, section 3), nothing is said between the two: the group adds up once what the second layer writes, and in the
backward pass once the gradient of what the first layer reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Group:
    """This process's place in a group, and the group's collectives, which all of its ranks must call.

    Without a `process_group` nothing is said: a dry run looks at one rank's share alone.
    """

    def __init__(self, rank: int, size: int, process_group: dist.ProcessGroup | None = None) -> None:
        self.rank, self.size, self.process_group = rank, size, process_group

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        """Copies of a model are computed by the same ranks."""
        return self

    def add_up(self, x: Tensor) -> Tensor:
        """The sum of all ranks' x, in place."""
        return self._reduced(x, dist.ReduceOp.SUM)

    def largest(self, x: Tensor) -> Tensor:
        """The elementwise maximum, in place."""
        return self._reduced(x, dist.ReduceOp.MAX)

    def smallest(self, x: Tensor) -> Tensor:
        """The elementwise minimum, in place."""
        return self._reduced(x, dist.ReduceOp.MIN)

    def each(self, x: Tensor) -> list[Tensor]:
        """What each rank brings, all of one shape."""
        if self.process_group is None or not x.numel():
            return [x] * self.size
        found = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(found, x.contiguous(), group=self.process_group)
        return found

    def joined(self, x: Tensor, widths: Sequence[int]) -> Tensor:
        """All ranks' x (…, w) side by side, of which each has its own of the `widths`; without gradient."""
        padded = torch.nn.functional.pad(x.detach(), (0, max(widths) - x.shape[-1]))
        return torch.cat([one[..., :width] for one, width in zip(self.each(padded), widths, strict=True)], -1)

    def _reduced(self, x: Tensor, op: Any) -> Tensor:
        if self.process_group is not None and x.numel():
            dist.all_reduce(x, op, group=self.process_group)
        return x


def logsumexp(x: Tensor, group: Group) -> Tensor:
    """log Σ exp of all ranks' x (P,)."""
    return torch.stack(group.each(x)).logsumexp(0)


@torch.compiler.disable  # a collective inside an autograd function is nothing to trace
def entered(x: Tensor, group: Group | None) -> Tensor:
    """x, which all ranks have, on its way to where each computes something else of it: gradients are added up."""
    return x if group is None else _Entered.apply(x, group)


@torch.compiler.disable
def added_up(x: Tensor, group: Group | None) -> Tensor:
    """The sum of all ranks' x; what is computed of it afterwards is the same on all of them."""
    return x if group is None else _AddedUp.apply(x, group)


class _Entered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # A gradient may be shared with what else it goes to: it is not to be changed.
        return ctx.group.add_up(grad.clone(memory_format=torch.contiguous_format)), None


class _AddedUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return group.add_up(x.clone(memory_format=torch.contiguous_format))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
