"""memory_decay and nesterov: the same bits as the rule written out with the reference."""

import copy
import warnings

import pytest
import torch

import gmc_cuda
from gmc_cuda import reference
from gmc_cuda._engine import budget
from support.problems import aggregate_of, flat, memory_of, parameters, set_gradients


def one_bucket(params):
    """The order of the bucket's index space."""
    optimizer = gmc_cuda.GMC(params, 0.1)
    (bucket,) = optimizer.engine.buckets
    return bucket.params


@pytest.mark.filterwarnings("ignore:memory_decay")  # that it may diverge in a long run
@pytest.mark.parametrize("decay", [1.0, 0.95, 0.0, 1.02, 2.0])
@pytest.mark.parametrize("nesterov", [False, True])
def test_bits_of_the_reference(decay, nesterov):
    params, twins = parameters(), parameters()
    optimizer = gmc_cuda.GMC(params, 0.1, density=0.1, memory_decay=decay, nesterov=nesterov)
    order = [next(i for i, p in enumerate(params) if p is q) for q in one_bucket(params)]
    twins = [twins[i] for i in order]
    numel = sum(p.numel() for p in twins)
    k = budget.entries_at(0.1, numel)
    memory, previous = torch.zeros(numel), torch.zeros(numel)
    for step in range(6):
        set_gradients(params, 0, step)
        grads = [params[i].grad.clone() for i in order]
        optimizer.step()
        memory.mul_(decay)
        aggregate = None if step == 0 else reference.sparsify(previous)
        payload = reference.compress_(memory, grads, k, momentum=0.9, aggregate=aggregate)
        now = reference.densify(
            reference.merge(payload.unsqueeze(0), numel, k, torch.bfloat16), numel
        )
        sizes = [p.numel() for p in twins]
        for twin, new, old in zip(twins, now.split(sizes), previous.split(sizes), strict=True):
            with torch.no_grad():
                if nesterov:
                    twin -= torch.tensor(-0.1 * 0.9) * old.view_as(twin)
                twin -= torch.tensor(0.1 * 1.9 if nesterov else 0.1) * new.view_as(twin)
        previous = now
        assert torch.equal(flat([params[i] for i in order]), flat(twins))
    assert torch.equal(memory_of(optimizer, [params[i] for i in order]), memory.double())
    assert torch.equal(aggregate_of(optimizer, [params[i] for i in order]), previous.double())


def test_parameter_without_a_gradient_keeps_its_memory():
    params = parameters()
    optimizer = gmc_cuda.GMC(params, 0.1, density=0.01, memory_decay=0.5)
    set_gradients(params, 0, 0)
    optimizer.step()
    kept = optimizer.state[params[4]]["memory"].clone()
    assert kept.abs().max() > 0
    set_gradients(params, 0, 1)
    params[4].grad = None
    optimizer.step()
    assert torch.equal(optimizer.state[params[4]]["memory"], kept)


@pytest.mark.parametrize("decay", [-0.1, 2.1])
def test_decay_out_of_range(decay):
    with pytest.raises(ValueError, match="memory_decay of param group 0: got .*at least 0 and at"):
        gmc_cuda.GMC(parameters(), 0.1, memory_decay=decay)


GROWING = [
    (gmc_cuda.GMC, {"momentum": 0.0, "density": 0.1}, 1.1),
    (gmc_cuda.GMC, {"momentum": 0.9, "density": 0.1}, 1.01),
    (gmc_cuda.DGC, {"momentum": 0.9, "density": 0.1}, 1.1),
    (gmc_cuda.GMC, {"momentum": 0.5, "bytes_ratio": 4}, None),
]


@pytest.mark.parametrize("make,options,largest", GROWING)
def test_what_grows_faster_than_it_is_sent_is_warned_of(make, options, largest):
    if largest is None:
        plain = make(parameters(), 0.1, **options)
        set_gradients(plain.param_groups[0]["params"], 0, 0)
        plain.step()
        largest = 1 + 0.5 * plain.stats()["density"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(parameters(), 0.1, memory_decay=largest, **options)
    with pytest.warns(UserWarning, match="faster than it is sent.* take at most") as caught:
        make(parameters(), 0.1, memory_decay=largest + 0.05, **options)
    assert caught[0].filename == __file__


def test_a_copy_does_not_warn_of_growth_again_and_a_new_group_does():
    with pytest.warns(UserWarning, match="faster than it is sent"):
        optimizer = gmc_cuda.GMC(parameters(), 0.1, density=0.1, memory_decay=1.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin = copy.deepcopy(optimizer)
        twin.add_param_group({"params": parameters(), "memory_decay": 1.0})
    with pytest.warns(UserWarning, match="got 1.3, with which") as caught:
        twin.add_param_group({"params": parameters(), "memory_decay": 1.3})
    assert caught[0].filename == __file__


@pytest.mark.parametrize("momentum,share,grows", [(0.5, 1.0, False), (0.5, 2.5, True)])
def test_what_waits_stays_bounded_up_to_the_limit(momentum, share, grows):
    """With gradients that are noise of the same size at every step."""
    param = torch.nn.Parameter(torch.zeros(2000))
    decay = 1 + share * (1 - momentum) * 0.05
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = gmc_cuda.GMC([param], 0.1, momentum=momentum, density=0.05, memory_decay=decay)
    norms = []
    for _ in range(3):
        for _ in range(250):
            param.grad = torch.randn(2000)
            optimizer.step()
        norms.append(optimizer.state[param]["memory"].norm().item())
    assert (norms[2] > 2 * norms[1]) == grows


def test_state_of_torch_sgd_with_nesterov_goes_both_ways():
    params = parameters()
    sgd = torch.optim.SGD(params, 0.1, momentum=0.9, nesterov=True)
    set_gradients(params, 0, 0)
    sgd.step()
    optimizer = gmc_cuda.GMC(params, 0.1, density=1.0, nesterov=True)
    optimizer.load_state_dict(sgd.state_dict())
    with pytest.raises(ValueError, match="nesterov=True, must be False"):
        gmc_cuda.GMC(params, 0.1).load_state_dict(sgd.state_dict())
    twins = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = torch.optim.SGD(twins, 0.1, momentum=0.9, nesterov=True)
    other.load_state_dict(optimizer.sgd_state_dict())
    for step in range(1, 5):
        set_gradients(params, 0, step)
        set_gradients(twins, 0, step)
        optimizer.step()
        other.step()
    torch.testing.assert_close(flat(params), flat(twins), rtol=1e-5, atol=2e-6)
