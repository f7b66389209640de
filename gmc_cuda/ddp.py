"""GMC beside DistributedDataParallel: with DDP silenced, or as DDP's communication hook.

Either the optimizer communicates and DDP does not (``local_gradients``), or DDP does, through
``gmc_hook``, and the optimizer is an ordinary one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.futures import Future

from gmc_cuda._engine import checks, comparison, steps
from gmc_cuda._engine import state as states
from gmc_cuda._engine.bucket import Bucket, figures
from gmc_cuda._engine.ddp_buckets import DDPBuckets
from gmc_cuda._engine.ddp_guard import is_silenced, silence
from gmc_cuda._engine.exchange import Exchange
from gmc_cuda._engine.names import plain_names
from gmc_cuda._engine.owner import owner_of
from gmc_cuda._engine.round import Round, numbers
from gmc_cuda._engine.rules import GlobalMomentum, Plan
from gmc_cuda._engine.scaling import only_grad_scaler, scale_of
from gmc_cuda._engine.watch import DamageWatch

if TYPE_CHECKING:
    import torch.distributed as dist
    from torch._C._distributed_c10d import GradBucket


def local_gradients(ddp_model: torch.nn.Module) -> torch.nn.Module:
    """Makes a DistributedDataParallel stop communicating, so that a GMC or DGC can do it alone.

    It is for frameworks that wrap the model in DDP; your own training loop needs no DDP. Call it
    once on every worker, right after the model is wrapped; a second call does nothing. It works
    with all options of DDP, and makes ``no_sync()`` unnecessary. ``join()`` then raises an error,
    because the optimizer's steps need all workers, and DDP no longer broadcasts buffers: call
    :func:`gmc_cuda.broadcast_buffers` before you evaluate or save.

    Args:
        ddp_model: a DistributedDataParallel, or a module that contains one or more (as those of
            torch.compile and Lightning Fabric do).

    Returns:
        ``ddp_model``.

    Raises:
        TypeError: ddp_model contains no DistributedDataParallel.
        RuntimeError: a DistributedDataParallel has a communication hook already.
    """
    from torch.nn.parallel import DistributedDataParallel

    modules = ddp_model.modules() if isinstance(ddp_model, torch.nn.Module) else ()
    found = [module for module in modules if isinstance(module, DistributedDataParallel)]
    if not found:
        raise TypeError(
            f"ddp_model: got {type(ddp_model).__name__}, must be a DistributedDataParallel, or "
            "have one in it (without one gradients are local already)"
        )
    from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook

    for ddp in found:
        if is_silenced(ddp):
            continue
        ddp.register_comm_hook(None, noop_hook)
        silence(ddp)
        # This is no_sync() for ever: DDP neither averages gradients nor copies them into its
        # buckets. The hook above keeps it silent where a framework sets the flag to True again.
        ddp.require_backward_grad_sync = False
        ddp.static_graph = False  # because its first backward pass ignores the flag
    return ddp_model


class GMCHookState:
    """The state of :func:`gmc_hook` between steps: each parameter's memory and a_{t-1}.

    ::

        state = gmc_cuda.GMCHookState(named_parameters=model.named_parameters())
        ddp_model.register_comm_hook(state, gmc_cuda.gmc_hook)
        optimizer = torch.optim.SGD(ddp_model.parameters(), lr=0.1)  # momentum=0

    Args:
        process_group: the process_group argument of the DistributedDataParallel.
        momentum, density, bytes_ratio, wire_dtype, exchange: as in :class:`gmc_cuda.GMC`, with K
            for each of DDP's buckets. Momentum, density and bytes_ratio may be changed between
            steps.
        nonfinite: "skip" makes the gradient zero on every worker if any of them met a NaN or Inf;
            the finite values come with the next step. "raise" raises FloatingPointError out of
            ``backward()`` on every worker, after which DDP cannot continue.
        named_parameters: ``model.named_parameters()``, which only state_dict() needs.
        grad_scaler: the ``torch.amp.GradScaler`` of the loss, if there is one. Default: the one
            that exists when the first gradients arrive. Memory never holds scaled values, and the
            scaler sees a skipped step as an overflow.

    Raises:
        ValueError, TypeError: an argument cannot be used.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        *,
        momentum: float = 0.9,
        density: float = checks.DENSITY,
        bytes_ratio: float | None = None,
        wire_dtype: torch.dtype = torch.bfloat16,
        exchange: str = "all_gather",
        nonfinite: str = "skip",
        named_parameters: Iterable[tuple[str, Tensor]] | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.momentum = momentum
        budget = checks.one_budget({"density": density, "bytes_ratio": bytes_ratio})
        self.density, self.bytes_ratio = budget["density"], budget["bytes_ratio"]
        self.wire_dtype, self.exchange, self.nonfinite = wire_dtype, exchange, nonfinite
        checks.check_options(wire_dtype, False, 1.0, nonfinite, 0, exchange)
        self._options()
        named = dict(named_parameters or ())
        plain = plain_names(named)
        self._names = {plain[name]: param for name, param in named.items()}
        self._group, self._rule = process_group, GlobalMomentum()
        self._known_round: Round | None = None
        self._buckets = DDPBuckets(self._rule)
        self._scaler = grad_scaler
        self._scale: Tensor | None = None  # of the loss of this backward pass
        self._plans: list[Plan] = []  # of this backward pass
        self._plans_before: list[Plan] = []  # of the last complete backward pass
        self._waiting: list[tuple[Future[Tensor], Tensor]] = []
        self._buffers: dict[Bucket, Tensor] = {}
        self._grads: dict[Tensor, Tensor] = {}

    @property
    def _round(self) -> Round:
        # It is made late, because a state may be constructed before the default process group.
        if self._known_round is None:
            exchange = Exchange(self._group)
            self._known_round = Round(
                exchange, self.wire_dtype, self.nonfinite, 0, self._facts, self.exchange
            )
        return self._known_round

    def _options(self) -> dict[str, Any]:
        """The options as a param group."""
        group = {
            **{name: option.neutral for name, option in checks.OPTIONS.items()},
            "maximize": False,
            **GlobalMomentum.options,
            "momentum": self.momentum,
            "density": self.density,
            "bytes_ratio": self.bytes_ratio,
        }
        checks.check_group(group, "of GMCHookState")
        return group

    def _owner(self) -> tuple[int, int] | None:
        return owner_of(self.exchange, self._round.exchange)

    def _facts(self) -> dict[str, Any]:
        return self._options() | {
            "optimizer": type(self).__name__,
            "wire_dtype": str(self.wire_dtype),
            "nonfinite": self.nonfinite,
            "exchange": self.exchange,
        }

    # ------------------------------------------------------------------------------ one backward

    def _on_bucket(self, ddp_bucket: GradBucket) -> Future[Tensor]:
        buffer = ddp_bucket.buffer()
        future: Future[Tensor] = Future(devices=[buffer.device] if buffer.is_cuda else None)
        try:
            if ddp_bucket.index() == 0:
                self._begin(buffer)
            self._send(ddp_bucket)
            self._waiting.append((future, buffer))
            if ddp_bucket.is_last():
                self._finish()
        except BaseException:
            self._cancel()
            raise
        return future

    def _begin(self, buffer: Tensor) -> None:
        if self._round.is_open:  # the backward pass before broke off
            self._cancel()
        round = self._round
        round.exchange.check()
        round.damage.check(round.exchange.rank)
        round.device = buffer.device
        if round.steps == 0:
            facts = self._facts() | {"elements of the first bucket": buffer.numel()}
            round.number = comparison.require_equal(
                round.exchange, facts, buffer.device, next(numbers), "backward() with gmc_hook"
            )
            self._scaler = self._scaler or only_grad_scaler()
        self._scale = scale_of(self._scaler, buffer.device)
        self._plans = []

    def _send(self, ddp_bucket: GradBucket) -> None:
        params, buffer = ddp_bucket.parameters(), ddp_bucket.buffer()
        grads = dict(zip(params, ddp_bucket.gradients(), strict=True))
        index, options = len(self._plans), self._options()
        bucket = self._buckets.find(params, buffer, options, self._owner())
        if bucket is None:
            return
        plan = self._round.plan(self._rule, bucket, index, options, {"grad_scale": self._scale})
        if index == 0:
            self._round.open([], known=False)
            self._compare_options(bucket, options, plan)
        self._plans.append(plan)
        self._round.add(bucket, plan)
        self._round.send(list(bucket.flat_values(grads)))
        self._buffers[bucket] = buffer
        self._grads |= grads

    def _compare_options(self, bucket: Bucket, options: dict[str, Any], plan: Plan) -> None:
        """Makes the workers compare options that change the size of what is sent.

        DDP may also change its buckets between steps, but it does so on all workers alike.
        """
        before, bucket.group = bucket.group, options
        expected = self._round.plan(self._rule, bucket, 0, before, {})
        if expected.size() != plan.size():
            rest = self._plans_before[1:] if self._plans_before else []
            self._round.compare([expected, *rest], plan.size())

    def _finish(self) -> None:
        """Applies all buckets at once, because the verdict needs all of them."""
        late: list[BaseException] = []
        if self._plans:
            late = self._round.finish(self._target)
            if self._scale is not None and self._round.verdict is not None:
                # The scaler must see a skipped step as an overflow.
                for buffer in self._buffers.values():
                    buffer.masked_fill_(self._round.verdict != 0, float("inf"))
            self._write_grads()
        waiting, self._plans_before = self._waiting, self._plans
        self._waiting, self._buffers, self._grads = [], {}, {}
        for future, buffer in waiting:
            future.set_result(buffer)
        steps.raise_first(late)

    def _target(self, bucket: Bucket) -> tuple[list[Tensor], float | Tensor]:
        self._buffers[bucket].zero_()
        # With lr = -1 the zeroed buffer becomes 0 + a_t, bit for bit; a scaler then divides it by
        # its scale.
        return bucket.flat_values(self._grads), -1.0 if self._scale is None else -self._scale

    def _write_grads(self) -> None:
        """Writes the gradients as DDP would, but also of parameters that no worker used.

        DDP leaves those out, and what was sent of their memory would be lost.
        """
        views = any(_aliases(param.grad, grad) for param, grad in self._grads.items())
        for param, grad in self._grads.items():
            if param.grad is None:  # DDP checks that it is, or is not, a view of the bucket
                param.grad = grad if views else grad.clone()
            elif not views:
                param.grad.copy_(grad)

    def _cancel(self) -> None:
        """Ends an incomplete backward pass, and tells the workers that wait for its rest."""
        for bucket in self._buckets.all()[:1]:
            for plan in self._plans_before[len(self._plans) :]:
                self._round.add(bucket, plan)
        self._waiting, self._buffers, self._grads, self._plans = [], {}, {}, []
        self._round.cancel()

    # ------------------------------------------------------------------------- saving and figures

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        """This worker's state by parameter name. Each worker must save its own.

        Raises:
            ValueError: this state was constructed without named_parameters.
        """
        self._check_names()
        held = self._buckets.held()
        exchange = self._round.exchange
        stamp = states.Stamp(type(self).__name__, exchange.rank, exchange.size, False)
        return {
            "parameters": {name: held[p] for name, p in self._names.items() if p in held},
            "saved_by": stamp.entry(),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned, between two steps. No collective.

        Raises:
            ValueError: it does not fit the model, or this state was constructed without
                named_parameters.

        Warns:
            UserWarning: another worker saved it.
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
        exchange = self._round.exchange
        states.warn_of_another_ranks(held, stamp, exchange.rank, exchange.size)
        self._buckets.load(states.for_owner(held, stamp.world_size, self._owner()))
        self._round.damage = DamageWatch()

    def stats(self) -> dict[str, Any]:
        """Statistics so far, as from :meth:`gmc_cuda.GMC.stats`."""
        round = self._round
        return figures(self._buckets.all(), round.steps, round.skipped, round.exchange.size)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "a GMCHookState cannot be copied or pickled: its memory belongs to the parameters of "
            "this process. Save state.state_dict() on each worker (construct it with "
            "named_parameters=model.named_parameters()), and load it into a new GMCHookState"
        )

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
    """A communication hook for DistributedDataParallel that makes the gradient GMC's a_t.

    ``ddp_model.register_comm_hook(GMCHookState(...), gmc_hook)``. The outer optimizer must have no
    momentum of its own: with ``torch.optim.SGD(momentum=0)`` the step is that of
    :class:`gmc_cuda.GMC` with DDP's buckets, except that gradients in bfloat16 or float16 round
    a_t. Memory, exchange and the skipping of non-finite steps are as in the optimizer.
    """
    return state._on_bucket(bucket)


# DDP compares a hook's annotations with classes that exist only where torch.distributed does.
gmc_hook.__annotations__.clear()
getattr(gmc_hook, "__wrapped__", gmc_hook).__annotations__.clear()
