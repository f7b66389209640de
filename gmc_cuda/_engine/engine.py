"""The engine of GMC and DGC: an optimizer's buckets, and the order of events in its steps."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from gmc_cuda._engine import checks, comparison, ddp_guard, shards, steps
from gmc_cuda._engine import state as states
from gmc_cuda._engine.bucket import MAX_NUMEL, Bucket, in_storage_order
from gmc_cuda._engine.exchange import Exchange, GroupLost
from gmc_cuda._engine.fingerprint import fingerprints
from gmc_cuda._engine.meeting import meet
from gmc_cuda._engine.overlap import Overlap
from gmc_cuda._engine.owner import owner_of
from gmc_cuda._engine.packing import Packing
from gmc_cuda._engine.round import Round
from gmc_cuda._engine.rules import Group, Rule
from gmc_cuda._engine.shards import shard_of
from gmc_cuda._engine.watch import check_replicas

FIRST_STEPS = 2  # in these steps the tags of payloads also compare the parameters' bits
OVERLAPPED_BUCKETS = 4  # in how many buckets overlap cuts a model, unless bucket_cap_mb is given


@dataclass(frozen=True)
class Settings:
    """Options of the whole optimizer; see :class:`gmc_cuda.GMC`."""

    wire_dtype: torch.dtype
    overlap: bool
    bucket_cap_mb: float | None
    nonfinite: str
    check_replicas_every: int
    exchange: str

    def check(self) -> None:
        checks.check_options(
            self.wire_dtype, self.overlap, self.bucket_cap_mb, self.nonfinite,
            self.check_replicas_every, self.exchange,
        )  # fmt: skip

    def owner(self, exchange: Exchange) -> tuple[int, int] | None:
        """This worker's rank and the world size, with two-sided compression; else None."""
        return owner_of(self.exchange, exchange)

    def cap_numel(self, numel: int) -> int:
        """The most elements of a bucket, in a model of `numel`."""
        mb = self.bucket_cap_mb
        if mb is None:
            mb = 256.0
            # Only the last bucket's exchange is not hidden by the backward pass, so small buckets
            # are better; but each bucket costs the network's latency.
            if self.overlap:
                mb = min(mb, max(1.0, numel * 4 / 2**20 / OVERLAPPED_BUCKETS))
        return int(min(mb * 2**20 / 4, MAX_NUMEL))

    def facts(self) -> dict[str, Any]:
        return {**vars(self), "wire_dtype": str(self.wire_dtype)}


