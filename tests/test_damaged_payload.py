"""Invariant 9: a damaged payload is rejected, or still in range and finite; nothing is harmed."""

import pytest
import torch

from gmc_cuda import ops

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
