"""Gradients of a step once its rows are learnt: what ranks add up, of copies of a model and of parts; the norm."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed
from torch import Tensor, nn

from litrecipe.model.group import Group
from litrecipe.model.tensor_plan import held_of

MESSAGE = 25 * 2**20
"""Bytes of gradients that ranks add up at once."""


@torch.no_grad()
def add_up_copies(parameters: Iterable[nn.Parameter]) -> None:
    """Gradients of all ranks, each of which has the whole model, are added up, with zeros for what one has none of.

    What travels together is the same in every step of every run: with more than two ranks a number's place in a message
    decides in which order it is added up, so the last bit. torch's DDP lays its messages out anew after the first step
    of a run, and so of one that goes on: that would not be the run that was never stopped.
    """
    gradients = list[Tensor]()
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        alike = [gradient for gradient in gradients if gradient.dtype == dtype]
        for places in messages(one.numel() * one.element_size() for one in alike):
            together = [alike[place] for place in places]
            if len(together) == 1 and together[0].is_contiguous():
                torch.distributed.all_reduce(together[0])
                continue
            flat = torch.cat([one.flatten() for one in together])
            torch.distributed.all_reduce(flat)
            for one, total in zip(together, flat.split([one.numel() for one in together]), strict=True):
                one.copy_(total.view(one.shape))


def messages(sizes: Iterable[int]) -> Iterator[range]:
    """The places of tensors of so many bytes that travel together: until they make up `MESSAGE` bytes; one that has as
    many travels alone, as it lies."""
    first, filling, place = 0, 0, -1
    for place, size in enumerate(sizes):
        if filling and (filling >= MESSAGE or size >= MESSAGE):
            yield range(first, place)
            first, filling = place, 0
        filling += size
    if filling:
        yield range(first, place + 1)


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
