"""GMC and DGC as torch optimizers, on one worker."""

import copy
from functools import partial

import pytest
import torch

import gmc_cuda
from support.problems import flat, parameters, set_gradients

OPTIMIZERS = [gmc_cuda.GMC, gmc_cuda.DGC]


def network():
    torch.manual_seed(5)
    return torch.nn.Sequential(torch.nn.Linear(20, 40), torch.nn.ReLU(), torch.nn.Linear(40, 2))


def loss_of(model):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(64, 20, generator=generator)
    return (model(inputs) - inputs[:, :2]).square().mean()


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_training_with_names_groups_scheduler_and_closure(make):
    """Named parameters, groups, a scheduler, a closure, and the loss goes down."""
    model = network()
    names = dict(model.named_parameters())
    biases = [(name, p) for name, p in names.items() if "bias" in name]
    weights = [(name, p) for name, p in names.items() if "weight" in name]
    groups = [{"params": weights}, {"params": biases, "density": 1.0, "weight_decay": 0.0}]
    optimizer = make(groups, lr=0.05, density=0.1, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 150)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    losses = []
    for _ in range(150):
        losses.append(optimizer.step(closure).item())
        scheduler.step()
    assert losses[-1] < 0.2 * losses[0]
    stats = optimizer.stats()
    assert stats["steps"] == 150
    assert stats["skipped_steps"] == 0
    assert stats["dense_bytes_per_step"] == 4 * sum(p.numel() for p in model.parameters())
    assert stats["bytes_per_step"] < stats["dense_bytes_per_step"] / 4


def test_stats_before_the_first_step():
    stats = gmc_cuda.GMC(network().parameters(), lr=0.1).stats()
    assert stats["steps"] == stats["bytes_per_step"] == stats["skipped_steps"] == 0


def test_hyperparameters_are_read_at_every_step():
    params = parameters()
    optimizer = gmc_cuda.GMC(params, lr=0.0, density=0.02)
    set_gradients(params, 0, 0)
    before = flat(params)
    optimizer.step()
    assert torch.equal(flat(params), before)
    group = optimizer.param_groups[0]
    group.update(lr=1.0, density=1.0, momentum=0.0, weight_decay=0.5)
    memory = flat([optimizer.state[p]["memory"] for p in params])
    for param in params:
        param.grad.zero_()
    optimizer.step()
    expected = before - (memory + 0.5 * before)
    torch.testing.assert_close(flat(params), expected, rtol=1e-5, atol=1e-6)


