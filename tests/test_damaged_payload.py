"""Invariant 9: a damaged payload is rejected, or still in range and finite; nothing is harmed."""

import itertools
import struct

import pytest
import torch

from gmc_cuda import ops, reference
from support.payload_sections import section_begin, spare_bits

N, K, WIRE = 70_000, 41, torch.bfloat16
WIRES = reference.WIRE_DTYPES


def sound_payload(wire=WIRE):
    torch.manual_seed(1)
    return ops.compress_(torch.zeros(N), [torch.randn(N)], K, wire_dtype=wire)


def readers(payload, wire=WIRE):
    """Everything that reads a payload, each on guarded tensors; True when it was rejected."""
    for reader in (
        lambda memory: ops.unpack(payload, N, K, wire),
        lambda memory: ops.merge(payload.unsqueeze(0), N, K, wire),
        lambda memory: ops.restore_(memory, payload, K, wire),
        lambda memory: ops.mask_(memory, payload, K, wire),
    ):
        guarded = torch.full((N + 200,), 3.0)
        memory = guarded[100:-100]
        rejected = False
        try:
            reader(memory)
        except RuntimeError as error:
            assert "payload of rank 0 is damaged" in str(error)
            assert torch.equal(memory, torch.full((N,), 3.0))
            rejected = True
        assert torch.equal(guarded[:100], torch.full((100,), 3.0))
        assert torch.equal(guarded[-100:], torch.full((100,), 3.0))
        yield rejected


def judged(payload, wire):
    """Whether all readers reject it; if they do not, what it says is in range and finite."""
    rejected = set(readers(payload, wire))
    assert len(rejected) == 1, "all readers judge alike"
    if rejected == {False}:
        indices, values, _ = ops.unpack(payload, N, K, wire)
        assert (indices.diff() > 0).all()
        assert indices[0] >= 0
        assert indices[-1] < N
        assert values.isfinite().all()
    return rejected.pop()


@pytest.mark.parametrize("wire", WIRES)
def test_each_byte_changed(wire):
    payload = sound_payload(wire)
    assert not judged(payload, wire)
    for byte in range(payload.numel()):
        for change in (1, 0x80, 0xFF):
            payload[byte] ^= change
            judged(payload, wire)
            payload[byte] ^= change


