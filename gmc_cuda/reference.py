"""The operators of :mod:`gmc_cuda.ops` in plain PyTorch, written to be read beside the papers.

Payload and memory come out byte for byte as from the kernels, on any device; speed is no aim.
An aggregate is opaque in both layers and each layer reads its own: here it is the dense float32
tensor a_t, seen as bytes.

Sources: Zhao, Xie, Gao, Li, "Global Momentum Compression for Sparse Communication in Distributed
SGD" (GMC, the transformation equation); Lin et al., "Deep Gradient Compression" (local momentum,
momentum factor masking).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

TILE = 65536
PAYLOAD_MAGIC = 0x10434D47
MAX_NUMEL = 2**31 - 1
LARGEST_COUNT = 2**24  # a float32 sum counts on exactly up to here
NONFINITE, DAMAGED = 1, 2
WIRE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # their position is their code


def accumulate(
    memory: Tensor,
    grads: Sequence[Tensor | None],
    *,
    momentum: float | Tensor = 0.0,
    aggregate: Tensor | None = None,
    momentum_buffer: Tensor | None = None,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    params: Sequence[Tensor] | None = None,
    maximize: bool = False,
    grad_scale: float | Tensor | None = None,
    found_inf: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The vector to compress: v = u + g + beta * a for GMC, v = u + m for DGC.

    Every operation is rounded to float32 in the order written here. ``aggregate`` is the dense
    a_{t-1}, float32 [numel]. Returns v (float32 [numel]), the new momentum buffer (or None) and
    the number of non-finite values met (int64 scalar tensor).
    """
    beta = torch.as_tensor(momentum, dtype=torch.float32)
    # Without params no gradient is None: nothing would say how large it is.
    sizes = [0] * len(grads) if params is None else [p.numel() for p in params]
    grad = torch.cat(
        [
            torch.zeros(n, device=memory.device) if g is None else g.reshape(-1).float()
            for g, n in zip(grads, sizes, strict=True)
        ]
    )
    nonfinite = torch.zeros((), dtype=torch.int64, device=memory.device)
    if grad_scale is not None:
        grad = grad * torch.as_tensor(grad_scale).float().reciprocal()
    if maximize:
        grad = -grad
    if found_inf is not None:
        overflowed = found_inf.reshape(()) != 0
        grad = torch.where(overflowed, 0.0, grad)
        nonfinite += overflowed
    if not _all_finite(grad):
        nonfinite += (~grad.isfinite()).sum()
        grad = torch.where(grad.isfinite(), grad, 0.0)
    decay = None
    if weight_decay != 0:
        flat = torch.cat([p.detach().reshape(-1).float() for p in params or ()])
        decay = torch.tensor(weight_decay, dtype=torch.float32) * flat

    if momentum_buffer is None:
        value = memory + grad
        if decay is not None:
            value = value + decay
        if aggregate is not None:
            value = value + beta * aggregate
        new_buffer = None
    else:
        if decay is not None:
            grad = grad + decay
        new_buffer = beta * momentum_buffer + grad
        value = (memory + grad) + beta * new_buffer if nesterov else memory + new_buffer
    value = value + 0.0  # -0 becomes +0

    # An overflow of float32 leaves the element as it was.
    if not _all_finite(value):
        overflow = ~value.isfinite()
        nonfinite += overflow.sum()
        value = torch.where(overflow, torch.where(memory.isfinite(), memory, 0.0), value)
        if new_buffer is not None and momentum_buffer is not None:
            kept = torch.where(momentum_buffer.isfinite(), momentum_buffer, 0.0)
            new_buffer = torch.where(overflow, kept, new_buffer)
    return value, new_buffer, nonfinite


def select(value: Tensor, k: int) -> Tensor:
    """The indices (int64 [k], ascending) of the k largest \\|value\\|, ties to the lowest index."""
    order = torch.argsort(value.abs(), descending=True, stable=True)
    return order[:k].sort().values


def to_wire(value: Tensor, wire_dtype: torch.dtype) -> Tensor:
    """Rounds to nearest even and saturates at the largest finite value of the wire dtype."""
    limit = torch.finfo(wire_dtype).max
    return value.to(wire_dtype).clamp(-limit, limit)


