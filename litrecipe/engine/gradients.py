"""Gradients of a step once its rows are learnt: what ranks of one copy of a model still have to add up; the norm."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from litrecipe.model.group import Group
from litrecipe.model.tensor_plan import held_of


@torch.no_grad()
def add_up_shares(parameters: Iterable[nn.Parameter], group: Group | None) -> None:
    """Gradients of which each rank of a group has a share (weights that all have and that are applied to a rank's own
    heads, factors of adapters on split layers) are added up: once a step, all of them together."""
    if group is None:
        return
    shares = [_here(p.grad) for p in parameters if p.grad is not None and held_of(p).is_share]
    if not shares:
        return
    flat = group.add_up(torch.cat([share.flatten() for share in shares]))
    for share, total in zip(shares, flat.split([share.numel() for share in shares]), strict=True):
        share.copy_(total.view(share.shape))


def norm_of(parameters: Iterable[nn.Parameter], group: Group | None) -> Tensor:
    """The norm of the gradient of whole weights, the same on every rank: what is split counts on each rank of a group,
    what all have counts once."""
    of_kinds: dict[bool, list[Tensor]] = {True: [], False: []}
    for parameter in parameters:
        if parameter.grad is not None:
            of_kinds[held_of(parameter).is_split].append(parameter.grad)
    common = _norm(of_kinds[False])
    if group is None or not of_kinds[True]:
        return common
    squares = group.add_up(_norm(of_kinds[True]).double().square())
    return (squares + common.double().square()).sqrt().to(common.dtype)


def _norm(gradients: list[Tensor]) -> Tensor:
    """Over all ranks that they are sharded over."""
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def _here(gradient: Tensor) -> Tensor:
    """What of it is on this rank, to be written to."""
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient
