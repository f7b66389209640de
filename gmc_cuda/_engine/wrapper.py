"""An optimizer around another one: what LocalUpdates and NodeAverage share.

A dozen methods of torch.optim.Optimizer act on the optimizer's own param_groups, state and hooks.
In a wrapper they would silently act on the wrong ones. So each of them is overridden here or in the
subclasses, or is right as inherited (tests/test_wrappers.py lists those).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NoReturn

import torch

from gmc_cuda._engine.optimizer import CompressedSGD

_HOOKS = (
    "step_pre", "step_post", "state_dict_pre", "state_dict_post",
    "load_state_dict_pre", "load_state_dict_post",
)  # fmt: skip


class Wrapper(torch.optim.Optimizer):
    """The hooks, state_dict, copies and loss scaling of an optimizer around another one.

    A subclass calls :meth:`_make_hooks` instead of torch.optim's constructor, and defines step(),
    _saved(), _load(), _refuse_open_exchange() and the other public methods.
    """

    inner: torch.optim.Optimizer
    _COPIED: ClassVar[tuple[str, ...]] = ()  # the attributes that a copy gets

    def _make_hooks(self) -> None:
        """Makes the wrapper's own hooks, which run around the whole of its step."""
        for name in _HOOKS:
            setattr(self, f"_optimizer_{name}_hooks", OrderedDict())
        self._patch_step_function()

    def _refuse_open_exchange(self, what: str) -> None:
        """Raises RuntimeError if an exchange was begun and not completed."""

    # ------------------------------------------------------------------------------ the step

    _step_supports_amp_scaling = CompressedSGD._step_supports_amp_scaling

    @contextmanager
    def _scaling_ends(self) -> Iterator[None]:
        """Deletes the attributes that a scaler sets, and itself deletes only after success."""
        try:
            yield
        except BaseException:
            for name in ("grad_scale", "found_inf"):
                self.__dict__.pop(name, None)
            raise

    # ------------------------------------------------------------- saving, loading and copying

    def _saved(self) -> dict[str, Any]:
        raise NotImplementedError

    def _load(self, state_dict: dict[str, Any]) -> None:
        raise NotImplementedError

    @torch.no_grad()
    def state_dict(self) -> dict[str, Any]:
        self._refuse_open_exchange("state_dict()")
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = self._saved()
        for hook in self._optimizer_state_dict_post_hooks.values():
            changed = hook(self, state_dict)
            if changed is not None:
                state_dict = changed
        return state_dict

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._refuse_open_exchange("load_state_dict()")
        state_dict = state_dict.copy()
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            if changed is not None:
                state_dict = changed
        self._load(state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_open_exchange("a copy")
        return {name: self.__dict__[name] for name in self._COPIED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_hooks()

    def __copy__(self) -> NoReturn:
        name = type(self).__name__
        raise TypeError(
            f"copy.copy({name}): two of them over the same parameters would each count every "
            "change of these as its own. Copy the model too:\n"
            "    model, optimizer = copy.deepcopy((model, optimizer))"
        )


class Failed:
    """Stands for the params argument of GMC on a worker that has met an error.

    GMC's constructor raises the error when it iterates over them, and reports it to the other
    workers, which would otherwise wait for this one in their constructors.
    """

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __iter__(self) -> Iterator[Any]:
        raise self._error


def raised_by_constructor(error: BaseException) -> bool:
    """Whether GMC's or DGC's constructor raised it, which has reported it to the other workers."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code is CompressedSGD.__init__.__code__:
            return True
        trace = trace.tb_next
    return False