def test_learning_rate_as_a_tensor():
    outcomes = []
    for lr in (0.1, torch.tensor(0.1)):
        params = parameters()
        optimizer = gmc_cuda.GMC(params, lr=lr, density=0.05, momentum_form="iterate")
        for step in range(6):
            if step == 3:
                group = optimizer.param_groups[0]
                group["lr"] = torch.tensor(0.05) if isinstance(lr, torch.Tensor) else 0.05
            set_gradients(params, 0, step)
            optimizer.step()
        outcomes.append(flat(params))
    torch.testing.assert_close(*outcomes, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_parameters_without_gradient_are_left_alone_as_by_sgd(make):
    """At density 1: no momentum, no weight decay, and both go on as before with the next one."""
    params, twins = parameters(), parameters()
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    optimizer = make(params, density=1.0, **options)
    sgd = torch.optim.SGD(twins, **options)
    for step in range(12):
        for tensors in (params, twins):
            set_gradients(tensors, 0, step)
            for i in range(len(tensors)):
                if (step + i) % 3 == 1 or step == 7:
                    tensors[i].grad = None
        optimizer.step()
        sgd.step()
        torch.testing.assert_close(flat(params), flat(twins), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_below_density_one_nothing_is_added_where_there_is_no_gradient(make):
    """What is in memory can still be sent, but momentum and weight decay stay out of it."""
    params = parameters()
    optimizer = make(params, lr=0.1, density=0.3, weight_decay=0.1)
    for step in range(3):
        set_gradients(params, 0, step)
        optimizer.step()
    left = [p.detach().double() - 0.1 * optimizer.state[p]["memory"] for p in params]
    buffer = optimizer.state[params[2]].get("momentum_buffer", torch.zeros(1)).clone()
    for step in range(3, 6):
        set_gradients(params, 0, step)
        params[2].grad = None
        optimizer.step()
    now = [p.detach().double() - 0.1 * optimizer.state[p]["memory"] for p in params]
    torch.testing.assert_close(now[2], left[2], rtol=0, atol=1e-6)
    assert (now[0] - left[0]).abs().max() > 0.01
    if make is gmc_cuda.DGC:  # masked where its memory was sent, otherwise as it was
        after = optimizer.state[params[2]]["momentum_buffer"]
        assert ((after == buffer) | (after == 0)).all()
        assert after.any()


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_frozen_parameters_are_left_alone_until_they_are_unfrozen(make):
    params = parameters()
    params[0].requires_grad_(False)
    optimizer = make(params, lr=0.1, density=0.2, weight_decay=0.1)
    before = params[0].detach().clone()
    for step in range(3):
        set_gradients(params[1:], 0, step)
        optimizer.step()
    assert torch.equal(params[0], before)
    assert params[0] not in optimizer.state
    memory = optimizer.state[params[1]]["memory"].clone()
    params[0].requires_grad_(True)
    params[1].requires_grad_(False)
    held = params[1].detach().clone()
    for step in range(3):
        set_gradients([params[0], *params[2:]], 0, step)
        params[1].grad = None
        optimizer.step()
    assert not torch.equal(params[0], before)
    assert torch.equal(params[1], held)
    assert torch.equal(optimizer.state[params[1]]["memory"], memory)
    params[1].requires_grad_(True)
    for step in range(5):
        set_gradients(params, 0, step)
        optimizer.step()
    assert not torch.equal(params[1], held)


def test_mixed_dtypes():
    params = [torch.nn.Parameter(torch.randn(30, 9).to(d)) for d in
              (torch.float32, torch.bfloat16, torch.float16, torch.float32)]  # fmt: skip
    optimizer = gmc_cuda.GMC(params, lr=0.1, density=0.1)
    for _ in range(3):
        for param in params:
            param.grad = torch.randn(30, 9).to(param.dtype)
        optimizer.step()
    for param in params:
        assert optimizer.state[param]["memory"].dtype == torch.float32
        assert optimizer.state[param]["memory"].count_nonzero() > 0


def test_channels_last_equals_contiguous():
    values, gradients = torch.randn(8, 4, 3, 3), torch.randn(5, 8, 4, 3, 3)
    outcomes = []
    for layout in (torch.contiguous_format, torch.channels_last):
        for gradient_layout in (torch.contiguous_format, layout):
            param = torch.nn.Parameter(values.clone(memory_format=layout))
            assert param.is_contiguous(memory_format=layout)
            optimizer = gmc_cuda.GMC([param], lr=0.1, density=0.1)
            for gradient in gradients:
                param.grad = gradient.to(memory_format=gradient_layout)
                optimizer.step()
            memory = optimizer.state[param]["memory"]
            assert memory.shape == param.shape
            assert memory.stride() == param.stride()
            outcomes.append((param.detach().contiguous(), memory.contiguous()))
    for param, memory in outcomes[1:]:
        assert torch.equal(param, outcomes[0][0])
        assert torch.equal(memory, outcomes[0][1])


def test_tied_weights():
    embedding = torch.nn.Embedding(30, 16)
    head = torch.nn.Linear(16, 30, bias=False)
    head.weight = embedding.weight
    model = torch.nn.Sequential(embedding, head)
    optimizer = gmc_cuda.GMC(model.parameters(), lr=0.1, density=0.1)
    assert len(optimizer.state) == 1
    before = embedding.weight.detach().clone()
    model(torch.arange(30)).logsumexp(1).sum().backward()
    optimizer.step()
    assert head.weight is embedding.weight
    assert not torch.equal(embedding.weight, before)


def test_empty_parameters():
    params = [torch.nn.Parameter(torch.zeros(0, 3)), torch.nn.Parameter(torch.zeros(5))]
    optimizer = gmc_cuda.GMC(params, lr=0.1)
    params[0].grad, params[1].grad = torch.zeros(0, 3), torch.ones(5)
    optimizer.step()
    assert params[1].count_nonzero() == 1
    only_empty = gmc_cuda.GMC(params[:1], lr=0.1)
    only_empty.step()
    assert only_empty.stats()["steps"] == 1


def test_buckets_put_unaligned_tensors_last_and_keep_to_the_cap():
    sizes = [64, 7, 32, 1000, 9, 16]
    params = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    optimizer = gmc_cuda.GMC(params, lr=0.1, bucket_cap_mb=200 * 4 / 2**20)
    assert [b.sizes for b in optimizer.engine.buckets] == [[16, 9], [1000], [32, 64, 7]]
    optimizer = gmc_cuda.GMC(params, lr=0.1, bucket_cap_mb=1e308)
    assert len(optimizer.engine.buckets) == 1


def test_views_of_memory_follow_the_bucket():
    params = parameters()
    optimizer = gmc_cuda.GMC(params, lr=0.1, density=0.01)
    before = copy.deepcopy([optimizer.state[p]["memory"] for p in params])
    set_gradients(params, 0, 0)
    optimizer.step()
    for param, old in zip(params, before, strict=True):
        memory = optimizer.state[param]["memory"]
        assert memory.shape == param.shape
        assert not torch.equal(memory, old)


def test_local_clipping():
    """DGC: the whole gradient is scaled to the given norm, finite values counted only."""
    params = parameters()
    optimizer = gmc_cuda.DGC(params, lr=1.0, density=1.0, momentum=0.0, clip_norm=2.0)
    set_gradients(params, 0, 0)
    norm = flat([p.grad for p in params]).norm()
    before = flat(params)
    expected = before - flat([p.grad for p in params]) * (2.0 / norm)
    assert norm > 2.0
    optimizer.step()
    torch.testing.assert_close(flat(params), expected, rtol=1e-5, atol=1e-6)
    for param in params:
        param.grad = torch.full_like(param, 1e-3)
    before = flat(params)
    optimizer.step()
    torch.testing.assert_close(flat(params), before - 1e-3, rtol=1e-5, atol=1e-6)
    set_gradients(params, 0, 1)
    params[0].grad[0, 0] = float("inf")
    params[0].grad[0, 1] = 1e30
    before = flat(params)
    optimizer.step()
    assert torch.equal(flat(params), before)
    assert flat([optimizer.state[p]["memory"] for p in params]).norm() <= 2.0001


def test_gradient_scaler_on_one_worker():
    model = network()
    optimizer = gmc_cuda.GMC(model.parameters(), lr=0.05, density=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(loss_of(model)).backward()
        if step == 2:
            model[0].weight.grad[0, 0] = float("inf")
        before = flat(list(model.parameters()))
        scaler.step(optimizer)
        scaler.update()
        moved = not torch.equal(flat(list(model.parameters())), before)
        assert moved == (step != 2)
    assert scaler.get_scale() == 2.0**9
    assert optimizer.stats()["skipped_steps"] == 1
    memory = flat([optimizer.state[p]["memory"] for p in model.parameters()])
    assert memory.abs().max() < 10, "memory must not hold loss-scaled values"


def scale_on_two_workers(group):
    params = parameters()
    optimizer = gmc_cuda.GMC(params, lr=0.1, process_group=group)
    set_gradients(params, 0, 0)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    with pytest.raises(RuntimeError, match="use gmc_cuda.GradScaler in its place"):
        scaler.step(optimizer)


def test_plain_gradient_scaler_is_refused_on_several_workers(pool):
    pool.run(2, scale_on_two_workers)


BAD_ARGUMENTS = [
    ({"lr": -0.1}, ValueError, "lr of param group 0: got -0.1, must be at least 0"),
    ({"lr": True}, TypeError, "lr of param group 0: got bool, must be a number or a tensor"),
    ({"lr": "0.1"}, TypeError, "lr of param group 0: got str, must be a number or a tensor"),
    ({"lr": torch.ones(2)}, ValueError, r"lr of param group 0: got shape \(2,\)"),
    ({"momentum": 1.0}, ValueError, "momentum of param group 0: got 1.0, must be at least 0 and"),
    ({"density": 0.0}, ValueError, "density of param group 0: got 0.0, must be above 0 and at"),
    ({"density": 1.5}, ValueError, "density of param group 0: got 1.5, must be above 0 and at"),
    ({"weight_decay": -1}, ValueError, "weight_decay of param group 0: got -1, must be at least"),
    ({"momentum_form": "nag"}, ValueError, "momentum_form of param group 0: got 'nag', must be"),
    ({"wire_dtype": torch.int8}, TypeError, "wire_dtype: got torch.int8, must be torch.float32"),
    ({"bucket_cap_mb": 0}, ValueError, "bucket_cap_mb: got 0, must be a positive number of MiB"),
    ({"check_replicas_every": -1}, ValueError, "check_replicas_every: got -1, must be a number of"),
    ({"nonfinite": "ignore"}, ValueError, "nonfinite: got 'ignore', must be 'skip' or 'raise'"),
    ({"maximize": "False"}, TypeError, "maximize of param group 0: got 'False', must be True or"),
    ({"nesterov": "no"}, TypeError, "nesterov of param group 0: got 'no', must be True or False"),
    ({"overlap": "no"}, TypeError, "overlap: got 'no', must be True or False"),
    ({"process_group": "x"}, TypeError, "process_group: got 'x', must be a process group of torch"),
]


@pytest.mark.parametrize("options,exception,words", BAD_ARGUMENTS)
def test_bad_arguments(options, exception, words):
    with pytest.raises(exception, match=words):
        gmc_cuda.GMC(network().parameters(), **{"lr": 0.1, **options})


BAD_PARAMETERS = [
    (torch.zeros(3, dtype=torch.float64), TypeError, "got torch.float64, must be torch.float32, "),
    (torch.zeros(3, dtype=torch.complex64), TypeError, "got torch.complex64, must be"),
    (torch.zeros(3, 4)[:, :2], ValueError, r"got strides \(4, 1\) for shape \(3, 2\), must fill"),
]


@pytest.mark.parametrize("values,exception,words", BAD_PARAMETERS)
def test_bad_parameters(values, exception, words):
    with pytest.raises(exception, match=rf"params: parameter 0 \('w'\) of group 0: {words}"):
        gmc_cuda.GMC([("w", torch.nn.Parameter(values))], lr=0.1)


@pytest.mark.parametrize("make", [gmc_cuda.GMC, partial(gmc_cuda.DGC, clip_norm=1.0)])
def test_gradients_that_cannot_be_used_change_nothing(make):
    embedding = torch.nn.Embedding(10, 4, sparse=True)
    other = torch.nn.Parameter(torch.ones(5))
    optimizer = make([other, *embedding.parameters()], lr=0.1)
    other.grad = torch.ones(5)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match="gradient of parameter 1 of group 0: got layout"):
        optimizer.step()
    assert torch.equal(other, torch.ones(5))
    assert optimizer.state[other]["memory"].count_nonzero() == 0
    optimizer.param_groups[0]["density"] = 7
    with pytest.raises(ValueError, match="density of param group 0: got 7"):
        optimizer.step()
    assert optimizer.state[other]["memory"].count_nonzero() == 0


def test_an_error_between_two_buckets_loses_nothing(monkeypatch):
    params = parameters()
    optimizer = gmc_cuda.GMC(params, lr=0.1, density=0.1, bucket_cap_mb=200 * 4 / 2**20)
    assert len(optimizer.engine.buckets) > 1
    set_gradients(params, 0, 0)
    grads, before = [p.grad for p in params], flat(params)
    came_in = flat(grads)
    real = gmc_cuda.ops.compress_
    calls = []

    def fail_the_second(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise ValueError("out of luck")
        return real(*args, **kwargs)

    monkeypatch.setattr(gmc_cuda.ops, "compress_", fail_the_second)
    with pytest.raises(ValueError, match="out of luck"):
        optimizer.step()
    assert torch.equal(flat(params), before)
    memory = flat([optimizer.state[p]["memory"] for p in params])
    taken = [optimizer.engine.bucket_of[p] is optimizer.engine.buckets[0] for p in params]
    expected = [g * t for g, t in zip(grads, taken, strict=True)]
    assert torch.equal(memory, flat(expected))
    assert came_in.norm() > memory.norm() > 0
    monkeypatch.undo()
    optimizer.step()
    assert not torch.equal(flat(params), before)
