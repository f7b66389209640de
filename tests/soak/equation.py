"""The mass equation at one step, over all workers, in float64.

With ubar the mean of the memories, gbar of the finite gradients, n of p workers having a gradient
for a parameter:

    ubar_{t+1} + a_t = ubar_t + gbar_t + f * (weight_decay * w_t + beta * r * a_{t-1})
    w_{t+1} = w_t - eta_t * a_t

r is eta_{t-1} / eta_t in iterate form, else 1. f says what a missing gradient (None) means. In a
bucket that is sent sparse, a worker without a gradient for a parameter adds nothing there, neither
momentum nor weight decay: f = n / p. In one that is sent dense, a worker without a gradient counts
as one with a gradient of zero, f = 1, unless nobody has one: then the parameter is left alone, with
its memory, its momentum and its weights, as by torch.optim.SGD.

With two-sided compression ubar + r takes the place of ubar: what a worker owns counts p times as
much as what is in its own memory. The owner adds momentum then, for all workers: f of the momentum
is 1 where the owner has a gradient, and else 0.

A step that is called off has a_t = 0 and is otherwise like any other, but that dense buckets leave
nothing alone: f = 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import gmc_cuda
from gmc_cuda._engine.bucket import Bucket
from gmc_cuda._engine.exchange import Exchange
from support.problems import flat, memory_of

TOLERANCE = 1e-6


class Broken(Exception):
    """Something that must hold did not."""


def mean(exchange: Exchange, tensor: Tensor) -> Tensor:
    total = tensor.clone()
    exchange.all_reduce(total).wait()
    return total / exchange.size


def aggregate_of(optimizer: gmc_cuda.GMC, params: list[Tensor]) -> Tensor:
    """a of all workers, under one of its two names."""
    states = optimizer.state_dict()["state"]
    names = {name for state in states.values() for name in state} - {"memory", "owner_memory"}
    return flat([states[i][name] for i in range(len(params)) for name in names & {*states[i]}])


@dataclass
class Lost:
    """One worker's part of a step in which the group was lost; all of it [elements].

    Attributes:
        expected: what should be unsent here if nothing has arrived at its owner, float64.
        unsent: what is, or was when this worker died, float64; see memory_of.
        owned: where this worker is the owner, bool.
    """

    expected: Tensor
    unsent: Tensor
    owned: Tensor


def check_lost(losses: Sequence[Lost], owned_by_dead: Tensor | None = None) -> float:
    """Returns the largest error of what these workers have together; raises Broken for a large one.

    Args:
        owned_by_dead: what a worker owned that died with it, bool [elements]; not looked at.
    """
    expected = torch.stack([lost.expected for lost in losses])
    unsent = torch.stack([lost.unsent for lost in losses])
    off = (unsent - expected).sum(0).abs() / (1 + expected.abs().sum(0))
    error = float((off if owned_by_dead is None else off[~owned_by_dead]).max())
    if error > TOLERANCE:
        raise Broken(f"what a step whose group was lost left unsent is off by {error:.1e}")
    return error


class MassEquation:
    """Made when the gradients are in place; check() after the step.

    Args:
        scaled: whether the gradients hold whatever overflowed, which then counts as a whole.
    """

    def __init__(
        self, optimizer: gmc_cuda.GMC, params: list[Tensor], gradients: list[Any], scaled: bool
    ) -> None:
        self.optimizer, self.params = optimizer, params
        self.exchange = Exchange(None)
        own = [
            torch.zeros_like(p) if g is None else g for p, g in zip(params, gradients, strict=True)
        ]
        self.not_finite = sum(int((~g.isfinite()).sum()) for g in own)
        if scaled and self.not_finite:
            own = [torch.zeros_like(g) for g in own]
        gradient = flat([g.nan_to_num(0.0, 0.0, 0.0) for g in own])
        present = torch.tensor([float(g is not None) for g in gradients], dtype=torch.float64)
        memory, numel = memory_of(optimizer, params), gradient.numel()
        met = torch.tensor([float(self.not_finite)])
        sums = mean(self.exchange, torch.cat([memory, gradient, present, met]))
        self.ubar, self.gbar, share, met = sums.split([numel, numel, len(params), 1])
        self.skips = bool(met > 0)
        self.w, self.a, self.own = flat(params), aggregate_of(optimizer, params), memory
        self.gradient = gradient
        numels = torch.tensor([p.numel() for p in params])
        self.share, self.present = [torch.repeat_interleave(t, numels) for t in (share, present)]
        self.momentum = self._of_groups(self._momentum) * self.a
        self.owned = self._owned()
        have = mean(self.exchange, torch.cat([self.owned, self.owned * self.present]))
        self.has_owner, self.owner_present = (have * self.exchange.size).split(numel)
        self.decay = self._of_groups(lambda group: group["weight_decay"]) * self.w
        self.lr = self._of_groups(lambda group: group["lr"])

    def check(self, called_off: bool = False) -> float:
        """Returns the largest error; raises Broken where it exceeds the tolerance."""
        dense = self._is_dense()
        alone = dense & (self.share == 0)
        factor = torch.where(dense, (self.share > 0).double(), self.share)
        if called_off:
            factor[dense] = 1.0
        adds_momentum = torch.where(self._is_two_sided(), self.owner_present, factor)
        w, u = flat(self.params), memory_of(self.optimizer, self.params)
        a = aggregate_of(self.optimizer, self.params)
        ubar = mean(self.exchange, u)
        if not (u.isfinite().all() and w.isfinite().all()):
            raise Broken("a value that is not finite is in memory or in the weights")
        if called_off:
            if not torch.equal(w, self.w) or a.any():
                raise Broken("a step that was called off moved the weights")
            alone = torch.zeros_like(alone)
        else:
            if self.skips and not (torch.equal(w, self.w) and not a[~alone].any()):
                raise Broken("a step with a value that is not finite was not skipped")
            # Where a bucket is sent dense, owner memory goes to the memory, rounded to float32.
            slack = torch.where(self.has_owner > 0, TOLERANCE * self.own.abs(), 0.0)
            kept = (u - self.own).abs() <= slack
            if not (kept[alone].all() and torch.equal(a[alone], self.a[alone])):
                raise Broken("a parameter that nobody had a gradient for was not left alone")
        applied = torch.where(alone, 0.0, a)
        came_in = self.ubar + self.gbar + factor * self.decay + adds_momentum * self.momentum
        size = 1 + self.ubar.abs() + self.gbar.abs() + self.momentum.abs()
        mass = ((ubar + applied - came_in).abs() / size).max()
        moved = ((w - (self.w - self.lr * applied)).abs() / (1 + self.w.abs())).max()
        error = float(torch.maximum(mass, moved))
        if error > TOLERANCE:
            raise Broken(f"the mass equation is off by {float(mass):.1e}, w by {float(moved):.1e}")
        return error

    def lost(self) -> Lost:
        """This worker's part of a step that ended with the loss of the group: a_t is zero."""
        if (
            not torch.equal(flat(self.params), self.w)
            or aggregate_of(self.optimizer, self.params).any()
        ):
            raise Broken("a step whose group was lost moved the weights")
        return self.in_hand()

    def in_hand(self) -> Lost:
        """What this worker has in a step that it has not ended."""
        factor = torch.where(self._is_dense(), 1.0, self.present)
        for_all = self.exchange.size * self.owned * self.present  # the owner's momentum
        adds_momentum = torch.where(self._is_two_sided(), for_all, factor)
        expected = self.own + self.gradient + factor * self.decay + adds_momentum * self.momentum
        return Lost(expected, memory_of(self.optimizer, self.params), self.owned > 0)

    @staticmethod
    def _momentum(group: dict[str, Any]) -> float:
        lr, previous = group["lr"], group["previous_lr"]
        if group["momentum_form"] == "buffer" or previous is None:
            return group["momentum"]
        return group["momentum"] * (previous / lr if lr else 0.0)

    def _of_groups(self, value: Any) -> Tensor:
        return torch.cat(
            [
                torch.full((p.numel(),), float(value(group)), dtype=torch.float64)
                for group in self.optimizer.param_groups
                for p in group["params"]
            ]
        )

    def _of_elements(self, flat_of: Callable[[Bucket], Tensor]) -> Tensor:
        """A flat tensor of each bucket, in the order of the parameters."""
        views = {
            p: view
            for bucket in self.optimizer.engine.buckets
            for p, view in zip(bucket.params, bucket.views(flat_of(bucket)), strict=True)
        }
        return flat([views[p] for p in self.params])

    def _owned(self) -> Tensor:
        def owned(bucket: Bucket) -> Tensor:
            ones = torch.zeros(bucket.numel)
            if bucket.owner is not None:
                bucket.owner.part(ones).fill_(1.0)
            return ones

        return self._of_elements(owned)

    def _is_dense(self) -> Tensor:
        """Whether the step has sent a bucket dense, for each element."""
        return self._of_elements(
            lambda bucket: torch.full((bucket.numel,), float(bucket.sent_entries == bucket.numel))
        ).bool()

    def _is_two_sided(self) -> Tensor:
        return (self.has_owner > 0) & ~self._is_dense()