class Engine:
    """Makes an optimizer's steps.

    Args:
        optimizer: the optimizer, whose param_groups and state are read. It is not kept alive.
        rule: the method.
        settings: options of the whole optimizer.
        exchange: the workers.
        number: the optimizer's number in this run, the same on all workers.

    Attributes:
        round: the present step, and what is known of those before.
        averaged: whether memory is still the mean over all workers.
        scaled_together: whether a gmc_cuda.GradScaler is calling step().
        compares_bits: whether parameters must be bit-equal on all workers in the first steps.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        rule: Rule,
        settings: Settings,
        exchange: Exchange,
        number: int,
    ) -> None:
        self._optimizer = weakref.ref(optimizer)
        self.rule, self.settings = rule, settings
        self.round = Round(
            exchange, settings.wire_dtype, settings.nonfinite, number, self._facts,
            settings.exchange,
        )  # fmt: skip
        self.averaged = self.scaled_together = False
        self.compares_bits = True
        self._refused: dict[str, Any] = {}  # why this worker refuses the step; see refuse()
        self._just_checked = False  # whether begin() has compared the parameters' places
        self._overlap = Overlap(self._on_gradient) if settings.overlap else None
        self.pack()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        optimizer = self._optimizer()
        assert optimizer is not None
        return optimizer

    @property
    def exchange(self) -> Exchange:
        return self.round.exchange

    def _facts(self) -> dict[str, Any]:
        facts = describe(self.optimizer, self.rule, self.settings)
        return facts | self._bits() | self._refused

    def _bits(self) -> dict[str, int]:
        """In the first steps, a fingerprint of each parameter; then nothing. Reads the device.

        It finds weights that were loaded on one worker only after the optimizer was constructed.
        """
        if self.exchange.size == 1 or self.round.steps >= FIRST_STEPS or not self.compares_bits:
            return {}
        params = [p for bucket in self._packing.buckets for p in bucket.flat_params()]
        names = [self._name(p) for bucket in self._packing.buckets for p in bucket.params]
        prints = fingerprints(params).tolist() if params else []
        return {f"bits of {name}": bits for name, bits in zip(names, prints, strict=True)}

    def warn_of_growth(self, groups: Sequence[Group], stacklevel: int) -> None:
        """Warns of a memory_decay with which more grows in a step than is sent.

        Of global momentum's share of what was sent it comes back, so less leaves.
        """
        for bucket in self._packing.buckets:
            growth = bucket.group["memory_decay"] - 1
            if growth <= 0 or not any(bucket.group is group for group in groups):
                continue
            plan = self.rule.plan(bucket.group, bucket, self.settings.wire_dtype, self.exchange)
            leaves = plan.k / plan.numel
            if not self.rule.local_momentum:
                leaves *= 1 - float(bucket.group["momentum"])
            if growth > 1.01 * leaves:
                warnings.warn(
                    f"memory_decay: got {1 + growth:g}, with which what waits grows faster than it "
                    "is sent and may diverge: with this momentum and density, take at most "
                    f"{1 + leaves:.4g}, which for GMC is 1 + (1 - momentum) * density and for DGC "
                    "1 + density",
                    stacklevel=stacklevel,
                )
                return

    # ------------------------------------------------------------------ parameters and buckets

    @property
    def buckets(self) -> list[Bucket]:
        """The buckets, rebuilt if param_groups or state have changed."""
        if not self.round.is_open:
            self.refresh()
        return self._packing.buckets

    @property
    def bucket_of(self) -> dict[Tensor, Bucket]:
        """The bucket of each parameter that requires a gradient."""
        return self._packing.bucket_of

    def refresh(self) -> None:
        """Rebuilds the buckets if param_groups or state have changed."""
        optimizer = self.optimizer
        if not self._packing.holds(optimizer.param_groups, optimizer.state):
            check_params(optimizer, self.rule, self.settings, self.exchange)
            self.pack()
        elif self._packing.moved and self._overlap is not None:
            self._overlap.listen(self._packing.bucket_of)
            self._packing.moved = False

    @torch.inference_mode(False)  # what is made in it could not be changed outside
    @torch.no_grad()
    def pack(self) -> None:
        """Makes the buckets from param_groups and state."""
        optimizer = self.optimizer
        numel = sum(shard_of(p).numel() for p in params_of(optimizer) if p.requires_grad)
        cap = self.settings.cap_numel(numel)
        owner = self.settings.owner(self.exchange)
        states.make_place(optimizer.param_groups)
        self._packing = Packing(optimizer.param_groups, optimizer.state, self.rule, cap, owner)
        self.round.device = device_of(optimizer)
        if self._overlap is not None:
            self._overlap.listen(self._packing.bucket_of)

    # ------------------------------------------------------------------------------ the step

    def begin(self) -> None:
        """Sends the buckets that were not sent during the backward pass, after all checks."""
        optimizer = self.optimizer
        self.exchange.check()
        self.round.damage.check(self.exchange.rank)
        self._check_scaler()
        for g, group in enumerate(optimizer.param_groups):
            check_group(group, g, self.rule)
        self._just_checked = not self.round.is_open
        waiting = self.round.waiting if self.round.is_open else self.buckets
        if ddp_guard.is_due(self.round.steps):
            ddp_guard.refuse_communicating(params_of(optimizer), self.exchange.group)
        alone = len(waiting) == 1 and waiting[0].owner is None and not self.rule.reads_gradients
        if alone and self._just_checked and self._send_unchecked(waiting[0]):
            return
        grads = [bucket.flat_grads(self._refuse_gradient) for bucket in waiting]
        if not self.round.is_open:
            self._open()
        for its_grads in grads:
            self.round.send(its_grads)

    def _send_unchecked(self, bucket: Bucket) -> bool:
        """Sends a single bucket, and leaves the checks of its gradients to the operator.

        This saves two passes over all gradients.

        Returns:
            False if the operator cannot take the gradients; then nothing was sent or changed.
        """
        grads = bucket.plain_grads()
        if grads is None:
            return False
        self._open()
        try:
            self.round.send(grads)
        except (TypeError, ValueError) as error:
            if not str(error).startswith("grads"):
                raise
            return False
        return True

    def _open(self) -> None:
        self.averaged = False
        buckets, scaling = self._packing.buckets, self._scaling()
        bits = tuple(self._bits().values())
        grads = (
            shards.shard_of_gradient(p, p.grad)
            for bucket in buckets
            for p in bucket.params
            if p.grad is not None
        )
        self.rule.prepare(grads, self.exchange, scaling["grad_scale"])
        self.round.open(
            [
                (bucket, self.round.plan(self.rule, bucket, i, bucket.group, scaling, bits))
                for i, bucket in enumerate(buckets)
            ]
        )

    def finish(self) -> list[BaseException]:
        """Waits for what all workers have sent, and applies it.

        Returns:
            Errors that did not keep the step from being made, to be raised now.
        """
        late = self.round.finish(self._target)
        for bucket in self._packing.buckets:
            bucket.bump_versions()
        for group in self.optimizer.param_groups:
            steps.insist(partial(self.rule.finish, group), late)
        if self._overlap is not None:
            self._overlap.following = False
        if self._overlap is not None or late:
            self._forget_grads()
        every = self.settings.check_replicas_every
        if every and self.round.steps % every == 0:
            self._check_replicas()
        return late

    def _target(self, bucket: Bucket) -> tuple[list[Tensor], float | Tensor]:
        places = bucket.param_places(look=not self._just_checked)
        return places, checks.as_float(bucket.group["lr"])

    def cancel(self, made: int | None = None) -> None:
        """Gives a step up; what was sent of it returns to memory.

        Args:
            made: how many steps had been made when it began. If it was made before the error came,
                its gradients are dropped, which would count again.
        """
        if self._overlap is not None:
            self._overlap.following = False
        self.round.cancel()
        if made is not None and self.round.made > made:
            self._forget_grads()

    def _forget_grads(self) -> None:
        for bucket in self._packing.buckets:
            bucket.forget_grads()

    def refuse(self, why: dict[str, Any]) -> None:
        """Makes all workers raise instead of the step that they are about to make. Collective.

        Args:
            why: facts for the error, by the name of what is wrong.

        Raises:
            ValueError: on all workers, with the facts of each.
        """
        plans = [
            self.round.plan(self.rule, bucket, i, bucket.group, {})
            for i, bucket in enumerate(self._packing.buckets)
        ]
        self._refused = why
        try:
            self.round.compare(plans, (-1,))  # no step has this size
        finally:
            self._refused = {}

    def _check_replicas(self) -> None:
        buckets = self._packing.buckets
        flat = [p for bucket in buckets for p in bucket.flat_params()]
        params = [p for bucket in buckets for p in bucket.params]
        try:
            check_replicas(
                self.exchange, flat, self.round.device, lambda i: self._name(params[i]),
                self.round.steps,
            )  # fmt: skip
        except GroupLost as error:
            raise self.round.with_context(error, "the step was applied here") from error

    def _scaling(self) -> dict[str, Tensor | None]:
        """The attributes that a GradScaler sets on an optimizer while it calls step()."""
        found_inf = getattr(self.optimizer, "found_inf", None)
        return {
            "grad_scale": getattr(self.optimizer, "grad_scale", None),
            # A GradScaler sets the integer 0 if no parameter has a gradient.
            "found_inf": found_inf if isinstance(found_inf, Tensor) else None,
        }

    def _check_scaler(self) -> None:
        checks.check_scaler(
            hasattr(self.optimizer, "found_inf"),
            self.scaled_together,
            self.exchange.size,
            self._overlap is not None,
        )

    def _refuse_gradient(self, param: Tensor) -> None:
        assert param.grad is not None
        checks.refuse_gradient(param.grad, self._name(param))

    def _name(self, param: Tensor) -> str:
        for g, group in enumerate(self.optimizer.param_groups):
            for i, candidate in enumerate(group["params"]):
                if candidate is param:
                    return f"{comparison.parameter_name(group, i)} of group {g}"
        return "a parameter that is in no group any more"

    # ---------------------------------------------------------- overlap with the backward pass

    def paused(self) -> AbstractContextManager[None]:
        """A context in which gradients are accumulated but not sent."""
        return nullcontext() if self._overlap is None else self._overlap.paused()

    def release(self) -> None:
        """Ends the overlap: from now on gradients are sent in step() only."""
        self.cancel()
        if self._overlap is not None:
            self._overlap.listen([])
            self._overlap = None

    @torch.no_grad()
    def _on_gradient(self, param: Tensor) -> None:
        overlap = self._overlap
        assert overlap is not None
        if not overlap.following:
            overlap.follow(self.buckets)
        bucket = self.bucket_of.get(param)
        if bucket is None:
            return
        try:
            if not overlap.arrived(param, bucket):
                raise RuntimeError(
                    f"the gradient of {self._name(param)} arrived again before step(). With "
                    "overlap=True it is sent as soon as it is there: wrap every backward pass but "
                    "the last in optimizer.no_sync(), and end one that no step is to follow by "
                    "optimizer.zero_grad(). A layer inside several checkpoints with "
                    "use_reentrant=True gets its gradient in parts: use use_reentrant=False, or "
                    "overlap=False"
                )
            for ready in overlap.complete():
                self._check_scaler()
                grads = ready.flat_grads(self._refuse_gradient)
                if not self.round.is_open:
                    for g, group in enumerate(self.optimizer.param_groups):
                        check_group(group, g, self.rule)
                    self._open()
                self.round.send(grads)
                ready.forget_grads()  # to clip them now would have no effect
        except BaseException:
            self.cancel()
            raise

    def refuse_open_round(self, what: str) -> None:
        """Raises RuntimeError if gradients were sent and not applied yet."""
        if self.round.is_open:
            raise RuntimeError(f"{what} between backward() and step() with overlap=True")

    # ------------------------------------------------------------------------ state as a whole

    def held(self) -> states.Held:
        """Each parameter's memory and momentum; zero for trained parameters without them."""
        optimizer = self.optimizer
        held = states.held(optimizer.param_groups, optimizer.state, self.rule)
        for group in optimizer.param_groups:
            names = ("memory", self.rule.momentum_name(group))
            for param in group["params"]:
                if param.requires_grad and len(held.get(param, ())) < len(names):
                    zero = torch.zeros_like(shard_of(param), dtype=torch.float32)
                    held[param] = dict.fromkeys(names, zero) | held.get(param, {})
        return held

    def install(self, held: states.Held, size: int | None = None) -> None:
        """Replaces each parameter's memory and momentum; zero where there is none.

        Args:
            size: the world size when the state was saved. Default: the present one.
        """
        optimizer, buckets = self.optimizer, self.buckets
        own = self.exchange.size
        held = states.for_owner(held, size or own, self.settings.owner(self.exchange))
        states.install(buckets, self.rule, held)
        for param, tensors in held.items():
            if param not in self.bucket_of:  # a frozen parameter: its state waits
                copies = {k: v.to(shard_of(param).device, copy=True) for k, v in tensors.items()}
                optimizer.state.setdefault(param, {}).update(copies)

    def progress(self) -> dict[str, Any]:
        """What a copy needs besides param_groups and state."""
        skipped = self.round.skipped
        return {
            "steps": self.round.steps,
            "skipped": None if skipped is None else skipped.clone(),
            "averaged": self.averaged,
            "rank": self.exchange.rank,
            "size": self.exchange.size,
        }

    def shard_place(self) -> tuple[int, int] | None:
        """Which shard of the parameters this worker holds, of how many; see shards.place."""
        return shards.place(params_of(self.optimizer), self.exchange.shard_group)

    def set_exchange(self, exchange: Exchange) -> None:
        """Makes these the workers."""
        own = self.settings.owner(self.exchange)
        if own != self.settings.owner(exchange):
            self._fold_owners()
            self.round.exchange = exchange
            self.pack()
        self.round.exchange = exchange
        self.round.forget_sizes()  # they were those of other workers

    def set_progress(self, progress: dict[str, Any]) -> None:
        self.round.steps, self.round.skipped = progress["steps"], progress["skipped"]
        self.averaged = progress["averaged"]

    def average_memory(self) -> None:
        """Replaces memory, and local momentum, by the mean over all workers."""
        meet(self.exchange, "average_memory_()")
        self._fold_owners()
        flats = [flat for bucket in self.buckets for flat in bucket.vectors().values()]
        try:
            flats += self._frozen_vectors()
            sums = [flat.clone() for flat in flats]
            works = [self.exchange.all_reduce(total) for total in sums]
            for work in works:
                work.wait()
        except GroupLost as error:
            raise self.round.with_context(error, "memory was not averaged") from error
        for flat, total in zip(flats, sums, strict=True):
            torch.div(total, self.exchange.size, out=flat)
        self.averaged = True

    def _frozen(self) -> dict[Tensor, dict[str, Any]]:
        """The entries of optimizer.state that wait until their parameters are trained again."""
        state = self.optimizer.state
        return {p: state[p] for p in params_of(self.optimizer)
                if p in state and p not in self.bucket_of}  # fmt: skip

    def _fold_owners(self) -> None:
        """Moves all owner memory to this worker's own memory."""
        for bucket in self.buckets:
            bucket.fold_owner()
        for param, entry in self._frozen().items():
            self.optimizer.state[param] = states.without_owner(entry, self.exchange.size)

    def _frozen_vectors(self) -> list[Tensor]:
        """What each worker has of its own for frozen parameters, in an order that all share.

        Zeros take the place of what another worker has and this one has not.
        """
        own, params = sorted(self.rule.own_state()), params_of(self.optimizer)
        frozen = self._frozen()
        mine = [
            (i, name) for i, p in enumerate(params) for name in own if name in frozen.get(p, ())
        ]
        everyones = self.exchange.gather_objects(mine, device_of(self.optimizer))
        vectors = []
        for i, name in sorted(set(chain.from_iterable(everyones))):
            shard = shard_of(params[i])
            entry = self.optimizer.state[params[i]]
            if name not in entry:
                entry[name] = torch.zeros_like(shard, dtype=torch.float32)
            vectors.append(entry[name])
        return vectors


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters of all groups; none if the constructor has refused its arguments."""
    groups = optimizer.__dict__.get("param_groups", [])
    return [param for group in groups for param in group["params"]]


def device_of(optimizer: torch.optim.Optimizer) -> torch.device:
    """The device of the parameters that are trained."""
    params = params_of(optimizer)
    params = [p for p in params if p.requires_grad] or params
    return shard_of(params[0]).device if params else torch.device("cpu")


def describe(optimizer: torch.optim.Optimizer, rule: Rule, settings: Settings) -> dict[str, Any]:
    """The facts that must be equal on all workers."""
    return comparison.describe(optimizer, rule.compared) | settings.facts() | rule.facts()


def check_group(group: Group, g: int, rule: Rule) -> None:
    where = f"of param group {g}"
    checks.check_group(group, where)
    rule.check(group, where)


def check_params(
    optimizer: torch.optim.Optimizer, rule: Rule, settings: Settings, exchange: Exchange
) -> None:
    """Raises unless the parameters that require a gradient can be trained.

    Sets exchange.shard_group if the parameters are sharded.
    """
    names: dict[Tensor, str] = {}
    for g, group in enumerate(optimizer.param_groups):
        check_group(group, g, rule)
        for i, param in enumerate(group["params"]):
            if param.requires_grad:
                name = f"params: {comparison.parameter_name(group, i)} of group {g}"
                checks.check_param(shard_of(param), name)
                if param in names:
                    raise ValueError(f"{name} appears twice")
                names[param] = name
    devices = {shard_of(p).device for p in names}
    if len(devices) > 1:
        raise ValueError(
            f"params: got devices {', '.join(sorted(map(str, devices)))}, must be one device"
        )
    inside_node = None if exchange.of_parts else exchange.shard_group
    inside = shards.check(list(names), exchange.given, inside_node, settings.overlap)
    if inside is not None:
        exchange.shard_group = inside


def broadcast(exchange: Exchange, groups: list[Group], device: torch.device) -> None:
    """Gives all workers rank 0's parameters, except those of another device or kind."""
    params = [shard_of(p).detach() for group in groups for p in group["params"]]
    params = [p for p in params if p.numel() and p.device == device and checks.is_trainable(p)]
    exchange.broadcast([in_storage_order(p) for p in params])
