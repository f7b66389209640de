"""The operators of :mod:`gmc_cuda.ops` in plain PyTorch, written to be read beside the papers.

On any device these functions give the same payload and memory as the kernels, byte for byte. They
are written for reading, not for speed. An aggregate is opaque, and each layer reads only its own:
here it is the dense float32 tensor a_t, viewed as bytes.

Sources: Zhao, Xie, Gao, Li, "Global Momentum Compression for Sparse Communication in Distributed
SGD" (GMC, the transformation equation); Lin et al., "Deep Gradient Compression" (local momentum,
momentum factor masking).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

TILE, BLOCK = 65536, 256
PAYLOAD_MAGIC = 0x20434D47
MAX_NUMEL = 2**31 - 1
LARGEST_COUNT = 2**24  # the largest integer to which float32 counts without a gap
NONFINITE, DAMAGED, MISMATCH, OFF = 1, 2, 4, 8
CALLED_OFF, TAGS = 1, 2**24
FLOAT8, FLOAT4 = torch.float8_e4m3fn, torch.float4_e2m1fn_x2
# A header holds the index of its wire dtype in this tuple.
WIRE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, FLOAT8, FLOAT4)
# Wire types with a scale: the exponents of their largest value and of their smallest step.
SMALL = {FLOAT8: (8, -9), FLOAT4: (2, -1)}
FAR_ABOVE = 6  # octaves; see wire_scale
FLOAT4_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of codes 0 to 7; bit 3 is the sign


def accumulate(
    memory: Tensor,
    grads: Sequence[Tensor | None],
    *,
    momentum: float | Tensor = 0.0,
    aggregate: Tensor | None = None,
    momentum_buffer: Tensor | None = None,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    memory_decay: float = 1.0,
    params: Sequence[Tensor] | None = None,
    maximize: bool = False,
    grad_scale: float | Tensor | None = None,
    found_inf: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The vector to compress: v = d * u + g + beta * a for GMC, v = d * u + m for DGC.

    d is ``memory_decay``. Every operation is rounded to float32, in the order written here.

    Args:
        aggregate: a_{t-1} as a dense tensor, float32 [numel]. All other arguments are those of
            :func:`gmc_cuda.ops.compress_`.

    Returns:
        v (float32 [numel]), the new momentum buffer (or None), and the number of non-finite values
        met (int64 scalar tensor).
    """
    if not 0 <= memory_decay <= 2:
        raise ValueError(f"memory_decay: got {memory_decay}, must be between 0 and 2")
    beta = torch.as_tensor(momentum, dtype=torch.float32)
    kept = torch.tensor(memory_decay, dtype=torch.float32, device="cpu") * memory
    # A gradient may be None only beside params, which say how large it would be.
    sizes = [0] * len(grads) if params is None else [p.numel() for p in params]
    grad = torch.cat(
        [
            torch.zeros(n, dtype=torch.float32, device=memory.device)
            if g is None
            else g.reshape(-1).float()
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
        decay = torch.tensor(weight_decay, dtype=torch.float32, device="cpu") * flat

    if momentum_buffer is None:
        value = kept + grad
        if decay is not None:
            value = value + decay
        if aggregate is not None:
            value = value + beta * aggregate
        new_buffer = None
    else:
        if decay is not None:
            grad = grad + decay
        new_buffer = beta * momentum_buffer + grad
        value = (kept + grad) + beta * new_buffer if nesterov else kept + new_buffer
    value = value + 0.0  # -0 becomes +0

    # An element that overflows float32 keeps its old value in memory, without decay.
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


def wire_scale(selected: Tensor, wire_dtype: torch.dtype) -> int:
    """The exponent of the scale of a payload's values: a code of 1 means 2**scale.

    For float8 the largest code lies in the octave of the largest value. For float4 the k // 256
    largest values saturate, and the largest code lies in the octave of the next one; if the largest
    value is more than FAR_ABOVE octaves above that, none saturates. Wire dtypes without a scale
    have the exponent 0.

    Args:
        selected: the values to send, float32 [k].
    """
    if wire_dtype not in SMALL:
        return 0
    top, step = SMALL[wire_dtype]
    fields = _exponent_fields(selected).sort(descending=True).values
    largest = int(fields[0])
    field = int(fields[len(fields) // 256]) if wire_dtype == FLOAT4 else largest
    if largest - field > FAR_ABOVE:
        field = largest
    return max(field - 127 - top, -126 - step)


def encode(values: Tensor, wire_dtype: torch.dtype, scale: int = 0) -> Tensor:
    """Codes of float32 values, rounded to nearest even and saturated at the largest finite value.

    The codes have the wire dtype; a code of float4_e2m1fn_x2 is a uint8 of its own.
    """
    if wire_dtype not in SMALL:
        limit = torch.finfo(wire_dtype).max
        return values.to(wire_dtype).clamp(-limit, limit)
    scaled = _scaled(values, -scale)
    if wire_dtype == FLOAT8:
        limit = torch.finfo(FLOAT8).max
        return scaled.clamp(-limit, limit).to(FLOAT8)
    levels = torch.tensor(FLOAT4_LEVELS, dtype=torch.float32, device=values.device)
    between = (levels[1:] + levels[:-1]) / 2
    # A value half-way between two codes goes to the even one.
    low = torch.bucketize(scaled.abs(), between)
    high = torch.bucketize(scaled.abs(), between, right=True)
    code = torch.where(low % 2 == 0, low, high)
    return (code + 8 * scaled.signbit()).to(torch.uint8)


def decode(codes: Tensor, wire_dtype: torch.dtype, scale: int = 0) -> Tensor:
    """The values of codes from :func:`encode`, float32."""
    if wire_dtype == FLOAT4:
        levels = torch.tensor(FLOAT4_LEVELS, dtype=torch.float32, device=codes.device)
        magnitude = levels[codes.long() & 7]
        return _scaled(torch.where(codes >= 8, -magnitude, magnitude), scale)
    return _scaled(codes.float(), scale)


def payload_nbytes(numel: int, k: int, wire_dtype: torch.dtype) -> int:
    """Bytes of a payload: the sum of its sections, each padded to a multiple of 16."""
    return sum(map(_pad16, _section_sizes(numel, k, wire_dtype)))


def _section_sizes(numel: int, k: int, wire_dtype: torch.dtype) -> list[int]:
    """Bytes of header, tile starts, low bytes of indices, bitmap, values."""
    bits_each = 4 if wire_dtype == FLOAT4 else 8 * wire_dtype.itemsize
    bitmap = k + -(-numel // BLOCK)
    return [24, 4 * -(-numel // TILE), k, -(-bitmap // 8), -(-k * bits_each // 8)]


def select_state(numel: int, k: int, device: torch.device | str) -> Tensor:
    """An empty tensor, since the reference needs no guess."""
    return torch.zeros(0, dtype=torch.uint8, device=device)


def compress_(
    memory: Tensor,
    grads: Sequence[Tensor | None],
    k: int,
    *,
    aggregate: Tensor | None = None,
    momentum_buffer: Tensor | None = None,
    wire_dtype: torch.dtype = torch.bfloat16,
    state: Tensor | None = None,
    tag: int = 0,
    width: int = 0,
    last_k: int = 0,
    **rule: Any,
) -> Tensor:
    """Makes c = C(v) the payload, and leaves u = v - c in ``memory``. See ``ops.compress_``.

    Args:
        rule: the other arguments of :func:`accumulate`.
    """
    _check_tag(tag)
    numel = memory.numel()
    value, new_buffer, nonfinite = accumulate(
        memory,
        grads,
        aggregate=None if aggregate is None else densify(aggregate, numel),
        momentum_buffer=momentum_buffer,
        **rule,
    )
    payloads = []
    for range_, its_k in _ranges(numel, k, width, last_k):
        part = value[range_]
        indices = select(part, its_k)
        scale = wire_scale(part[indices], wire_dtype)
        codes = encode(part[indices], wire_dtype, scale)
        part[indices] -= decode(codes, wire_dtype, scale)
        payloads.append(pack(indices, codes, part.numel(), wire_dtype, scale, nonfinite, tag))
    memory.copy_(value)
    if new_buffer is not None and momentum_buffer is not None:
        momentum_buffer.copy_(new_buffer)
    return torch.cat(payloads)


def _ranges(numel: int, k: int, width: int, last_k: int) -> list[tuple[slice, int]]:
    """Each range of a bucket with its number of entries; width 0: the bucket is not cut."""
    begins = range(0, numel, width or numel)
    ks = [k] * (len(begins) - 1) + [last_k if width else k]
    return [(slice(b, min(b + (width or numel), numel)), n) for b, n in zip(begins, ks)]


def accumulate_(
    memory: Tensor,
    grads: Sequence[Tensor | None],
    *,
    rank: int = 0,
    ranks: int = 1,
    momentum_buffer: Tensor | None = None,
    **rule: Any,
) -> Tensor:
    """Leaves v in ``memory``, and returns v and the counts, to be summed. See ``ops.accumulate_``.

    Args:
        rule: the other arguments of :func:`accumulate`.
    """
    value, new_buffer, nonfinite = accumulate(
        memory, grads, momentum_buffer=momentum_buffer, **rule
    )
    memory.copy_(value)
    if new_buffer is not None and momentum_buffer is not None:
        momentum_buffer.copy_(new_buffer)
    counts = torch.zeros(ranks, dtype=torch.float32, device=memory.device)
    counts[rank] = nonfinite.clamp(max=LARGEST_COUNT)
    return torch.cat([value, counts])


def apply_dense_(
    params: Sequence[Tensor],
    memory: Tensor,
    total: Tensor,
    lr: float | Tensor,
    *,
    skip: Tensor | None = None,
    skipped_steps: Tensor | None = None,
    flags: Tensor | None = None,
) -> None:
    """a = total / p, w_{t+1} = w_t - eta_t * a, and u = 0. See ``ops.apply_dense_``."""
    mean = total[: memory.numel()]
    if _skips(skip, skipped_steps, flags):
        mean.zero_()
        return
    mean.mul_(torch.tensor(1 / (total.numel() - memory.numel()), dtype=torch.float32, device="cpu"))
    moves = torch.as_tensor(lr, dtype=torch.float32, device=total.device) * mean
    for param, move in zip(params, moves.split([p.numel() for p in params]), strict=True):
        moved = param.detach().float() - move.view(param.shape)
        param.detach().copy_(moved.to(param.dtype))
    memory.zero_()


def pack(
    indices: Tensor,
    codes: Tensor,
    numel: int,
    wire_dtype: torch.dtype,
    scale: int,
    nonfinite: Tensor,
    tag: int = 0,
) -> Tensor:
    """A payload's bytes: indices int64 [k] ascending, their codes from :func:`encode` [k]."""
    _check_tag(tag)
    k = indices.numel()
    magic = PAYLOAD_MAGIC | WIRE_DTYPES.index(wire_dtype) << 24
    count = int(nonfinite.clamp(max=2**32 - 1))
    header = _uint32([magic, count, k, numel, scale % 2**32, tag], indices.device)
    tile_begins = torch.arange(0, numel, TILE, dtype=torch.int64, device=indices.device)
    starts = torch.searchsorted(indices, tile_begins)
    # Elias-Fano with 8 low bits: a 1 for each entry, and a 0 after each block of 256 elements.
    bitmap = torch.zeros(k + -(-numel // BLOCK), dtype=torch.uint8, device=indices.device)
    entries = torch.arange(k, dtype=torch.int64, device=indices.device)
    bitmap[entries + indices // BLOCK] = 1
    sections = [
        header.view(torch.uint8),
        starts.to(torch.int32).view(torch.uint8),
        (indices % BLOCK).to(torch.uint8),
        _packed(bitmap, 1),
        _packed(codes, 4) if wire_dtype == FLOAT4 else codes.view(torch.uint8),
    ]
    return torch.cat([_padded(section) for section in sections])


def _check_tag(tag: int) -> None:
    if not 0 <= tag < TAGS:
        raise ValueError(f"tag: got {tag}, must be between 0 and 2**24 - 1")


def unpack(
    payload: Tensor, numel: int, k: int, wire_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The indices (int64 [k]), values (float32 [k]) and non-finite count (int64 scalar tensor).

    Raises:
        RuntimeError: the header does not describe such a payload.
    """
    if _described(payload) != (numel, k, wire_dtype):
        raise RuntimeError("the payload's header is damaged")
    _, _, low, bitmap, codes = _sections(payload, numel, k, wire_dtype)
    ones = _unpacked(bitmap, 1).nonzero().reshape(-1)
    block = ones - torch.arange(k, dtype=torch.int64, device=payload.device)
    indices = BLOCK * block + low.long()
    codes = _unpacked(codes, 4)[:k] if wire_dtype == FLOAT4 else codes.view(wire_dtype)
    values = decode(codes, wire_dtype, _signed(_header(payload)[4]))
    return indices, values, _header(payload)[1]


def _sections(payload: Tensor, numel: int, k: int, wire_dtype: torch.dtype) -> list[Tensor]:
    """Header, tile starts, low bytes of indices, bitmap, values, each without its padding."""
    sizes = _section_sizes(numel, k, wire_dtype)
    parts = payload.split([_pad16(size) for size in sizes])
    return [part[:size].clone() for part, size in zip(parts, sizes, strict=True)]


def verdict(payloads: Sequence[Tensor], counts: Sequence[Tensor] = ()) -> Tensor:
    """int32 [1]: what the ranks' headers and numbers say together. See ``ops.verdict``."""
    flags = 0
    for gathered in payloads:
        flags |= NONFINITE * any(bool(_header(payload)[1]) for payload in gathered)
        sound = [payload for payload in gathered if _described(payload) is not None]
        flags |= DAMAGED * (len(sound) < len(gathered))
        flags |= _tag_flags([int(_header(payload)[5]) for payload in sound], CALLED_OFF)
    for numbers in counts:
        nonfinite, tags = numbers.chunk(2)
        flags |= NONFINITE * bool(nonfinite.any())
        bits = tags.contiguous().view(torch.int32)  # a damaged sum may be a NaN
        called_off = torch.tensor(float(CALLED_OFF), dtype=torch.float32, device="cpu").view(
            torch.int32
        )
        flags |= _tag_flags(bits.tolist(), int(called_off))
    return torch.tensor([flags], dtype=torch.int32, device=[*payloads, *counts][0].device)


def _tag_flags(tags: Sequence[int], called_off: int) -> int:
    """The flags of one bucket, whose ranks' tags must be equal, unless a step was called off."""
    others = set(tags) - {called_off}
    return MISMATCH * (len(others) > 1) | OFF * (called_off in tags)


def _header(payload: Tensor) -> Tensor:
    """Magic, count of non-finite values, k, numel, scale and tag, int64 [6]."""
    return payload[:24].clone().view(torch.int32).long() & 0xFFFFFFFF


def _described(payload: Tensor) -> tuple[int, int, torch.dtype] | None:
    """numel, k and wire dtype from the header; None if they do not describe this payload."""
    magic, _, k, numel, scale, _ = _header(payload).tolist()
    code = magic >> 24 & 0xF
    if magic & 0xF0FFFFFF != PAYLOAD_MAGIC or code >= len(WIRE_DTYPES):
        return None
    if not 1 <= k <= numel <= MAX_NUMEL:
        return None
    wire_dtype = WIRE_DTYPES[code]
    if payload_nbytes(numel, k, wire_dtype) != payload.numel():
        return None
    top, step = SMALL.get(wire_dtype, (127, -126))
    if not -126 - step <= _signed(scale) <= 127 - top:
        return None
    return numel, k, wire_dtype


def merge(
    payloads: Tensor,
    numel: int,
    k: int,
    wire_dtype: torch.dtype,
    *,
    skip: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """a_t = (1/p) sum_k c_k, summed in rank order; zero for a skipped step. Ignores ``out``."""
    total = torch.zeros(numel, dtype=torch.float32, device=payloads.device)
    if skip is None or not skip.item():
        for payload in payloads:
            indices, values, _ = unpack(payload, numel, k, wire_dtype)
            total[indices] += values
        total *= torch.tensor(1 / len(payloads), dtype=torch.float32, device="cpu")
    return sparsify(total)


def merge_ranges(
    payloads: Tensor,
    numel: int,
    width: int,
    k: int,
    last_k: int,
    wire_dtype: torch.dtype,
    *,
    skip: Tensor | None = None,
) -> Tensor:
    """a_t of a bucket from the payloads of its ranges, side by side. See ``ops.merge_ranges``."""
    parts = []
    for payload, (range_, its_k) in zip(payloads, _ranges(numel, k, width, last_k), strict=True):
        size = range_.stop - range_.start
        own = payload[: payload_nbytes(size, its_k, wire_dtype)]
        parts.append(densify(merge(own[None], size, its_k, wire_dtype, skip=skip), size))
    return sparsify(torch.cat(parts))


def apply_(
    params: Sequence[Tensor],
    aggregate: Tensor,
    lr: float | Tensor,
    *,
    skip: Tensor | None = None,
    skipped_steps: Tensor | None = None,
    flags: Tensor | None = None,
    memory: Tensor | None = None,
    payload: Tensor | None = None,
    k: int = 0,
    wire_dtype: torch.dtype = torch.bfloat16,
) -> None:
    """w_{t+1} = w_t - eta_t * a_t, in float32, rounded to each parameter's dtype."""
    if _skips(skip, skipped_steps, flags):
        if memory is not None and payload is not None:
            restore_(memory, payload, k, wire_dtype)
        return
    step = torch.as_tensor(lr, dtype=torch.float32, device=aggregate.device) * densify(
        aggregate, sum(p.numel() for p in params)
    )
    for param, delta in zip(params, step.split([p.numel() for p in params]), strict=True):
        delta = delta.view(param.shape)
        moved = (param.detach().float() - delta).to(param.dtype)
        param.detach().copy_(torch.where(delta != 0, moved, param.detach()))


def _skips(skip: Tensor | None, skipped_steps: Tensor | None, flags: Tensor | None) -> bool:
    skips = skip is not None and bool(skip.item())
    if skips and skipped_steps is not None:
        skipped_steps += 1
    if skip is not None and flags is not None:
        flags |= skip & (DAMAGED | MISMATCH | OFF)
    return skips


def restore_(
    memory: Tensor,
    payload: Tensor,
    k: int,
    wire_dtype: torch.dtype,
    *,
    skip: Tensor | None = None,
    width: int = 0,
    last_k: int = 0,
) -> None:
    """u += c: returns the payload of a skipped step to memory; skip may have one for each range."""
    if skip is not None and not skip.any():
        return
    entries = _entries(memory, payload, k, wire_dtype, width, last_k)
    for j, (part, indices, values) in enumerate(entries):
        if skip is None or skip[j if skip.numel() > 1 else 0].item():
            part[indices] += values


def mask_(
    momentum_buffer: Tensor,
    payload: Tensor,
    k: int,
    wire_dtype: torch.dtype,
    *,
    skip: Tensor | None = None,
    width: int = 0,
    last_k: int = 0,
) -> None:
    """Momentum factor masking (DGC, section 3.3): m = 0 wherever c is not 0."""
    if skip is None or not skip.item():
        for part, indices, values in _entries(
            momentum_buffer, payload, k, wire_dtype, width, last_k
        ):
            part[indices[values != 0]] = 0.0


def _entries(
    vector: Tensor, payload: Tensor, k: int, wire_dtype: torch.dtype, width: int, last_k: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each range its part of a vector, and the indices in it and the values of its payload."""
    begin = 0
    for range_, its_k in _ranges(vector.numel(), k, width, last_k):
        part = vector[range_]
        end = begin + payload_nbytes(part.numel(), its_k, wire_dtype)
        indices, values, _ = unpack(payload[begin:end], part.numel(), its_k, wire_dtype)
        yield part, indices, values
        begin = end


# Two-sided compression: rank j owns the j-th range of the index space. Worker k compresses each
# range of v_k by itself, which is compress_ with the ranges' width, and sends c_kj to owner j.


def ranges(numel: int, size: int) -> list[tuple[int, int]]:
    """First and last element but one of each rank's range: equal multiples of 8, the last rest.

    Args:
        numel: N.
        size: world size p.
    """
    width = 8 * -(-numel // (8 * size))
    return [(min(j * width, numel), min((j + 1) * width, numel)) for j in range(size)]


def own_(
    owner_memory: Tensor,
    payloads: Tensor,
    k: int,
    wire_dtype: torch.dtype,
    *,
    momentum: float | Tensor = 0.0,
    aggregate: Tensor | None = None,
    memory_decay: float = 1.0,
    found_inf: Tensor | None = None,
    tag: int = 0,
) -> Tensor:
    """What the owner of a range does: s = (d * r + beta * a) + (1/p) sum_k c_k, r = s - C(s).

    It does so in a skipped step as well, where ``restore_`` then gives C(s) back to r.

    Args:
        owner_memory: r, float32 [n], updated in place.
        payloads: what all workers have sent to this owner, uint8 [p, nbytes].
        k: entries that each of them has, and that are sent on.
        momentum: beta, with global momentum; zero with local momentum, which the workers have.
        aggregate: a_{t-1} within the range.
        memory_decay: d, as the workers'.
        found_inf: non-zero where the workers' headers count values that are not finite.

    Returns:
        d_j = C(s), the payload for all.
    """
    owner_memory.mul_(torch.tensor(memory_decay, dtype=torch.float32, device="cpu"))
    if aggregate is not None:
        beta = torch.as_tensor(momentum, dtype=torch.float32)
        owner_memory.add_(beta * densify(aggregate, owner_memory.numel()))
    return compress_(
        owner_memory, [None], k, params=[owner_memory], momentum=1.0,
        aggregate=merge(payloads, owner_memory.numel(), k, wire_dtype),
        found_inf=found_inf, wire_dtype=wire_dtype, tag=tag,
    )  # fmt: skip


def sparsify(dense: Tensor) -> Tensor:
    """A dense float32 [numel] as this layer's aggregate."""
    return dense.clone().view(torch.uint8)


def densify(aggregate: Tensor, numel: int) -> Tensor:
    """This layer's aggregate as float32 [numel]."""
    return aggregate.view(torch.float32)[:numel]


def _all_finite(values: Tensor) -> bool:
    # For a CUDA tensor the answer is always no: to read it would make the host wait.
    return values.is_cpu and bool(values.sum().isfinite())


def _pad16(nbytes: int) -> int:
    return -(-nbytes // 16) * 16


def _padded(section: Tensor) -> Tensor:
    return torch.nn.functional.pad(section, (0, _pad16(section.numel()) - section.numel()))


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Packs codes of 1 or 4 bits, one in each uint8, into bytes; the first in the lowest bits."""
    each = 8 // bits
    filled = torch.nn.functional.pad(codes, (0, -codes.numel() % each)).view(-1, each)
    shifts = bits * torch.arange(each, dtype=torch.int64, device=codes.device)
    return (filled << shifts).sum(1).to(torch.uint8)


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    shifts = bits * torch.arange(8 // bits, dtype=torch.int64, device=packed.device)
    return (packed[:, None].long() >> shifts & (1 << bits) - 1).reshape(-1)


def _exponent_fields(values: Tensor) -> Tensor:
    """The 8 bits of each float32 value's exponent."""
    return values.view(torch.int32) >> 23 & 0xFF


def _scaled(values: Tensor, exponent: int) -> Tensor:
    return values * torch.tensor(2.0**exponent, dtype=torch.float32, device="cpu")


def _signed(word: int | Tensor) -> int:
    return (int(word) + 2**31) % 2**32 - 2**31


def _uint32(values: Sequence[int], device: torch.device) -> Tensor:
    wide = torch.tensor(values, dtype=torch.int64, device=device)
    return torch.where(wide >= 2**31, wide - 2**32, wide).to(torch.int32)
