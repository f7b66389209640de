"""Beside DistributedDataParallel: gradients left local, or compression as DDP's communication hook.

Either the optimizer communicates and DDP does not (``local_gradients``), or DDP does, through
``gmc_hook``, and the optimizer is an ordinary one.
"""

# DDP compares a hook's annotations as objects, so they must not become strings here.
import gc
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from gmc_cuda import agreement, hyperparameters, transfers, wire
from gmc_cuda import state_dict as states
from gmc_cuda.buckets import MAX_NUMEL, Bucket, figures, make_buckets
from gmc_cuda.exchange import FlatGroup
from gmc_cuda.integrity import DamageWatch
from gmc_cuda.rules import GlobalMomentum

_LOCAL = "_gmc_cuda_local"  # set on a DDP whose gradients stay local


def local_gradients(ddp_model: torch.nn.Module) -> torch.nn.Module:
    """Makes a DistributedDataParallel stop communicating, so that a GMC or DGC can do it alone.

    For frameworks that wrap the model anyway; a training loop of one's own needs no DDP. Call it
    once on every worker, right after the model is wrapped; calling it again does nothing. It holds
    for all options of DDP and inside ``no_sync()``, whose use it makes unnecessary. Buffers are not
    broadcast any more either: average BatchNorm's before you evaluate.

    Args:
        ddp_model: a DistributedDataParallel, also inside torch.compile.

    Returns:
        ``ddp_model``.

    Raises:
        TypeError: it is no DistributedDataParallel.
        RuntimeError: it has a communication hook already.
    """
    ddp = getattr(ddp_model, "_orig_mod", ddp_model)
    if not isinstance(ddp, DistributedDataParallel):
        raise TypeError(
            f"ddp_model: got {type(ddp).__name__}, must be a DistributedDataParallel (without one "
            "gradients are local already)"
        )
    if is_local(ddp):
        return ddp_model
    ddp.register_comm_hook(None, noop_hook)
    setattr(ddp, _LOCAL, True)
    # As inside no_sync() for ever: DDP leaves gradients alone, which it would also copy into its
    # buckets and back. The hook is for who switches this on again, as Lightning does.
    ddp.require_backward_grad_sync = False
    ddp.static_graph = False  # whose first backward reduces all the same
    return ddp_model


def is_local(ddp: DistributedDataParallel) -> bool:
    """Whether :func:`local_gradients` was called on it."""
    return getattr(ddp, _LOCAL, False)


def refuse_communicating(params: Iterable[Tensor], group: Any) -> None:
    """Raises if a DistributedDataParallel averages these parameters' gradients over this group.

    One that averages over other workers is right: that is dense inside a node, sparse across.

    Args:
        group: the process group that the caller trains with; None for a single worker.
    """
    if group is None or dist.get_world_size(group) == 1:
        return
    own = {id(p) for p in params}
    ranks = set(dist.get_process_group_ranks(group))
    for ddp in gc.get_objects():  # nothing leads from a parameter to the DDP around it
        if not issubclass(type(ddp), DistributedDataParallel):
            continue
        shared = ranks & set(dist.get_process_group_ranks(ddp.process_group))
        if len(shared) < 2 or is_local(ddp) or not ddp.require_backward_grad_sync:
            continue
        if any(id(p) in own for p in ddp.parameters()):
            raise RuntimeError(
                "the model is inside DistributedDataParallel, which averages the gradients before "
                "this optimizer sees them: everything would be sent twice, and compressed after "
                "the averaging. Leave DDP out, or write, once, right after the model is wrapped:\n"
                "    gmc_cuda.local_gradients(ddp_model)\n"
                "In Trainer, Accelerate and Lightning gmc_cuda.integrations does it."
            )


