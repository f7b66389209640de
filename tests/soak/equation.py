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
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import gmc_cuda
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
    names = {name for state in states.values() for name in state} - {"memory"}
    return flat([states[i][name] for i in range(len(params)) for name in names & {*states[i]}])


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
        self.decay = self._of_groups(lambda group: group["weight_decay"]) * self.w
        self.lr = self._of_groups(lambda group: group["lr"])

    def check(self) -> float:
        """Returns the largest error; raises Broken where it exceeds the tolerance."""
        dense = self._is_dense()
        alone = dense & (self.share == 0)
        factor = torch.where(dense, (self.share > 0).double(), self.share)
        w, u = flat(self.params), memory_of(self.optimizer, self.params)
        a = aggregate_of(self.optimizer, self.params)
        ubar = mean(self.exchange, u)
        if not (u.isfinite().all() and w.isfinite().all()):
            raise Broken("a value that is not finite is in memory or in the weights")
        if self.skips and not (torch.equal(w, self.w) and not a[~alone].any()):
            raise Broken("a step with a value that is not finite was not skipped")
        if not (torch.equal(u[alone], self.own[alone]) and torch.equal(a[alone], self.a[alone])):
            raise Broken("a parameter that nobody had a gradient for was not left alone")
        applied = torch.where(alone, 0.0, a)
        came_in = self.ubar + self.gbar + factor * (self.decay + self.momentum)
        size = 1 + self.ubar.abs() + self.gbar.abs() + self.momentum.abs()
        mass = ((ubar + applied - came_in).abs() / size).max()
        moved = ((w - (self.w - self.lr * applied)).abs() / (1 + self.w.abs())).max()
        error = float(torch.maximum(mass, moved))
        if error > TOLERANCE:
            raise Broken(f"the mass equation is off by {float(mass):.1e}, w by {float(moved):.1e}")
        return error

    def check_lost(self) -> float:
        """The same on this worker for a step that ended with the loss of the group: a_t is zero."""
        u = memory_of(self.optimizer, self.params)
        a = aggregate_of(self.optimizer, self.params)
        if not torch.equal(flat(self.params), self.w) or a.any():
            raise Broken("a step whose group was lost moved the weights")
        # Without a gradient it depends on which way the bucket would have gone.
        known = self.present > 0
        v = self.own + self.gradient + self.decay + self.momentum
        error = float(((u - v).abs() / (1 + self.own.abs() + self.momentum.abs()))[known].max())
        if error > TOLERANCE:
            raise Broken(f"the gradient of a step whose group was lost is off by {error:.1e}")
        return error

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

    def _is_dense(self) -> Tensor:
        kinds = {
            p: bucket.aggregate is not None and bucket.aggregate.dtype == torch.float32
            for bucket in self.optimizer.engine.buckets
            for p in bucket.params
        }
        return torch.cat([torch.full((p.numel(),), kinds[p]) for p in self.params])