def payload_nbytes(numel: int, k: int, wire_dtype: torch.dtype) -> int:
    """Bytes of a payload: header, tile starts, tile-local indices, values, each padded to 16."""
    tiles = -(-numel // TILE)
    return 16 + _pad16(4 * tiles) + _pad16(2 * k) + _pad16(wire_dtype.itemsize * k)


def select_state(numel: int, k: int, device: torch.device | str) -> Tensor:
    """Nothing: the reference needs no guess."""
    return torch.zeros(0, dtype=torch.uint8, device=device)


def compress_(
    memory: Tensor,
    grads: Sequence[Tensor | None],
    k: int,
    *,
    momentum: float | Tensor = 0.0,
    aggregate: Tensor | None = None,
    momentum_buffer: Tensor | None = None,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    params: Sequence[Tensor] | None = None,
    maximize: bool = False,
    grad_scale: float | Tensor | None = None,
    found_inf: Tensor | None = None,
    wire_dtype: torch.dtype = torch.bfloat16,
    state: Tensor | None = None,
) -> Tensor:
    """c = C(v) becomes the payload, u = v - c stays in ``memory``. See ``ops.compress_``."""
    numel = memory.numel()
    value, new_buffer, nonfinite = accumulate(
        memory,
        grads,
        momentum=momentum,
        aggregate=None if aggregate is None else densify(aggregate, numel),
        momentum_buffer=momentum_buffer,
        nesterov=nesterov,
        weight_decay=weight_decay,
        params=params,
        maximize=maximize,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )
    indices = select(value, k)
    values = to_wire(value[indices], wire_dtype)
    value[indices] -= values.float()
    memory.copy_(value)
    if new_buffer is not None and momentum_buffer is not None:
        momentum_buffer.copy_(new_buffer)
    return pack(indices, values, numel, nonfinite)


def accumulate_(
    memory: Tensor,
    grads: Sequence[Tensor | None],
    *,
    rank: int = 0,
    ranks: int = 1,
    momentum_buffer: Tensor | None = None,
    **rule: Any,
) -> Tensor:
    """v stays in ``memory``; v and the counts are to be summed. See ``ops.accumulate_``.

    ``rule``: the other arguments of :func:`accumulate`.
    """
    value, new_buffer, nonfinite = accumulate(
        memory, grads, momentum_buffer=momentum_buffer, **rule
    )
    memory.copy_(value)
    if new_buffer is not None and momentum_buffer is not None:
        momentum_buffer.copy_(new_buffer)
    counts = torch.zeros(ranks, device=memory.device)
    counts[rank] = nonfinite.clamp(max=LARGEST_COUNT)
    return torch.cat([value, counts])


def apply_dense_(
    params: Sequence[Tensor],
    memory: Tensor,
    total: Tensor,
    lr: float | Tensor,
    *,
    skip: Tensor | None = None,
) -> None:
    """a = total / p, w_{t+1} = w_t - eta_t * a, and u = 0. See ``ops.apply_dense_``."""
    mean = total[: memory.numel()]
    if skip is not None and skip.item():
        mean.zero_()
        return
    mean.mul_(torch.tensor(1 / (total.numel() - memory.numel()), dtype=torch.float32))
    moves = torch.as_tensor(lr, dtype=torch.float32, device=total.device) * mean
    for param, move in zip(params, moves.split([p.numel() for p in params]), strict=True):
        moved = param.detach().float() - move.view(param.shape)
        param.detach().copy_(moved.to(param.dtype))
    memory.zero_()


def pack(indices: Tensor, values: Tensor, numel: int, nonfinite: Tensor) -> Tensor:
    """A payload's bytes: indices int64 [k] ascending, values in the wire dtype [k]."""
    k = indices.numel()
    tag = PAYLOAD_MAGIC | WIRE_DTYPES.index(values.dtype) << 24
    count = int(nonfinite.clamp(max=2**32 - 1))
    header = _uint32([tag, count, k, numel], indices.device)
    tile_begins = torch.arange(0, numel, TILE, device=indices.device)
    starts = torch.searchsorted(indices, tile_begins)
    sections = [
        header.view(torch.uint8),
        starts.to(torch.int32).view(torch.uint8),
        _uint16(indices % TILE).view(torch.uint8),
        values.view(torch.uint8),
    ]
    return torch.cat([_padded(section) for section in sections])


def unpack(
    payload: Tensor, numel: int, k: int, wire_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """indices int64 [k], values float32 [k], non-finite count int64 scalar tensor."""
    tiles = -(-numel // TILE)
    sizes = [16, 4 * tiles, 2 * k, wire_dtype.itemsize * k]
    begins = [0]
    for size in sizes[:-1]:
        begins.append(begins[-1] + _pad16(size))
    _, starts, local, values = (
        payload[b : b + s].clone() for b, s in zip(begins, sizes, strict=True)
    )
    if _described(payload) != (numel, k, wire_dtype):
        raise RuntimeError("the payload's header is damaged")
    starts = starts.view(torch.int32).long()
    counts = torch.diff(starts, append=torch.tensor([k], device=payload.device))
    tile = torch.repeat_interleave(torch.arange(tiles, device=payload.device), counts)
    indices = tile * TILE + (local.view(torch.int16).long() & 0xFFFF)
    return indices, values.view(wire_dtype).float(), _header(payload)[1]


def verdict(payloads: Sequence[Tensor]) -> Tensor:
    """int32 [1]: bit 0 when any header counts a non-finite value, bit 1 for a damaged header."""
    flags = 0
    for gathered in payloads:
        flags |= NONFINITE * bool(payload_nonfinite(gathered).any())
        flags |= DAMAGED * any(_described(payload) is None for payload in gathered)
    return torch.tensor([flags], dtype=torch.int32, device=payloads[0].device)


def payload_nonfinite(payloads: Tensor) -> Tensor:
    """Every rank's count of non-finite values, int64 [p]."""
    return torch.stack([_header(payload)[1] for payload in payloads])


def _header(payload: Tensor) -> Tensor:
    """Tag, count of non-finite values, k and numel, int64 [4]."""
    return payload[:16].clone().view(torch.int32).long() & 0xFFFFFFFF


def _described(payload: Tensor) -> tuple[int, int, torch.dtype] | None:
    """numel, k and wire dtype as the header says, or None if it describes no payload like this."""
    tag, _, k, numel = _header(payload).tolist()
    code = tag >> 24 & 0xF
    if tag & 0xF0FFFFFF != PAYLOAD_MAGIC or code >= len(WIRE_DTYPES):
        return None
    if not 1 <= k <= numel <= MAX_NUMEL:
        return None
    wire_dtype = WIRE_DTYPES[code]
    if payload_nbytes(numel, k, wire_dtype) != payload.numel():
        return None
    return numel, k, wire_dtype


def merge(
    payloads: Tensor, numel: int, k: int, wire_dtype: torch.dtype, *, skip: Tensor | None = None
) -> Tensor:
    """a_t = (1/p) sum_k c_k, summed in rank order; zero for a skipped step."""
    total = torch.zeros(numel, device=payloads.device)
    if skip is None or not skip.item():
        for payload in payloads:
            indices, values, _ = unpack(payload, numel, k, wire_dtype)
            total[indices] += values
        total *= torch.tensor(1 / len(payloads), dtype=torch.float32)
    return sparsify(total)


def apply_(
    params: Sequence[Tensor],
    aggregate: Tensor,
    lr: float | Tensor,
    *,
    skip: Tensor | None = None,
) -> None:
    """w_{t+1} = w_t - eta_t * a_t, in float32, rounded to each parameter's dtype."""
    if skip is not None and skip.item():
        return
    step = torch.as_tensor(lr, dtype=torch.float32, device=aggregate.device) * densify(
        aggregate, sum(p.numel() for p in params)
    )
    for param, delta in zip(params, step.split([p.numel() for p in params]), strict=True):
        delta = delta.view(param.shape)
        moved = (param.detach().float() - delta).to(param.dtype)
        param.detach().copy_(torch.where(delta != 0, moved, param.detach()))


def restore_(
    memory: Tensor,
    payload: Tensor,
    k: int,
    wire_dtype: torch.dtype,
    *,
    skip: Tensor | None = None,
) -> None:
    """u += c: what a skipped step would have sent goes back to memory."""
    if skip is None or skip.item():
        indices, values, _ = unpack(payload, memory.numel(), k, wire_dtype)
        memory[indices] += values


def mask_(
    momentum_buffer: Tensor,
    payload: Tensor,
    k: int,
    wire_dtype: torch.dtype,
    *,
    skip: Tensor | None = None,
) -> None:
    """Momentum factor masking (DGC, section 3.3): m = 0 where c is not."""
    if skip is None or not skip.item():
        indices, values, _ = unpack(payload, momentum_buffer.numel(), k, wire_dtype)
        momentum_buffer[indices[values != 0]] = 0.0


def fingerprint(params: Sequence[Tensor]) -> Tensor:
    """Each tensor's fingerprint: sum over i of mix(2**32 * i + bits_i), modulo 2**64."""
    return torch.stack([_mix(param.detach().reshape(-1)).sum() for param in params])


def _mix(values: Tensor) -> Tensor:
    """The finaliser of SplitMix64, in int64 arithmetic that wraps."""
    wide = values.element_size() == 4
    bits = values.view(torch.int32 if wide else torch.int16).long()
    x = bits & (0xFFFFFFFF if wide else 0xFFFF) | torch.arange(len(values)) << 32
    x = x + (0x9E3779B97F4A7C15 - 2**64)
    x = (x ^ _shifted(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shifted(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, n: int) -> Tensor:
    return x >> n & (1 << 64 - n) - 1  # int64 shifts the sign in


def sparsify(dense: Tensor) -> Tensor:
    """A dense float32 [numel] as this layer's aggregate."""
    return dense.clone().view(torch.uint8)


def densify(aggregate: Tensor, numel: int) -> Tensor:
    """This layer's aggregate as float32 [numel]."""
    return aggregate.view(torch.float32)[:numel]


def _all_finite(values: Tensor) -> bool:
    # Reading the answer from a CUDA device would make the host wait: there it is always "no".
    return values.is_cpu and bool(values.sum().isfinite())


def _pad16(nbytes: int) -> int:
    return -(-nbytes // 16) * 16


def _padded(section: Tensor) -> Tensor:
    return torch.nn.functional.pad(section, (0, _pad16(section.numel()) - section.numel()))


def _uint16(values: Tensor) -> Tensor:
    return torch.where(values >= 2**15, values - 2**16, values).to(torch.int16)


def _uint32(values: Sequence[int], device: torch.device) -> Tensor:
    wide = torch.tensor(values, dtype=torch.int64, device=device)
    return torch.where(wide >= 2**31, wide - 2**32, wide).to(torch.int32)
