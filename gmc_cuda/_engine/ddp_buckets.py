"""Buckets as DistributedDataParallel cuts them, which may change from step to step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gmc_cuda._engine import checks
from gmc_cuda._engine import state as states
from gmc_cuda._engine.bucket import MAX_NUMEL, Bucket, make_buckets
from gmc_cuda._engine.rules import Rule


class DDPBuckets:
    """Each parameter's memory and momentum for gmc_hook, whatever bucket the parameter is in.

    Args:
        rule: the method, which says what state a worker keeps.
    """

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._bucket_of: dict[Tensor, Bucket] = {}
        self._held: states.Held = {}  # state of parameters that are in no bucket now

    def all(self) -> list[Bucket]:
        return list(dict.fromkeys(self._bucket_of.values()))

    def find(
        self,
        params: list[Tensor],
        buffer: Tensor,
        options: dict[str, Any],
        owner: tuple[int, int] | None,
    ) -> Bucket | None:
        """The bucket of exactly these parameters, made if need be; None if they have no elements.

        Args:
            buffer: DDP's flat buffer with the gradients.
            options: the options of a new bucket.
            owner: this worker's rank and the world size, with two-sided compression; else None.
        """
        params = [p for p in params if p.numel()]
        if not params:
            return None
        found = self._bucket_of.get(params[0])
        if found is not None and set(found.params) == set(params):
            return found
        for i, param in enumerate(params):
            checks.check_param(param, f"parameter {i} of a bucket")
            if param.dtype != buffer.dtype:
                raise TypeError(
                    f"gmc_hook: got gradients in {buffer.dtype} for parameters in {param.dtype}, "
                    "must be in the same: leave out the wrapper or mixed precision that converts "
                    "them (GMCHookState(wire_dtype=...) says in what is sent)"
                )
        for old in {self._bucket_of[p] for p in params if p in self._bucket_of}:
            for param, tensors in states.export([old], self._rule).items():
                self._held[param] = {name: tensor.clone() for name, tensor in tensors.items()}
                del self._bucket_of[param]
        (bucket,) = make_buckets(params, options, MAX_NUMEL, self._rule.local_momentum, owner)
        states.install([bucket], self._rule, self._held)
        for param in bucket.params:
            self._bucket_of[param] = bucket
            self._held.pop(param, None)
        return bucket

    def held(self) -> states.Held:
        """Each parameter's memory and momentum."""
        return self._held | states.export(self.all(), self._rule)

    @torch.no_grad()
    def load(self, held: states.Held) -> None:
        """Replaces each parameter's memory and momentum; zero where there is none."""
        states.install(self.all(), self._rule, held)
        self._held = {
            p: {k: v.to(p.device, copy=True) for k, v in tensors.items()}
            for p, tensors in held.items()
            if p not in self._bucket_of
        }
