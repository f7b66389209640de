"""Distributed momentum SGD with sparse communication: GMC and DGC."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gmc_cuda._engine import state as states
from gmc_cuda._engine.checks import DENSITY
from gmc_cuda._engine.engine import Settings
from gmc_cuda._engine.optimizer import CompressedSGD
from gmc_cuda._engine.rules import GlobalMomentum, LocalMomentum, Rule


class GMC(CompressedSGD):
    """Momentum SGD with global momentum compression.

    Each worker k adds its gradient and the global momentum to its memory u_k and sends the K
    entries of largest magnitude; the rest stays in memory for later steps:

        v_k = u_k + g_k + weight_decay * w + momentum * a_{t-1}
        c_k = top-K of v_k,    u_k = v_k - c_k
        a_t = (1/p) sum_k c_k,    w = w - lr * a_t

    With density 1 this is dense momentum SGD, equal to ``torch.optim.SGD`` on the averaged
    gradient; with momentum 0 it is plain memory SGD. Parameters stay bit-identical across workers.

    Args:
        params: parameters, named parameters or param groups: float32, bfloat16 or float16, all on
            one device. Parameters that do not require a gradient are left alone.
        lr: learning rate eta, a number or a tensor that holds one.
        momentum: beta, 0 <= beta < 1, a number or a tensor that holds one. The paper uses 0.9; at
            most 0.6 was best in our searches (0.3 to 0.6 on text).
        density: share of the entries that are sent, 0 < density <= 1; K = ceil(density * N) for
            each bucket. A param group with density=1.0 is sent dense.
        bytes_ratio: instead of density: how many times fewer bytes a link carries than with a ring
            all-reduce of a float32 gradient, headers and indices counted, at least 1. Each bucket
            sends the largest K that fits, and density is None. A single worker counts as one of
            two.
        weight_decay: lambda >= 0, added as lambda * w to the gradient.
        memory_decay: d, 0 <= d <= 2: v_k has d * u_k in the place of u_k. With d = 1 what is sent
            adds up to what came in. With less, unsent entries fade out ("Communication Efficient
            LLM Pre-training with SparseLoCo" uses 0.95 with momentum 0). With a little more than 1,
            at most 1 + (1 - momentum) * density, they grow, which makes up for their delay. With
            more, training may diverge, of which the constructor warns.
        maximize: ascend instead of descend.
        nesterov: w = w - lr * ((1 + momentum) * a_t - momentum * a_{t-1}), at density 1 equal to
            ``torch.optim.SGD(nesterov=True)``. A skipped step moves nothing, and what the step
            before it had looked ahead, lr * momentum * a_{t-1}, then stays in the parameters.
        momentum_form: "buffer" adds momentum * a_{t-1} (as torch.optim.SGD does); "iterate" adds
            momentum * (eta_{t-1} / eta_t) * a_{t-1}, which is the paper's w_t - w_{t-1} taken
            literally when the learning rate changes.
        wire_dtype: dtype of the values sent: torch.bfloat16, float16, float32, float8_e4m3fn or
            float4_e2m1fn_x2 (the last two with one scale for each payload). What rounding and
            saturation lose stays in memory.
        exchange: "all_gather" gathers the payloads of all workers, so that a link carries p - 1 of
            them. "reduce_scatter" is two-sided compression, with which a link carries the same
            however many workers there are: each worker owns 1/p of every bucket, and keeps an owner
            memory r for this range. It adds the mean of what the workers send it for the range, and
            momentum * a_{t-1}, to r, and sends the K entries of r of largest magnitude to all. K
            counts in each direction, and memory_decay applies to r as well. With one worker the two
            exchanges are the same.
        process_group: workers to train with, a process group or a 1-D device mesh. Default: all
            workers, or only this one if torch.distributed is not initialised. For parameters that
            are sharded inside a node (FSDP2), a 2-D mesh: across nodes, then inside a node, whose
            workers share only the verdict on non-finite values. Memory then has the shard's shape.
        overlap: compress and send during the backward pass. Gradients are set to None once they
            are sent, so clipping and GradScaler need overlap=False.
        bucket_cap_mb: largest float32 memory of a bucket, in MiB. Default: 256; with overlap a
            quarter of the model if that is less, and at least 1.
        nonfinite: "skip" skips a step on every worker if any of them met a NaN or Inf; "raise"
            raises FloatingPointError on every worker.
        broadcast_parameters: begin with rank 0's parameters on every worker.
        check_replicas_every: compare the bits of all workers' parameters after every so many steps,
            and raise RuntimeError on every worker if they differ; 0: never. Reads the device.

    ``optimizer.state[p]["memory"]`` is u, float32, shaped like p. So is a_{t-1} in
    ``optimizer.state[p]["momentum_buffer"]`` (named "aggregate" with momentum_form="iterate"). With
    two-sided compression ``optimizer.state[p]["owner_memory"]`` is r, which is zero outside this
    worker's range. ``lr``,
    ``momentum``, ``density`` or ``bytes_ratio``, ``weight_decay`` and ``memory_decay`` are read
    from the param group at every step.

    Raises:
        ValueError, TypeError: an argument cannot be used, or the workers differ in their model or
            hyperparameters (on every worker, naming the difference).

    Example::

        optimizer = gmc_cuda.GMC(model.parameters(), lr=0.5, momentum=0.5, density=0.01)
        loss_fn(model(x), y).backward()
        optimizer.step()

    Source: Zhao, Xie, Gao, Li, "Global Momentum Compression for Sparse Communication in
    Distributed SGD".
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        *,
        momentum: float = 0.9,
        density: float = DENSITY,
        bytes_ratio: float | None = None,
        weight_decay: float = 0.0,
        memory_decay: float = 1.0,
        maximize: bool = False,
        nesterov: bool = False,
        momentum_form: str = "buffer",
        wire_dtype: torch.dtype = torch.bfloat16,
        exchange: str = "all_gather",
        process_group: Any = None,
        overlap: bool = False,
        bucket_cap_mb: float | None = None,
        nonfinite: str = "skip",
        broadcast_parameters: bool = True,
        check_replicas_every: int = 0,
    ) -> None:
        super().__init__(
            params,
            _in_group(locals(), GlobalMomentum),
            rule=GlobalMomentum(),
            settings=Settings(
                wire_dtype, overlap, bucket_cap_mb, nonfinite, check_replicas_every, exchange
            ),
            process_group=process_group,
            broadcast_parameters=broadcast_parameters,
        )

    @torch.no_grad()
    def sgd_state_dict(self) -> dict[str, Any]:
        """The state for ``torch.optim.SGD.load_state_dict``, to continue without compression.

        Raises:
            ValueError: memory holds gradients that were not sent yet (the message says how to send
                them), or momentum_form is "iterate".
        """
        return states.for_sgd(self.state_dict())


