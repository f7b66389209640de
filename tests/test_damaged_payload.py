"""Invariant 9: a damaged payload is rejected, or still in range and finite; nothing is harmed."""

import struct

import pytest
import torch

from gmc_cuda import ops, reference

N, K, WIRE = 70_000, 40, torch.bfloat16
HEADER_AND_INDICES = 16 + 16 + 80


def sound_payload():
    torch.manual_seed(1)
    return ops.compress_(torch.zeros(N), [torch.randn(N)], K, wire_dtype=WIRE)


def readers(payload):
    """Everything that reads a payload, each on guarded tensors; True when it was rejected."""
    for reader in (
        lambda memory: ops.unpack(payload, N, K, WIRE),
        lambda memory: ops.merge(payload.unsqueeze(0), N, K, WIRE),
        lambda memory: ops.restore_(memory, payload, K, WIRE),
        lambda memory: ops.mask_(memory, payload, K, WIRE),
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


@pytest.mark.parametrize("byte", range(HEADER_AND_INDICES))
def test_each_byte_changed(byte):
    for change in (1, 0x80, 0xFF):
        payload = sound_payload()
        payload[byte] ^= change
        rejected = list(readers(payload))
        assert len(set(rejected)) == 1, "all readers judge alike"
        if not rejected[0]:
            indices, values, _ = ops.unpack(payload, N, K, WIRE)
            assert (indices.diff() > 0).all() and indices[0] >= 0 and indices[-1] < N
            assert values.isfinite().all()


def test_non_finite_value_is_rejected():
    payload = sound_payload()
    payload[-2 * K :].view(torch.bfloat16)[3] = float("nan")
    assert all(readers(payload))


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
    tag, count = struct.unpack("<2I", sound_payload()[:8].numpy().tobytes())
    wires = {tag + (i - 1 << 24): wire for i, wire in enumerate(reference.WIRE_DTYPES)}
    headers = []
    for word, values in [
        (0, (0, tag + (1 << 24), tag + (3 << 24), tag + (1 << 28))),
        (1, (1, 2**32 - 1)),
        (2, (0, 1, K - 1, K + 1, K + 8, N, N + 1)),
        (3, (0, K - 1, K, N - 1, N + 1, 4 * 65536, 4 * 65536 + 1, 2**31 - 1, 2**31, 2**32 - 1)),
    ]:
        sound = [tag, count, K, N]
        for value in (*values, *(sound[word] ^ 1 << bit for bit in range(32))):
            headers.append([*sound[:word], value, *sound[word + 1 :]])
    for header in headers:
        payload = sound_payload()
        payload[:16] = torch.frombuffer(bytearray(struct.pack("<4I", *header)), dtype=torch.uint8)
        own_tag, nonfinite, k, numel = header
        sound = (
            own_tag in wires
            and 1 <= k <= numel < 2**31
            and ops.payload_nbytes(numel, k, wires[own_tag]) == payload.numel()
        )
        readable = sound and (own_tag, k, numel) == (tag, K, N)
        for backend in (ops, reference):
            expected = reference.DAMAGED * (not sound) + reference.NONFINITE * (nonfinite > 0)
            assert backend.verdict([payload.unsqueeze(0)]).item() == expected, header
            assert backend.payload_nonfinite(payload.unsqueeze(0)).item() == nonfinite
            if readable:
                assert backend.unpack(payload, N, K, WIRE)[2] == nonfinite
            else:
                with pytest.raises(RuntimeError, match="damaged"):
                    backend.unpack(payload, N, K, WIRE)


def test_verdict_of_another_wire_type_or_size():
    for wire in (torch.float16, torch.float32):
        payload = ops.compress_(torch.zeros(N), [torch.randn(N)], K, wire_dtype=wire).unsqueeze(0)
        for backend in (ops, reference):
            assert backend.verdict([payload]).item() == 0
            assert backend.verdict([payload[:, :-16].contiguous()]).item() == reference.DAMAGED
            unknown = payload.clone()
            unknown[0, 3] += 3
            assert backend.verdict([unknown]).item() == reference.DAMAGED
