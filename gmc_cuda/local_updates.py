"""Local-update training (DiLoCo): inner steps by any optimizer, an exchange every H of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gmc_cuda import agreement, ddp
from gmc_cuda.compressed_sgd import CompressedSGD
from gmc_cuda.optim import GMC

_KEY = "local_updates"  # in a state_dict, beside the inner optimizer's keys


class LocalUpdates(torch.optim.Optimizer):
    """Every H steps of an inner optimizer, the workers exchange what they moved.

    Each worker trains alone for H steps, from the common w to its own w_k. The outer optimizer then
    takes w - w_k for a gradient, and the workers go on together from its result. What is not sent
    stays in the outer memory for later rounds, as ever::

        inner = torch.optim.AdamW(model.parameters(), lr=1e-3)
        optimizer = gmc_cuda.LocalUpdates(inner, every=20)
        scheduler = CosineAnnealingLR(optimizer, steps)    # of the inner learning rate

    From outside it is the inner optimizer: ``step()``, ``zero_grad()``, ``param_groups``,
    ``state``. The outer one is ``optimizer.outer``, a :class:`gmc_cuda.GMC` over float32 copies
    of the parameters, whose options may be changed between rounds. All workers make the same number
    of steps. Workers' parameters differ within a round: call :meth:`synchronize` on all of them
    before the model is evaluated or saved at another place than the end of a round.

    Args:
        inner_optimizer: any ``torch.optim.Optimizer``; nothing of it is communicated.
        outer: makes the outer optimizer from a list of parameters, for example
            ``functools.partial(gmc_cuda.GMC, lr=0.7, density=0.02)``. Default: GMC with
            ``DEFAULTS``.
        every: H, inner steps in a round.
        overlap: the exchange goes on during the next round, and its result is applied at the end
            of that, one round late; until then a worker goes on from where it was itself.

    Raises:
        TypeError, ValueError: an argument that cannot be used, or workers that differ (on every
            worker).
    """

    # What waits in memory acts late, like momentum, which therefore added nothing in trials; larger
    # steps and forgetting the oldest did (README, Results).
    DEFAULTS: ClassVar[dict[str, Any]] = {
        "lr": 2.0,
        "momentum": 0.0,
        "density": 0.02,
        "memory_decay": 0.95,
    }

    def __init__(
        self,
        inner_optimizer: torch.optim.Optimizer,
        outer: Callable[[list[Tensor]], CompressedSGD] | None = None,
        every: int = 20,
        *,
        overlap: bool = False,
    ) -> None:
        # Not super().__init__(): param_groups and state are the inner optimizer's.
        if isinstance(outer, torch.optim.Optimizer):
            raise TypeError(
                f"outer: got a {type(outer).__name__}, must be what makes one over other "
                "parameters than the model's: functools.partial(gmc_cuda.GMC, lr=0.7)"
            )
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ValueError(f"every: got {every!r}, must be a number of steps, at least 1")
        self.inner, self.every, self.overlap = inner_optimizer, every, overlap
        self._params = [p for g in inner_optimizer.param_groups for p in g["params"]]
        self._params = [p for p in self._params if p.requires_grad]
        self._start: list[Tensor] = [nn.Parameter(p.detach().float().clone()) for p in self._params]
        self.outer = GMC(self._start, **self.DEFAULTS) if outer is None else outer(self._start)
        if not isinstance(self.outer, CompressedSGD):
            raise TypeError(
                f"outer: it made a {type(self.outer).__name__}, must make a gmc_cuda.GMC or DGC"
            )
        facts = {"every": every, "overlap": overlap, "inner optimizer": type(self.inner).__name__}
        agreement.check(self.outer._exchange, facts, self._start[0].device)
        self._steps = 0
        self._on_the_way: list[Tensor] | None = None  # what this worker sent, with overlap
        self._go_on_from_start()

    # ------------------------------------------------------------- what the inner optimizer has

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.inner.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.inner.defaults

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not there yet
            raise AttributeError(name)
        return getattr(self.inner, name)  # the hooks of step() and the like

    def __repr__(self) -> str:
        return f"LocalUpdates(every={self.every},\ninner={self.inner!r},\nouter={self.outer!r})"

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        raise NotImplementedError(
            "LocalUpdates: parameters cannot be added later; construct the inner optimizer with "
            "all of them"
        )

    # -------------------------------------------------------------------------------- the steps

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One inner step; every H-th time, also the exchange, for which all workers must call it.

        With a GradScaler, a worker whose gradients overflowed leaves its inner step out by itself.
        """
        loss = self._inner_step(closure)
        self._steps += 1
        if self._steps % self.every == 0:
            self._end_round()
        return loss

    def _inner_step(self, closure: Callable[[], Any] | None) -> Any:
        found_inf, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if not isinstance(found_inf, Tensor):
            return self.inner.step(closure)
        if found_inf.item():
            return None
        if scale is not None:
            for param in self._params:
                if param.grad is not None:
                    param.grad.div_(scale)
        return self.inner.step(closure)

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # A scaler must call step() on every worker, or their rounds would end at different times.
        return sys._getframe(1).f_globals.get("__name__") == torch.amp.grad_scaler.__name__

    @torch.no_grad()
    def _end_round(self) -> None:
        if self.outer._steps == 0:
            ddp.refuse_communicating(self._params, self.outer.process_group)
        moved = [self._begun(i).float() - p.float() for i, p in enumerate(self._params)]
        if self._on_the_way is not None:
            self.outer.step()
        for start, difference in zip(self._start, moved, strict=True):
            start.grad = difference
        if self.overlap:
            self.outer._begin()
            self._on_the_way = moved
        else:
            self.outer.step()
        self.outer.zero_grad()
        self._go_on_from_start()

    @torch.no_grad()
    def synchronize(self) -> None:
        """Ends the round now: afterwards all workers have the same parameters. All must call it."""
        if self._steps % self.every != 0:
            self._end_round()
            self._steps = 0
        if self._on_the_way is not None:
            self.outer.step()
            self._on_the_way = None
            self._go_on_from_start()

    def _begun(self, i: int) -> Tensor:
        """Where this worker began the round, rounded as the parameter was."""
        start = self._start[i].detach()
        if self._on_the_way is not None:
            start = start - self._on_the_way[i]
        return start.to(self._params[i].dtype)

    @torch.no_grad()
    def _go_on_from_start(self) -> None:
        for i, param in enumerate(self._params):
            param.copy_(self._begun(i))

    def stats(self) -> dict[str, int]:
        """Figures of the outer optimizer, whose step is a round; see :meth:`gmc_cuda.GMC.stats`."""
        return self.outer.stats()

    # ------------------------------------------------------------------------ saving and loading

    def average_memory_(self) -> None:
        """:meth:`gmc_cuda.GMC.average_memory_` of the outer optimizer. All workers call it."""
        self.outer.average_memory_()

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state_dict, and under "local_updates" everything else.

        Each worker saves its own (or all of rank 0's, after :meth:`synchronize` and
        :meth:`average_memory_`); within a round the model's parameters are each worker's own too.

        Raises:
            RuntimeError: with ``overlap``, while an exchange is on its way.
        """
        if self._on_the_way is not None:
            raise RuntimeError(
                "LocalUpdates: an exchange is on its way; call optimizer.synchronize() on all "
                "workers before saving"
            )
        return self.inner.state_dict() | {
            _KEY: {
                "outer": self.outer.state_dict(),
                "start": [start.detach() for start in self._start],
                "steps": self._steps,
            }
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what :meth:`state_dict` gave. No collective. The model is loaded by itself.

        Raises:
            ValueError: it is not a LocalUpdates' state, or not of this model.
        """
        if _KEY not in state_dict:
            raise ValueError(
                "state_dict: got the state of an inner optimizer alone; load it into that before "
                "you construct LocalUpdates"
            )
        own = state_dict[_KEY]
        shapes = [tuple(start.shape) for start in own["start"]]
        if shapes != [tuple(start.shape) for start in self._start]:
            raise ValueError("state_dict: got parameters of other shapes than this model's")
        self.outer.load_state_dict(own["outer"])
        self.inner.load_state_dict({k: v for k, v in state_dict.items() if k != _KEY})
        for start, saved in zip(self._start, own["start"], strict=True):
            start.copy_(saved)
        self._steps, self._on_the_way = own["steps"], None