class DGC(CompressedSGD):
    """Deep gradient compression: momentum SGD with momentum kept by each worker.

        m_k = momentum * m_k + g_k + weight_decay * w
        v_k = u_k + m_k,    c_k = top-K of v_k,    u_k = v_k - c_k
        w = w - lr * (1/p) sum_k c_k

    Without ``momentum_masking`` this is memory SGD with local momentum; with momentum 0 it is
    plain memory SGD. Density warm-up is :class:`gmc_cuda.DensityWarmup`.

    Args:
        nesterov: v_k = u_k + g_k + momentum * m_k.
        momentum_masking: m_k = 0 wherever c_k is not 0, so that old momentum does not carry on in a
            direction that was just sent (paper, section 3.3). Dense buckets are not masked.
        clip_norm: scale a worker's gradient to the norm clip_norm / sqrt(p) if its norm is larger
            (paper, section 3.2). Needs overlap=False. Default: None, no clipping.

    All other arguments are those of :class:`GMC`. ``optimizer.state[p]`` holds "memory" and
    "momentum_buffer", both float32 and shaped like p.

    Source: Lin, Han, Mao, Wang, Dally, "Deep Gradient Compression: Reducing the Communication
    Bandwidth for Distributed Training", ICLR 2018.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor,
        *,
        momentum: float = 0.9,
        density: float = DENSITY,
        bytes_ratio: float | None = None,
        weight_decay: float = 0.0,
        memory_decay: float = 1.0,
        maximize: bool = False,
        nesterov: bool = False,
        momentum_masking: bool = True,
        clip_norm: float | None = None,
        wire_dtype: torch.dtype = torch.bfloat16,
        exchange: str = "all_gather",
        process_group: Any = None,
        overlap: bool = False,
        bucket_cap_mb: float | None = None,
        nonfinite: str = "skip",
        broadcast_parameters: bool = True,
        check_replicas_every: int = 0,
    ) -> None:
        super().__init__(
            params,
            _in_group(locals(), LocalMomentum),
            rule=LocalMomentum(clip_norm),
            settings=Settings(
                wire_dtype, overlap, bucket_cap_mb, nonfinite, check_replicas_every, exchange
            ),
            process_group=process_group,
            broadcast_parameters=broadcast_parameters,
        )


def _in_group(arguments: dict[str, Any], rule: type[Rule]) -> dict[str, Any]:
    """The constructor's arguments that become options of the param groups."""
    return {name: arguments[name] for name in rule.compared}
