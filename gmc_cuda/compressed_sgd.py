"""What GMC and DGC share: buckets, the agreed verdict, overlap with the backward pass."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor

from gmc_cuda import agreement, ddp, hyperparameters, shards, transfers, wire
from gmc_cuda import state_dict as states
from gmc_cuda.buckets import MAX_NUMEL, Bucket, figures, in_storage_order, make_buckets
from gmc_cuda.exchange import Exchange, FlatGroup, GroupLost
from gmc_cuda.integrity import DamageWatch, DuplicateWatch, check_replicas
from gmc_cuda.rules import Rule
from gmc_cuda.shards import local

_params_of, _requires_grad = itemgetter("params"), attrgetter("requires_grad")

OVERLAPPED_BUCKETS = 4  # unless bucket_cap_mb says otherwise


@dataclass(frozen=True)
class Settings:
    """Options of the whole optimizer; see :class:`gmc_cuda.GMC`."""

    wire_dtype: torch.dtype
    overlap: bool
    bucket_cap_mb: float | None
    nonfinite: str
    check_replicas_every: int

    def check(self) -> None:
        hyperparameters.check_options(
            self.wire_dtype, self.bucket_cap_mb, self.nonfinite, self.check_replicas_every
        )

    def cap_numel(self, numel: int) -> int:
        """The most elements of a bucket, in a model of `numel`."""
        mb = self.bucket_cap_mb
        if mb is None:
            mb = 256.0
            # Only the last bucket's exchange is behind the backward pass; but each costs a latency.
            if self.overlap:
                mb = min(mb, max(1.0, numel * 4 / 2**20 / OVERLAPPED_BUCKETS))
        return min(int(mb * 2**20 / 4), MAX_NUMEL)

    def facts(self) -> dict[str, Any]:
        return {**vars(self), "wire_dtype": str(self.wire_dtype)}


class CompressedSGD(torch.optim.Optimizer):
    """An optimizer over buckets; a rule says how v is made. Not used on its own."""

    _scaled_together = False  # whether a scaler that all workers agree with calls step()

    def __init__(
        self,
        params: Any,
        defaults: dict[str, Any],
        *,
        rule: Rule,
        settings: Settings,
        process_group: Any,
        broadcast_parameters: bool,
    ) -> None:
        self._exchange: Exchange = FlatGroup(process_group)
        self._rule, self._settings = rule, settings
        self._buckets: list[Bucket] = []
        self._built = False
        try:
            settings.check()
            rule.check_facts(settings.overlap)
            super().__init__(params, {**rule.options, **hyperparameters.one_budget(defaults)})
            self._check_params(self.param_groups)
        except Exception as error:
            self._agree(error)
        self._agree(agreement.describe(self) | settings.facts() | rule.facts())
        if broadcast_parameters:
            self._broadcast(self.param_groups)
        self._start_up({})

    def _start_up(self, saved: states.Held) -> None:
        """Everything that is not options or parameters: also for a copy of an optimizer."""
        self._steps = 0
        self._skipped: Tensor | None = None  # counted on the device
        self._verdict: Tensor | None = None  # of the last step
        self._averaged = False
        self._damage, self._duplicates = DamageWatch(), DuplicateWatch()
        self._synchronizing = True
        self._hooked: set[Tensor] = set()
        self._started: list[transfers.Transfer] = []
        self._build(saved)
        self._built = True
        self.register_state_dict_post_hook(_complete)

    @property
    def wire_dtype(self) -> torch.dtype:
        return self._settings.wire_dtype

    @property
    def overlap(self) -> bool:
        return self._settings.overlap

    @property
    def nonfinite(self) -> str:
        return self._settings.nonfinite

    @property
    def process_group(self) -> Any:
        """The workers that this optimizer trains with. Set it on a copy from another process."""
        return self._exchange.group

    @process_group.setter
    def process_group(self, group: Any) -> None:
        self._refuse_between_backward_and_step("a new process_group")
        self._exchange = FlatGroup(group)

    # ------------------------------------------------------------------ parameters and buckets

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group. With several workers all of them must call it."""
        param_group = hyperparameters.one_budget(param_group)
        if not self._built:
            super().add_param_group(param_group)
            return
        self._refuse_between_backward_and_step("add_param_group")
        known = len(self.param_groups)
        try:
            super().add_param_group(param_group)
            self._check_params(self.param_groups)
            facts: dict[str, Any] | Exception = agreement.describe(self)
        except Exception as error:
            facts = error
        try:
            self._agree(facts)
        except Exception:
            del self.param_groups[known:]
            raise
        self._broadcast(self.param_groups[known:])
        self._repack()

    def _agree(self, facts: dict[str, Any] | Exception) -> None:
        agreement.check(self._exchange, facts, self._device())

    def _device(self) -> torch.device:
        groups = self.__dict__.get("param_groups", [])  # none if the arguments were refused
        devices = [local(p).device for group in groups for p in group["params"]]
        return devices[0] if devices else torch.device("cpu")

    def _check_params(self, groups: list[dict[str, Any]]) -> None:
        devices = set()
        seen: set[Tensor] = set()
        for g, group in enumerate(groups):
            self._check_group(group, g)
            for i, param in enumerate(group["params"]):
                name = f"params: {agreement.parameter_name(group, i)} of group {g}"
                hyperparameters.check_param(local(param), name)
                if param in seen:
                    raise ValueError(f"{name} stands in it twice")
                seen.add(param)
                devices.add(local(param).device)
        if len(devices) > 1:
            raise ValueError(
                f"params: got devices {', '.join(sorted(map(str, devices)))}, must be one device"
            )
        params = [p for group in groups for p in group["params"]]
        inside = shards.check(params, self._exchange.given, self._settings.overlap)
        if inside is not None:
            self._exchange.agree_group = inside

    def _check_group(self, group: dict[str, Any], g: int) -> None:
        where = f"of param group {g}"
        hyperparameters.check_group(group, where)
        self._rule.check(group, where)

    def _broadcast(self, groups: list[dict[str, Any]]) -> None:
        params = [local(p).detach() for group in groups for p in group["params"]]
        params = [p for p in params if p.numel()]
        self._exchange.broadcast([in_storage_order(p) for p in params])

    def _current_layout(self) -> list[bool]:
        params = chain.from_iterable(map(_params_of, self.param_groups))
        return list(map(_requires_grad, params))

    def _build(self, saved: states.Held) -> None:
        """Packs the parameters that require a gradient into buckets that hold what was saved."""
        self._layout = self._current_layout()
        groups = [[p for p in g["params"] if p.requires_grad] for g in self.param_groups]
        cap = self._settings.cap_numel(sum(local(p).numel() for p in chain.from_iterable(groups)))
        self._buckets = [
            bucket
            for g, params in enumerate(groups)
            for bucket in make_buckets(params, g, cap, self._rule.local_momentum)
        ]
        self._bucket_of = {p: b for b in self._buckets for p in b.params}
        if self._buckets and self._skipped is None:
            self._skipped = torch.zeros(1, dtype=torch.int64, device=self._buckets[0].device)
        self._install(saved)
        self._restart()
        if self.overlap:
            for param in self._bucket_of.keys() - self._hooked:
                param.register_post_accumulate_grad_hook(self._on_gradient)
                self._hooked.add(param)

    def _install(self, saved: states.Held) -> None:
        states.install(self._buckets, self.param_groups, self._rule, saved)
        self.state.clear()
        self.state.update(states.views(self._buckets))
        # Frozen parameters are in no bucket; what they hold waits until they are unfrozen.
        for param in saved.keys() - self._bucket_of.keys():
            self.state[param] = {k: v.to(param.device, copy=True) for k, v in saved[param].items()}

    def _held(self) -> states.Held:
        """All state, parameter by parameter."""
        frozen = {p: s for p, s in self.state.items() if p not in self._bucket_of}
        return frozen | states.export(self._buckets, self.param_groups, self._rule)

    def _repack(self) -> None:
        self._build(self._held())

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
            RuntimeError: a damaged payload arrived, or the process group was lost. The step was
                not made on this rank, and its gradients are in memory.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            self._make_step()
        except BaseException:
            self._forget_scaler()
            raise
        return loss

    def _make_step(self) -> None:
        self._begin()
        with self._giving_back_on_errors():
            skip = self._receive()
        self._apply(skip)
        self._restart()
        self._steps += 1
        every = self._settings.check_replicas_every
        if every and self._steps % every == 0:
            params = [p for bucket in self._buckets for p in bucket.flat_params()]
            names = list(self._bucket_of)
            try:
                check_replicas(self._exchange, params, lambda i: self._name(names[i]), self._steps)
            except GroupLost as error:
                raise self._told(error, "the step was applied here") from error

    def _begin(self) -> None:
        """Starts to send what was not started yet; step() waits for it. Under no_grad."""
        self._verdict = None
        self._exchange.check()
        if self._steps == 0:
            ddp.refuse_communicating(self._bucket_of, self._exchange.group)
        self._damage.check(self._exchange.rank)
        self._check_scaler()
        if self._layout != self._current_layout():
            self._refuse_between_backward_and_step("a change of requires_grad")
            self._repack()
        for g, group in enumerate(self.param_groups):
            self._check_group(group, g)
        waiting = self._buckets[len(self._started) :]
        grads = [bucket.flat_grads(self._refuse_gradient) for bucket in waiting]
        self._averaged = False
        self._rule.prepare(
            (p.grad for p in self._bucket_of if p.grad is not None),
            self._exchange.size,
            self._scaling()["grad_scale"],
        )
        with self._giving_back_on_errors():
            for bucket, its_grads in zip(waiting, grads, strict=True):
                self._start(bucket, its_grads)

    def _start(self, bucket: Bucket, grads: list[Tensor | None]) -> None:
        group = self.param_groups[bucket.group]
        arguments = self._scaling() | self._rule.arguments(group)
        transfer = transfers.start(
            bucket,
            self._exchange,
            wire.entries(group, bucket.numel, self.wire_dtype),
            grads,
            arguments,
            self.wire_dtype,
            self._rule.masks(group),
            self._rule.look_ahead(group),
        )
        self._started.append(transfer)

    def _scaling(self) -> dict[str, Tensor | None]:
        """What a GradScaler leaves at an optimizer while it calls step()."""
        found_inf = getattr(self, "found_inf", None)
        return {
            "grad_scale": getattr(self, "grad_scale", None),
            # The integer zero if no parameter has a gradient.
            "found_inf": found_inf if isinstance(found_inf, Tensor) else None,
        }

    def _forget_scaler(self) -> None:
        # A scaler takes these back after a step that went well only; the next one would multiply
        # its scale with what it finds.
        for name in ("grad_scale", "found_inf"):
            self.__dict__.pop(name, None)

    def _check_scaler(self) -> None:
        hyperparameters.check_scaler(
            hasattr(self, "found_inf"), self._scaled_together, self._exchange.size, self.overlap
        )

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # A scaler must call step() on every worker, even if only one met an overflow. Other readers
        # (Lightning) take it as a reason to refuse gradient clipping, also where nothing is scaled.
        return sys._getframe(1).f_globals.get("__name__") == torch.amp.grad_scaler.__name__

    def last_step_skipped(self) -> Tensor | None:
        """Whether the last step was skipped: bool [1] on the device.

        None before the first step, and after one that failed before the workers had agreed.
        """
        return None if self._verdict is None else self._verdict != 0

    def _receive(self) -> Tensor | None:
        """Waits for all payloads and merges them; returns the verdict. Changes no parameter."""
        for transfer in self._started:
            transfer.wait()
        if not self._started:  # a worker whose shards are all empty
            self._exchange.agree(torch.zeros(1, dtype=torch.int32, device=self._device()))
            return None
        self._verdict = skip = self._exchange.agree(transfers.agree(self._started))
        transfers.raise_on(self._started, skip, self._exchange.rank, self.nonfinite)
        for transfer in self._started:
            transfer.merge(skip)
        self._duplicates.look(self._started, self._exchange.size)
        return skip

    @contextmanager
    def _giving_back_on_errors(self) -> Iterator[None]:
        """Nothing was applied yet, so what was to be sent returns to memory."""
        try:
            yield
        except BaseException as error:  # also a Ctrl-C, after which many save their state
            transfers.cancel(self._started)
            if self._started and self._skipped is not None:
                self._skipped += 1
            self._restart()
            self._steps += 1
            if isinstance(error, GroupLost):
                raise self._told(error, "nothing was applied") from error
            raise

    def _told(self, error: GroupLost, outcome: str) -> GroupLost:
        return error.told(f"step {self._steps}", self._exchange.rank, outcome)

    def _apply(self, skip: Tensor | None) -> None:
        if skip is None:
            return
        count, flags = self._skipped, self._damage.flags(skip, self._exchange.size)
        for transfer in self._started:
            bucket = transfer.bucket
            lr = self.param_groups[bucket.group]["lr"]
            transfer.finish(bucket.flat_params(), lr, skip, count, flags)
            count = None  # once for all buckets
        self._damage.report()
        for group in self.param_groups:
            self._rule.finish(group)

    def _refuse_gradient(self, param: Tensor) -> None:
        assert param.grad is not None
        hyperparameters.refuse_gradient(param.grad, self._name(param))

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
        if any(transfer.bucket is bucket for transfer in self._started):
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
            self._check_scaler()
            with self._giving_back_on_errors():
                self._start(bucket, bucket.flat_grads(self._refuse_gradient))
            # Sent is sent: clipping these gradients afterwards would have no effect.
            for sent in bucket.params:
                sent.grad = None

    def _restart(self) -> None:
        if self.overlap:
            for transfer in self._started:
                for param in transfer.bucket.params:
                    param.grad = None
            self._missing = {bucket: set(bucket.params) for bucket in self._buckets}
        self._started = []

    def _refuse_between_backward_and_step(self, what: str) -> None:
        if self._started:
            raise RuntimeError(f"{what} between backward() and step() with overlap=True")

    # ------------------------------------------------------------- saving, loading and copying

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what ``state_dict()`` of the same optimizer gave, or torch.optim.SGD's.

        No collective. Memory stays float32 whatever the parameters' dtype. Options that the saved
        state is too old to have keep their present values.

        Raises:
            ValueError, TypeError: a state that does not fit; nothing was changed.

        Warns:
            UserWarning: the memory is another rank's and not the average of all.
        """
        self._refuse_between_backward_and_step("load_state_dict")
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            if changed is not None:
                state_dict = changed
        loaded = states.read(state_dict, self.param_groups, self._rule, type(self).__name__)
        for g, group in enumerate(loaded.groups):
            self._check_group(group, g)
        states.warn_of_another_ranks(loaded, self._exchange.rank, self._exchange.size)
        for group, new in zip(self.param_groups, loaded.groups, strict=True):
            group.update(new)
        self._install(loaded.held)
        self._damage = DamageWatch()
        self._averaged = loaded.stamp is not None and loaded.stamp.averaged
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    @torch.no_grad()
    def average_memory_(self) -> None:
        """Replaces every worker's memory (and local momentum) by the mean over all workers.

        All workers must call it. What is unsent in all, and so the run, is kept: afterwards the
        state of one worker is the state of all, for checkpoints that keep rank 0's only. Takes a
        second copy of the memory for as long as it runs.

        Raises:
            RuntimeError: the process group was lost; this worker's memory is what it was.
        """
        self._refuse_between_backward_and_step("average_memory_")
        own = sorted(self._rule.own_state())
        flats = [flat for bucket in self._buckets for flat in bucket.vectors().values()]
        frozen = [p for group in self.param_groups for p in group["params"]
                  if p in self.state and p not in self._bucket_of]  # fmt: skip
        flats += [self.state[p][name] for p in frozen for name in own if name in self.state[p]]
        sums = [flat.clone() for flat in flats]
        works = [self._exchange.all_reduce(total) for total in sums]
        try:
            for work in works:
                work.wait()
        except GroupLost as error:
            raise self._told(error, "memory was not averaged") from error
        for flat, total in zip(flats, sums, strict=True):
            torch.div(total, self._exchange.size, out=flat)
        self._averaged = True

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_between_backward_and_step("a copy")
        held = {p: {k: v.clone() for k, v in s.items()} for p, s in self._held().items()}
        return {
            "defaults": self.defaults,
            "param_groups": self.param_groups,
            "held": held,
            "rule": self._rule,
            "settings": self._settings,
            "exchange": self._exchange,
            "steps": self._steps,
            "skipped": None if self._skipped is None else self._skipped.clone(),
            "averaged": self._averaged,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "held" not in state:  # torch's own, which knows of no buckets
            super().__setstate__(state)
            return
        state = dict(state)
        held, steps = state.pop("held"), state.pop("steps")
        skipped, averaged = state.pop("skipped"), state.pop("averaged")
        self._rule, self._settings = state.pop("rule"), state.pop("settings")
        self._exchange = state.pop("exchange")
        super().__setstate__({**state, "state": defaultdict(dict)})
        self._start_up(held)
        self._steps, self._skipped, self._averaged = steps, skipped, averaged

    # --------------------------------------------------------------------------------- figures

    def stats(self) -> dict[str, Any]:
        """Figures of the run so far; reads the device.

        Returns:
            steps, skipped_steps; bytes_per_step, what this worker handed to the collectives of the
            last step (a single worker's stays there); dense_bytes_per_step, a float32 gradient's
            bytes; bytes_ratio, how many times fewer those were, and density, the share of entries
            sent (both 0 before the first step); repairs, selections that had to read all of memory
            again.
        """
        return figures(self._buckets, self._steps, self._skipped)


def _complete(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    assert isinstance(optimizer, CompressedSGD)
    exchange = optimizer._exchange
    stamp = states.Stamp(
        type(optimizer).__name__, exchange.rank, exchange.size, optimizer._averaged
    )
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states.add(state_dict, params, optimizer._held(), stamp)
