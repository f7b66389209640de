"""What GMC and DGC share: buckets, the exchange, the agreed verdict, overlap with backward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gmc_cuda import agreement, hyperparameters, state_dict, steps
from gmc_cuda.buckets import MAX_NUMEL, Bucket, in_storage_order, make_buckets
from gmc_cuda.damage import DamageWatch
from gmc_cuda.exchange import Exchange
from gmc_cuda.reference import DAMAGED


class CompressedSGD(torch.optim.Optimizer):
    """An optimizer over buckets; subclasses say how v is made. Not used on its own."""

    _step_supports_amp_scaling = True  # GradScaler then calls step() on every rank
    _local_momentum = False

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        wire_dtype: torch.dtype,
        process_group: dist.ProcessGroup | None,
        overlap: bool,
        bucket_cap_mb: float,
        nonfinite: str,
        broadcast_parameters: bool,
        clip_norm: float | None = None,
    ) -> None:
        self._exchange = Exchange(process_group)
        options = {
            "wire_dtype": str(wire_dtype),
            "overlap": overlap,
            "bucket_cap_mb": bucket_cap_mb,
            "nonfinite": nonfinite,
            "clip_norm": clip_norm,
        }
        self._buckets: list[Bucket] = []
        self._layout: list[tuple[bool, ...]] = []
        self._built = False
        self._skipped: Tensor | None = None  # counted on the device
        try:
            hyperparameters.check_options(wire_dtype, bucket_cap_mb, nonfinite)
            hyperparameters.check_clip_norm(clip_norm, overlap)
            self.wire_dtype = wire_dtype
            self.overlap = overlap
            self.nonfinite = nonfinite
            self._cap_numel = min(int(bucket_cap_mb * 2**20 / 4), MAX_NUMEL)
            super().__init__(params, defaults)
            self._check_params()
        except Exception as error:
            agreement.check(self._exchange, error)
        agreement.check(self._exchange, agreement.describe(self) | options)
        if broadcast_parameters:
            self._broadcast(self.param_groups)
        self._built = True
        self._steps = 0
        self._damage = DamageWatch()
        self._synchronizing = True
        self._hooked: set[Tensor] = set()
        self._started: list[steps.Step] = []
        self._build()
        state_dict.attach(self)

    # ------------------------------------------------------------------ parameters and buckets

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group. With several workers all of them must call it."""
        if not self._built:
            super().add_param_group(param_group)
            return
        self._refuse_between_backward_and_step("add_param_group")
        known = len(self.param_groups)
        try:
            super().add_param_group(param_group)
            self._check_params()
            facts: dict[str, Any] | Exception = agreement.describe(self)
        except Exception as error:
            facts = error
        try:
            agreement.check(self._exchange, facts)
        except Exception:
            del self.param_groups[known:]
            raise
        self._broadcast(self.param_groups[known:])
        self._build()

    def _check_params(self) -> None:
        devices = set()
        for g, group in enumerate(self.param_groups):
            hyperparameters.check_group(group, g)
            for i, param in enumerate(group["params"]):
                name = f"params: {agreement.parameter_name(group, i)} of group {g}"
                hyperparameters.check_param(param, name)
                devices.add(param.device)
        if len(devices) > 1:
            raise ValueError(
                f"params: got devices {', '.join(sorted(map(str, devices)))}, must be one device"
            )

    def _broadcast(self, groups: list[dict[str, Any]]) -> None:
        params = [p.detach() for group in groups for p in group["params"] if p.numel()]
        self._exchange.broadcast([in_storage_order(p) for p in params])

    def _current_layout(self) -> list[tuple[bool, ...]]:
        return [tuple(p.requires_grad for p in group["params"]) for group in self.param_groups]

    def _build(self) -> None:
        """Packs the parameters that require a gradient into buckets, keeping what they hold."""
        kept = state_dict.export(self._buckets)
        frozen = {p: s for p, s in self.state.items() if not p.requires_grad}
        self._layout = self._current_layout()
        self._buckets = [
            bucket
            for g, group in enumerate(self.param_groups)
            for bucket in make_buckets(
                [p for p in group["params"] if p.requires_grad],
                g,
                self._cap_numel,
                self._local_momentum,
            )
        ]
        self._bucket_of = {p: b for b in self._buckets for p in b.params}
        if self._buckets and self._skipped is None:
            self._skipped = torch.zeros(1, dtype=torch.int64, device=self._buckets[0].device)
        state_dict.install(self, {**frozen, **kept})
        self._restart()
        if self.overlap:
            for param in self._bucket_of.keys() - self._hooked:
                param.register_post_accumulate_grad_hook(self._on_gradient)
                self._hooked.add(param)

    # ------------------------------------------------------------------------------ the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Compresses, exchanges and applies. With several workers all of them must call it.

        Args:
            closure: reevaluates the model and returns the loss, as in torch.optim.

        Returns:
            What the closure returned.

        Raises:
            ValueError, TypeError: a gradient that cannot be used; nothing was changed.
            FloatingPointError: with ``nonfinite="raise"``, on every rank, when a rank met a
                non-finite gradient. The finite gradients of the step stay in memory.
            RuntimeError: a damaged payload arrived. The step was not made on this rank.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._damage.check(self._exchange.rank)
        hyperparameters.check_scaler(self, self._exchange.size)
        if self._layout != self._current_layout():
            self._refuse_between_backward_and_step("a change of requires_grad")
            self._build()
        for g, group in enumerate(self.param_groups):
            hyperparameters.check_group(group, g)
        waiting = self._buckets[len(self._started) :]
        self._check_gradients(waiting)
        self._before_sending()
        try:
            for bucket in waiting:
                self._start(bucket)
            skip = self._receive()
        except Exception:
            self._take_back()
            raise
        self._apply(skip)
        self._restart()
        return loss

    def _start(self, bucket: Bucket) -> None:
        group = self.param_groups[bucket.group]
        k = max(1, math.ceil(group["density"] * bucket.numel))
        rule = self._rule(group)
        step = steps.start(
            bucket,
            self._exchange,
            k,
            rule,
            self.wire_dtype,
            masking=group.get("momentum_masking", False),
        )
        bucket.sent_nbytes = step.nbytes
        self._started.append(step)

    def _receive(self) -> Tensor | None:
        """Waits for all payloads and merges them; returns the verdict. Changes no parameter."""
        self._steps += 1
        for step in self._started:
            step.wait()
        if not self._started:
            return None
        skip = steps.agree(self._started)
        self._raise_on(skip)
        for step in self._started:
            step.merge(skip)
        return skip

    def _take_back(self) -> None:
        """After an error: nothing was applied, so what was to be sent returns to memory."""
        for step in self._started:
            step.give_back()
            step.bucket.aggregate = None
        if self._started:
            self._skipped += 1
        self._restart()

    def _apply(self, skip: Tensor | None) -> None:
        if skip is None:
            return
        for step in self._started:
            step.finish(self.param_groups[step.bucket.group]["lr"], skip)
        self._skipped += skip != 0
        aggregates = [s.aggregate for s in self._started if isinstance(s, steps.SparseStep)]
        if aggregates and aggregates[0].is_cuda:
            self._damage.submit(aggregates)
        for group in self.param_groups:
            _remember_lr(group)

    def _raise_on(self, skip: Tensor) -> None:
        if self.nonfinite != "raise" and not skip.is_cpu:
            return  # reading the verdict would make the host wait for the device
        verdict = int(skip)
        if verdict & DAMAGED:
            raise RuntimeError(
                f"rank {self._exchange.rank} received a damaged payload header; the step was not "
                "made here, and replicas may differ: restart from a checkpoint"
            )
        if verdict and self.nonfinite == "raise":
            counts = sum(step.nonfinite() for step in self._started).tolist()
            met = [f"{count} on rank {rank}" for rank, count in enumerate(counts) if count]
            raise FloatingPointError(
                f"non-finite gradient values: {', '.join(met)}; the step was not made, and the "
                "finite gradients stay in memory (nonfinite='skip' goes on without raising)"
            )

    def _before_sending(self) -> None:
        """For what needs the whole gradient, which exists only without overlap."""

    def _rule(self, group: dict[str, Any]) -> dict[str, Any]:
        """How v is made: keyword arguments of ops.compress_."""
        return {
            "momentum": group["momentum"],
            "weight_decay": group["weight_decay"],
            "maximize": group["maximize"],
            "grad_scale": getattr(self, "grad_scale", None),
            "found_inf": getattr(self, "found_inf", None),
        }

    def _check_gradients(self, buckets: list[Bucket]) -> None:
        for bucket in buckets:
            for param in bucket.params:
                if param.grad is not None:
                    hyperparameters.check_gradient(param, lambda p=param: self._name(p))

    def _name(self, param: Tensor) -> str:
        for g, group in enumerate(self.param_groups):
            for i, candidate in enumerate(group["params"]):
                if candidate is param:
                    return f"{agreement.parameter_name(group, i)} of group {g}"
        raise KeyError(param)

    # ---------------------------------------------------------- overlap with the backward pass

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulates gradients without sending them, as in DistributedDataParallel.

        Needed only with ``overlap=True``, around every backward pass but the last before step().
        """
        before, self._synchronizing = self._synchronizing, False
        try:
            yield
        finally:
            self._synchronizing = before

    @torch.no_grad()
    def _on_gradient(self, param: Tensor) -> None:
        bucket = self._bucket_of.get(param)
        if not self._synchronizing or bucket is None:
            return
        if any(step.bucket is bucket for step in self._started):
            raise RuntimeError(
                f"the gradient of {self._name(param)} arrived again before step(): with "
                "overlap=True wrap every backward pass but the last in optimizer.no_sync()"
            )
        self._missing[bucket].discard(param)
        # In bucket order, whatever order gradients arrive in, so that ranks cannot deadlock.
        while len(self._started) < len(self._buckets):
            bucket = self._buckets[len(self._started)]
            if self._missing[bucket]:
                break
            hyperparameters.check_scaler(self, self._exchange.size)
            self._check_gradients([bucket])
            self._start(bucket)
            # Sent is sent: clipping these gradients afterwards would have no effect.
            for sent in bucket.params:
                sent.grad = None

    def _restart(self) -> None:
        if self.overlap:
            for step in self._started:
                for param in step.bucket.params:
                    param.grad = None
        self._started = []
        self._missing = {bucket: set(bucket.params) for bucket in self._buckets}

    def _refuse_between_backward_and_step(self, what: str) -> None:
        if self._started:
            raise RuntimeError(f"{what} between backward() and step() with overlap=True")

    # --------------------------------------------------------------------------------- figures

    def stats(self) -> dict[str, int]:
        """Figures of the run so far; reads the device.

        Returns:
            steps, skipped_steps; bytes_per_step, what this worker put into the collectives of the
            last step; dense_bytes_per_step, a float32 gradient's bytes; repairs, selections that
            had to read all of memory again.
        """
        return {
            "steps": self._steps,
            "skipped_steps": 0 if self._skipped is None else int(self._skipped),
            "bytes_per_step": sum(bucket.sent_nbytes for bucket in self._buckets),
            "dense_bytes_per_step": sum(4 * bucket.numel for bucket in self._buckets),
            "repairs": sum(bucket.count_repairs() for bucket in self._buckets),
        }


def _remember_lr(group: dict[str, Any]) -> None:
    if "previous_lr" not in group:
        return
    lr, previous = group["lr"], group["previous_lr"]
    if not isinstance(lr, Tensor):
        group["previous_lr"] = lr
    elif isinstance(previous, Tensor):  # in place, so that a replayed graph does it too
        previous.copy_(lr)
    else:
        group["previous_lr"] = lr.clone()