class GMCHookState:
    """What :func:`gmc_hook` keeps from step to step: every parameter's memory and a_{t-1}.

    ::

        state = gmc_cuda.GMCHookState(named_parameters=model.named_parameters())
        ddp_model.register_comm_hook(state, gmc_cuda.gmc_hook)
        optimizer = torch.optim.SGD(ddp_model.parameters(), lr=0.1)  # momentum=0

    Args:
        process_group: the one that the DistributedDataParallel was given.
        momentum, density, bytes_ratio, wire_dtype: as in :class:`gmc_cuda.GMC`, with K for each of
            DDP's buckets. All but ``wire_dtype`` may be changed between steps.
        nonfinite: "skip" makes the gradient zero on every worker when any of them met a NaN or
            Inf; what is finite comes with the next step. "raise" raises FloatingPointError out of
            ``backward()`` on every worker, after which DDP cannot go on.
        named_parameters: ``model.named_parameters()``, for state_dict() alone.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        *,
        momentum: float = 0.9,
        density: float = hyperparameters.DENSITY,
        bytes_ratio: float | None = None,
        wire_dtype: torch.dtype = torch.bfloat16,
        nonfinite: str = "skip",
        named_parameters: Iterable[tuple[str, Tensor]] | None = None,
    ) -> None:
        self.momentum = momentum
        budget = hyperparameters.one_budget({"density": density, "bytes_ratio": bytes_ratio})
        self.density, self.bytes_ratio = budget["density"], budget["bytes_ratio"]
        self.wire_dtype, self.nonfinite = wire_dtype, nonfinite
        hyperparameters.check_options(wire_dtype, 1.0, nonfinite, 0)
        self._options()
        self._names = {
            name.removeprefix("module."): param for name, param in named_parameters or ()
        }
        self._exchange = FlatGroup(process_group)
        self._rule = GlobalMomentum()
        self._bucket_of: dict[Tensor, Bucket] = {}
        self._held: states.Held = {}  # of parameters that are in no bucket now
        self._started: list[transfers.Transfer] = []
        self._waiting: list[tuple[Future[Tensor], Tensor]] = []
        self._grads: dict[Tensor, Tensor] = {}
        self._steps = 0
        self._skipped: Tensor | None = None
        self._damage = DamageWatch()

    def _options(self) -> dict[str, Any]:
        """The options as a param group."""
        group = {
            "lr": 1.0,
            "momentum": self.momentum,
            "density": self.density,
            "bytes_ratio": self.bytes_ratio,
            "weight_decay": 0.0,
            "memory_decay": 1.0,
            "maximize": False,
            **GlobalMomentum.options,
        }
        hyperparameters.check_group(group, "of GMCHookState")
        return group

    # ------------------------------------------------------------------------------ one backward

    def _on_bucket(self, ddp_bucket: GradBucket) -> Future[Tensor]:
        if ddp_bucket.index() == 0:
            self._begin(ddp_bucket)
        buffer = ddp_bucket.buffer()
        future: Future[Tensor] = Future(devices=[buffer.device] if buffer.is_cuda else None)
        try:
            self._send(ddp_bucket)
            self._waiting.append((future, buffer))
            if ddp_bucket.is_last():
                self._finish()
        except Exception:
            self._abandon()
            raise
        return future

    def _begin(self, ddp_bucket: GradBucket) -> None:
        self._abandon()  # of a backward pass that ended half-way
        self._exchange.check()
        self._damage.check(self._exchange.rank)
        if self._steps == 0:
            facts = self._options() | {
                "optimizer": type(self).__name__,
                "wire_dtype": str(self.wire_dtype),
                "nonfinite": self.nonfinite,
                "elements of the first bucket": ddp_bucket.buffer().numel(),
            }
            agreement.check(self._exchange, facts, ddp_bucket.buffer().device)

    def _send(self, ddp_bucket: GradBucket) -> None:
        params = ddp_bucket.parameters()
        grads = dict(zip(params, ddp_bucket.gradients(), strict=True))
        bucket = self._bucket(params)
        if bucket is None:
            return
        group = self._options()
        transfer = transfers.start(
            bucket,
            self._exchange,
            wire.entries(group, bucket.numel, self.wire_dtype),
            list(bucket.flat_values(grads)),
            self._rule.arguments(group),
            self.wire_dtype,
            masking=False,
        )
        self._started.append(transfer)
        self._grads |= grads

    def _finish(self) -> None:
        """The verdict needs all buckets, so every bucket's gradient is ready with the last one."""
        if self._started:
            for transfer in self._started:
                transfer.wait()
            skip = transfers.agree(self._started)
            transfers.raise_on(self._started, skip, self._exchange.rank, self.nonfinite)
            for transfer in self._started:
                transfer.merge(skip)
            for _, buffer in self._waiting:
                buffer.zero_()
            if self._skipped is None:
                self._skipped = torch.zeros(1, dtype=torch.int64, device=skip.device)
            count: Tensor | None = self._skipped
            flags = self._damage.flags(skip, self._exchange.size)
            for transfer in self._started:  # 0 - (-1) a_t is a_t, bit for bit
                transfer.finish(transfer.bucket.flat_values(self._grads), -1.0, skip, count, flags)
                count = None  # once for all buckets
            self._damage.report()
            self._write_grads()
        waiting = self._waiting
        self._started, self._waiting, self._grads = [], [], {}
        self._steps += 1
        for future, buffer in waiting:
            future.set_result(buffer)

    def _write_grads(self) -> None:
        """What DDP does next, but also where no worker used a parameter, which DDP leaves out.

        Such a parameter's memory is sent nevertheless, and must not be lost.
        """
        views = any(_aliases(param.grad, grad) for param, grad in self._grads.items())
        for param, grad in self._grads.items():
            if param.grad is None:  # DDP checks that it is, or is not, a view of the bucket
                param.grad = grad if views else grad.clone()
            elif not views:
                param.grad.copy_(grad)

    def _abandon(self) -> None:
        transfers.cancel(self._started)
        self._started, self._waiting, self._grads = [], [], {}

    def _bucket(self, params: list[Tensor]) -> Bucket | None:
        """The bucket of these parameters, which DDP may group in another way from step to step."""
        found = self._bucket_of.get(next((p for p in params if p.numel()), params[0]))
        if found is not None and set(found.params) == {p for p in params if p.numel()}:
            return found
        for old in {self._bucket_of[p] for p in params if p in self._bucket_of}:
            held = states.export([old], [self._options()], self._rule)
            self._held |= {p: {k: v.clone() for k, v in s.items()} for p, s in held.items()}
            for param in old.params:
                del self._bucket_of[param]
        for i, param in enumerate(params):
            hyperparameters.check_param(param, f"parameter {i} of a bucket")
        for bucket in make_buckets(params, 0, MAX_NUMEL, self._rule.local_momentum):  # one or none
            states.install([bucket], [self._options()], self._rule, self._held)
            for param in bucket.params:
                self._bucket_of[param] = bucket
                self._held.pop(param, None)
            return bucket
        return None

    # ------------------------------------------------------------------------- saving and figures

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """This worker's state by parameter name. Each worker must save its own.

        Raises:
            ValueError: constructed without named_parameters.
        """
        self._check_names()
        held = self._held | states.export(self._buckets(), [self._options()], self._rule)
        stamp = states.Stamp(type(self).__name__, self._exchange.rank, self._exchange.size, False)
        return {
            "parameters": {name: held[p] for name, p in self._names.items() if p in held},
            "saved_by": asdict(stamp),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` gave, between two steps. No collective.

        Raises:
            ValueError: it does not fit the model, or constructed without named_parameters.

        Warns:
            UserWarning: it is another worker's.
        """
        self._check_names()
        stamp = states.Stamp(**state_dict["saved_by"])
        held: states.Held = {}
        for name, tensors in state_dict["parameters"].items():
            if name not in self._names:
                raise ValueError(f"state_dict: the model has no parameter '{name}'")
            held[self._names[name]] = tensors
            for key, value in tensors.items():
                if value.shape != self._names[name].shape:
                    raise ValueError(
                        f"state_dict: {key} of '{name}' has shape {tuple(value.shape)}, must be "
                        f"{tuple(self._names[name].shape)}"
                    )
        loaded = states.Loaded([], held, stamp)
        states.warn_of_another_ranks(loaded, self._exchange.rank, self._exchange.size)
        states.install(self._buckets(), [self._options()], self._rule, held)
        self._damage = DamageWatch()
        self._held = {
            p: {k: v.to(p.device, copy=True) for k, v in tensors.items()}
            for p, tensors in held.items()
            if p not in self._bucket_of
        }

    def stats(self) -> dict[str, Any]:
        """As :meth:`gmc_cuda.GMC.stats`."""
        return figures(self._buckets(), self._steps, self._skipped)

    def _buckets(self) -> list[Bucket]:
        return list(dict.fromkeys(self._bucket_of.values()))

    def _check_names(self) -> None:
        if not self._names:
            raise ValueError(
                "this GMCHookState knows no names of parameters to save its state under: construct "
                "it with named_parameters=model.named_parameters()"
            )


def _aliases(grad: Tensor | None, view: Tensor) -> bool:
    return grad is not None and grad.numel() > 0 and grad.data_ptr() == view.data_ptr()


@torch.no_grad()
def gmc_hook(state: GMCHookState, bucket: GradBucket) -> Future[Tensor]:
    """Communication hook for DistributedDataParallel: the gradient becomes GMC's a_t.

    ``ddp_model.register_comm_hook(GMCHookState(...), gmc_hook)``. The outer optimizer must have no
    momentum of its own: with ``torch.optim.SGD(momentum=0)`` the step is :class:`gmc_cuda.GMC`'s,
    with DDP's buckets. A bfloat16 or float16 gradient rounds a_t, which the optimizer does not.
    Memory, exchange and the skipping of non-finite steps are the optimizer's.
    """
    return state._on_bucket(bucket)
