"""Several workers in each node, each with the whole model: dense inside, GMC across nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gmc_cuda import ddp, hyperparameters
from gmc_cuda.compressed_sgd import CompressedSGD

_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class NodeAverage(torch.optim.Optimizer):
    """Averages gradients inside a node, and trains a share of the parameters on each worker.

    Each worker of a node owns an equal share of all parameters. A step averages the gradients
    inside the node, where the network is fast, so that each worker has its share's; a GMC over the
    share, with the workers that own the same share in other nodes, sends across; and the node
    gathers the shares' new values. Every worker's parameters are then the same bits. Across nodes
    go 1/n of a flat GMC's bytes from each of a node's n workers, and memory has 1/n of its size::

        mesh = init_device_mesh("cuda", (nodes, workers_in_a_node))
        optimizer = gmc_cuda.NodeAverage(
            model.parameters(), functools.partial(gmc_cuda.GMC, lr=0.1, density=0.01), mesh
        )

    For FSDP2 it is not needed: it does the same by itself, see ``process_group`` of GMC.

    Args:
        params: parameters of one dtype, on one device. All have the same options, which are the
            inner optimizer's: ``param_groups`` and ``state`` are.
        make: makes the GMC or DGC over the share, from a list of one parameter and
            ``process_group``.
        mesh: 2-D: across nodes, then inside a node.

    Raises:
        ValueError, TypeError: an argument that cannot be used.
    """

    def __init__(self, params: Any, make: Callable[..., CompressedSGD], mesh: Any) -> None:
        # Not super().__init__(): param_groups and state are the inner optimizer's.
        self._params = [p for p in params if p.requires_grad]
        if getattr(mesh, "ndim", 0) != 2:
            raise ValueError(f"mesh: got {mesh!r}, must be a 2-D device mesh: across, inside")
        kinds = {(p.dtype, p.device) for p in self._params}
        if len(kinds) != 1:
            raise ValueError(
                f"params: got {len(kinds)} kinds of dtype and device, must be one: use a "
                "NodeAverage for each"
            )
        for i, param in enumerate(self._params):
            hyperparameters.check_param(param, f"params: parameter {i}")
        self._inside, self._workers = mesh.get_group(1), mesh.size(1)
        numel = sum(p.numel() for p in self._params)
        self._share = -(-numel // self._workers)
        first = self._share * mesh.get_local_rank(1)
        self._own = nn.Parameter(self._flat(self._params)[first : first + self._share].clone())
        self.inner = make([self._own], process_group=mesh)
        self._gather()  # the inner optimizer may have broadcast another node's values

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
        return getattr(self.inner, name)

    def __repr__(self) -> str:
        return f"NodeAverage(workers={self._workers}, inner={self.inner!r})"

    def zero_grad(self, set_to_none: bool = True) -> None:
        for param in self._params:
            if set_to_none:
                param.grad = None
            elif param.grad is not None:
                param.grad.zero_()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Averages inside, exchanges across, gathers inside. All workers must call it.

        A parameter without a gradient on this worker counts as zero.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.inner._steps == 0:
            ddp.refuse_communicating(self._params, self.inner.process_group)
            ddp.refuse_communicating(self._params, self._inside)
        grads = self._flat(
            [torch.zeros_like(p) if p.grad is None else p.grad for p in self._params]
        )
        own = torch.empty_like(grads[: self._share])
        _reduce_scatter(own, grads.div_(self._workers), group=self._inside)
        self._own.grad = own
        self.inner.step()
        self._own.grad = None
        self._gather()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """This worker's state, of its share. Each worker saves its own."""
        return self.inner.state_dict()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads this worker's state, and takes its share of the parameters from the model.

        Load the model first.
        """
        self.inner.load_state_dict(state_dict)
        first = self._share * dist.get_rank(self._inside)
        self._own.copy_(self._flat(self._params)[first : first + self._share])

    def _flat(self, tensors: list[Tensor]) -> Tensor:
        """One after the other, padded with zeros to equal shares."""
        flat = torch.cat([t.detach().reshape(-1) for t in tensors])
        return nn.functional.pad(flat, (0, self._workers * self._share - flat.numel()))

    @torch.no_grad()
    def _gather(self) -> None:
        flat = self._own.new_empty(self._workers * self._share)
        _all_gather(flat, self._own.detach(), group=self._inside)
        start = 0
        for param in self._params:
            param.copy_(flat[start : start + param.numel()].view(param.shape))
            start += param.numel()