@pytest.mark.parametrize("wire", WIRES)
def test_each_bit_that_no_section_owns(wire):
    """Padding between sections, and what the last byte of the bitmap and of the values has left."""
    payload = sound_payload(wire)
    assert section_begin("end", N, K, wire) == payload.numel()
    for bit in spare_bits(N, K, wire):
        payload[bit // 8] ^= 1 << bit % 8
        assert judged(payload, wire), bit
        payload[bit // 8] ^= 1 << bit % 8


@pytest.mark.parametrize("wire", WIRES)
def test_bits_of_one_block_moved_to_another(wire):
    """As many ones and zeros as before, but entries of other blocks: in range or rejected."""
    payload = sound_payload(wire)
    begin = section_begin("bitmap", N, K, wire)
    bitmap = reference._unpacked(payload[begin : begin + 40], 1)
    for i in range(319):
        if bitmap[i] != bitmap[i + 1]:
            swapped = bitmap.clone()
            swapped[i], swapped[i + 1] = bitmap[i + 1], bitmap[i]
            changed = payload.clone()
            changed[begin : begin + 40] = reference._packed(swapped.to(torch.uint8), 1)
            judged(changed, wire)


def test_an_entry_behind_the_last_block_is_rejected():
    """Its block would be the 257th of a tile, or one past the end of the bucket."""
    for n in (512, 65536, 65536 + 512):
        gradient = torch.zeros(n)
        gradient[n - 1] = 1.0
        payload = ops.compress_(torch.zeros(n), [gradient], 1, wire_dtype=WIRE)
        begin = section_begin("bitmap", n, 1, WIRE)
        last = -(-n // 256)  # bit of the closing zero; the entry's is before it
        for bit in (last - 1, last):
            payload[begin + bit // 8] ^= 1 << bit % 8
        with pytest.raises(RuntimeError, match="holds indices or values out of range"):
            ops.unpack(payload, n, 1, WIRE)


@pytest.mark.parametrize(
    "wire,bad",
    [
        (torch.float32, 0x7F800000),
        (torch.bfloat16, 0xFF80),
        (torch.float16, 0x7C01),
        (torch.float8_e4m3fn, 0xFF),
    ],
)
def test_non_finite_value_is_rejected(wire, bad):
    payload, nbytes = sound_payload(wire), wire.itemsize
    values = payload.numel() - reference._pad16(nbytes * K) + 3 * nbytes
    payload[values : values + nbytes] = torch.tensor(list(bad.to_bytes(nbytes, "little")))
    assert all(readers(payload, wire))


@pytest.mark.parametrize(
    "wire,low,high", [("float8_e4m3fn", -117, 119), ("float4_e2m1fn_x2", -125, 125)]
)
def test_scale_out_of_range_is_rejected(wire, low, high):
    wire = getattr(torch, wire)
    payload = sound_payload(wire)
    for scale, sound in [(low - 1, False), (low, True), (high, True), (high + 1, False)]:
        payload[16:20] = torch.tensor([scale], dtype=torch.int32).view(torch.uint8)
        assert judged(payload, wire) != sound
        assert ops.verdict([payload.unsqueeze(0)]).item() == reference.DAMAGED * (not sound)


def test_truncated():
    with pytest.raises(ValueError, match="payload: got shape"):
        ops.unpack(sound_payload()[:-16].contiguous(), N, K, WIRE)


def test_payload_of_another_bucket_is_rejected():
    other = ops.compress_(torch.zeros(N), [torch.randn(N)], K, wire_dtype=torch.float16)
    with pytest.raises(RuntimeError, match="another format or wire dtype"):
        ops.unpack(other, N, K, WIRE)
    assert ops.verdict([sound_payload().unsqueeze(0)]).item() == 0


def test_every_header_check_agrees():
    """ops and reference, verdict and reader: on each bit of a header, and on what it may say."""
    magic, count = struct.unpack("<2I", sound_payload()[:8].numpy().tobytes())
    wires = {magic + (i - 1 << 24): wire for i, wire in enumerate(WIRES)}
    headers = []
    for word, values in [
        (0, (0, magic + (1 << 24), magic + (4 << 24), magic + (1 << 28))),
        (1, (1, 2**32 - 1)),
        (2, (0, 1, K - 1, K + 1, K + 8, N, N + 1)),
        (3, (0, K - 1, K, N - 1, N + 1, 4 * 65536, 4 * 65536 + 1, 2**31 - 1, 2**31, 2**32 - 1)),
        (4, (1, 2**32 - 1)),
        (5, (1, 2**24 - 1, 2**24, 2**32 - 1)),
    ]:
        sound = [magic, count, K, N, 0, 0]
        for value in (*values, *(sound[word] ^ 1 << bit for bit in range(32))):
            headers.append([*sound[:word], value, *sound[word + 1 :]])
    for header in headers:
        payload = sound_payload()
        payload[:24] = torch.frombuffer(bytearray(struct.pack("<6I", *header)), dtype=torch.uint8)
        own_magic, nonfinite, k, numel, scale, tag = header
        sound = (
            own_magic in wires
            and 1 <= k <= numel < 2**31
            and ops.payload_nbytes(numel, k, wires[own_magic]) == payload.numel()
            and (scale == 0 or wires[own_magic] in reference.SMALL)
        )
        readable = sound and (own_magic, k, numel) == (magic, K, N)
        beside = torch.stack([sound_payload(), payload])
        for backend in (ops, reference):
            expected = reference.DAMAGED * (not sound) + reference.NONFINITE * (nonfinite > 0)
            expected += reference.OFF * (sound and tag == reference.CALLED_OFF)
            assert backend.verdict([payload.unsqueeze(0)]).item() == expected, header
            expected += reference.MISMATCH * (sound and tag not in (0, reference.CALLED_OFF))
            assert backend.verdict([beside]).item() == expected, header
            if readable:
                assert backend.unpack(payload, N, K, WIRE)[2] == nonfinite
            else:
                with pytest.raises(RuntimeError, match="damaged"):
                    backend.unpack(payload, N, K, WIRE)


def test_each_byte_of_a_tag_changed():
    """Whatever it becomes, the payload is sound, and the verdict tells it from the others."""
    torch.manual_seed(1)
    payload = ops.compress_(torch.zeros(N), [torch.randn(N)], K, wire_dtype=WIRE, tag=0x20304)
    for byte, change in itertools.product(range(20, 24), (1, 0x80, 0xFF)):
        changed = payload.clone()
        changed[byte] ^= change
        assert not judged(changed, WIRE)
        for backend in (ops, reference):
            for gathered in ([payload, changed], [changed, payload, payload]):
                assert backend.verdict([torch.stack(gathered)]).item() == reference.MISMATCH
            assert backend.verdict([torch.stack([changed, changed])]).item() == 0


def test_verdict_of_another_wire_type_or_size():
    for wire in (torch.float16, torch.float32):
        payload = ops.compress_(torch.zeros(N), [torch.randn(N)], K, wire_dtype=wire).unsqueeze(0)
        for backend in (ops, reference):
            assert backend.verdict([payload]).item() == 0
            assert backend.verdict([payload[:, :-16].contiguous()]).item() == reference.DAMAGED
            unknown = payload.clone()
            unknown[0, 3] += 4
            assert backend.verdict([unknown]).item() == reference.DAMAGED
