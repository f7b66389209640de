"""Bytes of payloads and aggregates: where sections begin, bits that none owns, words of headers."""

import torch

from gmc_cuda import reference

SECTIONS = ["header", "starts", "low bytes", "bitmap", "values", "end"]


def section_begin(section, numel, k, wire):
    """In bytes; that of "end" is the payload's size."""
    sizes = reference._section_sizes(numel, k, wire)[: SECTIONS.index(section)]
    return sum(map(reference._pad16, sizes))


def spare_bits(numel, k, wire):
    """Padding between sections, and what the last byte of the bitmap and of the values has left."""
    used = [8 * size for size in reference._section_sizes(numel, k, wire)]
    used[SECTIONS.index("bitmap")] = k + -(-numel // reference.BLOCK)
    value_bits = 4 if wire == reference.FLOAT4 else 8 * wire.itemsize
    used[SECTIONS.index("values")] = k * value_bits
    for i, bits in enumerate(used):
        begin, end = (section_begin(section, numel, k, wire) for section in SECTIONS[i : i + 2])
        yield from range(8 * begin + bits, 8 * end)


def nonfinite_counts(payloads):
    """Each rank's count of non-finite values, from the headers of uint8 [p, n]."""
    words = payloads[:, 4:8].contiguous().view(torch.int32).flatten()
    return [count % 2**32 for count in words.tolist()]


def aggregate_flags(aggregate):
    """The flags in an aggregate's header."""
    return int(aggregate[4:8].view(torch.int32))
