"""A step is a transaction: an exception at any of its calls loses nothing and repeats nothing."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist

import gmc_cuda
from gmc_cuda import ops
from gmc_cuda._engine import budget, exchange, missing, packing, rules, watch
from gmc_cuda._engine.bucket import Bucket
from support.problems import flat, mean, memory_of, parameters, same_on_all_ranks

LR = 0.05
STEPS, FAULTY = 6, 3  # steps to be made; in which of them the fault is
MOST_TRIES = 12

# All that a step calls, as (owner, name). What runs before a collective is called off on all
# workers, what runs after it is done again.
BEFORE_SENDING = [
    (exchange.Exchange, "check"), (watch.DamageWatch, "check"), (packing.Packing, "holds"),
    (Bucket, "flat_grads"), (rules.Rule, "prepare"), (rules.Rule, "plan"), (budget, "entries"),
    (missing, "absent_in"), (Bucket, "select_state"), (ops, "compress_"), (ops, "accumulate_"),
    (exchange.Exchange, "all_gather"), (exchange.Exchange, "all_to_all"),
    (exchange.Exchange, "all_reduce"),
]  # fmt: skip
AFTER_SENDING = [
    (exchange.Work, "wait"), (exchange._Pending, "wait"), (ops, "verdict"),
    (Bucket, "spare_aggregate"), (ops, "merge"), (ops, "merge_ranges"),
    (watch.DuplicateWatch, "look"), (watch.DamageWatch, "flags"), (Bucket, "flat_params"),
    (ops, "apply_"), (ops, "apply_dense_"),
    (ops, "mask_"), (Bucket, "keep_aggregate"), (watch.DamageWatch, "report"),
    (rules.Rule, "finish"), (rules.GlobalMomentum, "finish"),
]  # fmt: skip
# Parts of what an interrupt comes in are called again.
INTERRUPTIBLE = [place for place in AFTER_SENDING if place[1] not in ("flat_params", "finish")]
OPERATORS = [(ops, "compress_"), (ops, "accumulate_")]


class Fault(Exception):
    pass


class Interrupt(BaseException):
    """Comes when a call has returned, as Python raises it after an operator."""


class EarlyInterrupt(Interrupt):
    """Comes before a call has done anything."""


class Faults:
    """Within it the number-th call of these places raises, once."""

    def __init__(self, places, number, error):
        self._places, self._left, self._error = places, number, error
        self.fired_at = None

    def __enter__(self):
        self._real = [(owner, name, vars(owner)[name]) for owner, name in self._places]
        for owner, name, real in self._real:
            setattr(owner, name, self._patched(name, real))
        return self

    def __exit__(self, *_):
        for owner, name, real in self._real:
            setattr(owner, name, real)

    def _patched(self, name, real):
        def call(*args, **kwargs):
            fires = self.fired_at is None and self._left == 0
            self._left -= 1
            if fires and self._error is not Interrupt:
                self.fired_at = name
                raise self._error(name)
            result = real(*args, **kwargs)
            if fires:
                self.fired_at = name
                raise self._error(name)
            return result

        return call


def build(make, overlap, group=None, **options):
    """Two sparse buckets, a dense one between them."""
    params = parameters()
    groups = [{"params": params[:3]}, {"params": params[3:5], "density": 1.0},
              {"params": params[5:]}]  # fmt: skip
    optimizer = make(
        groups,
        lr=LR,
        density=0.1,
        overlap=overlap,
        process_group=group,
        bucket_cap_mb=1.0,
        **options,
    )
    assert len(optimizer.engine.buckets) == 3
    return params, optimizer


class Run:
    """Trains until STEPS steps are made, and knows all that came in.

    A gradient that an exception left where it was comes again, with the next one.
    """

    def __init__(self, make, overlap, group=None, rank=0, **options):
        self.params, self.optimizer = build(make, overlap, group, **options)
        self.overlap, self.rank = overlap, rank
        self.came_in = torch.zeros_like(flat(self.params))
        self.began = flat(self.params)
        self.before = None  # the iterate before the last step
        self.tries = 0

    def iterate(self):
        """w without Nesterov's look-ahead."""
        group, w = self.optimizer.param_groups[0], flat(self.params)
        ahead = group["nesterov"] and isinstance(self.optimizer, gmc_cuda.GMC)
        if not ahead:
            return w
        a = flat([self.optimizer.state[p]["momentum_buffer"] for p in self.params])
        return w + LR * group["momentum"] * a

    def try_a_step(self, faults=None):
        self.tries += 1
        generator = torch.Generator().manual_seed(1000 * self.tries + self.rank)
        grads = [torch.randn(p.shape, generator=generator) for p in self.params]
        self.came_in += flat(grads)
        before = self.iterate()
        with faults or nullcontext():
            errors = self._step(grads)
        if not errors:
            self.optimizer.zero_grad()
        self.before = before
        return errors

    def _step(self, grads):
        errors = []
        for n, (param, grad) in enumerate(zip(self.params, grads, strict=True)):
            try:
                if self.overlap:
                    (param * grad).sum().backward()
                else:
                    param.grad = grad if param.grad is None else param.grad + grad
            except (Fault, Interrupt) as error:
                errors.append(error)
            except ValueError as error:  # refused: such a worker gives the backward pass up
                left = [p.grad is not None or i > n for i, p in enumerate(self.params)]
                self.came_in -= flat([g * out for g, out in zip(grads, left, strict=True)])
                self.optimizer.zero_grad()
                return [*errors, error]
        try:
            self.optimizer.step()
        except (Fault, Interrupt, RuntimeError, ValueError) as error:
            errors.append(error)
        return errors

    def steps(self):
        return self.optimizer.stats()["steps"]

    def train(self, places=(), number=0, error=Fault):
        """Returns the place of the fault, and the errors of all steps."""
        errors, fired_at = [], None
        while self.steps() < STEPS and self.tries < MOST_TRIES:
            if self.steps() == FAULTY and fired_at is None and places:
                faults = Faults(places, number, error)
                errors += self.try_a_step(faults)
                fired_at = faults.fired_at
                if fired_at is None:
                    places = ()
            else:
                errors += self.try_a_step()
        return fired_at, errors

    def check(self, group=None):
        """The trajectory equation from the first step to the last, and equal replicas."""
        average = (lambda t: t) if group is None else (lambda t: mean(group, t))
        assert self.steps() == STEPS, f"{self.steps()} steps were made in {self.tries} tries"
        momentum = self.optimizer.param_groups[0]["momentum"]
        x = self.iterate() - LR * average(memory_of(self.optimizer, self.params))
        expected = self.began - LR * average(self.came_in) + momentum * (self.before - self.began)
        torch.testing.assert_close(x, expected, rtol=1e-5, atol=2e-6)
        assert group is None or same_on_all_ranks(group, self.params)


METHODS = {
    "GMC": (gmc_cuda.GMC, {"momentum": 0.5}),
    "GMC, nesterov": (gmc_cuda.GMC, {"momentum": 0.5, "nesterov": True}),
    "DGC": (gmc_cuda.DGC, {"momentum": 0.0}),
}


TWO_SIDED = {
    "GMC, two-sided": (gmc_cuda.GMC, {"momentum": 0.5, "exchange": "reduce_scatter"}),
    "DGC, two-sided": (gmc_cuda.DGC, {"momentum": 0.0, "exchange": "reduce_scatter"}),
}

# A step that is not made leaves Nesterov's look-ahead where it is, as a skipped one does.
WITHOUT_NESTEROV = [name for name in METHODS if "nesterov" not in name]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("method", WITHOUT_NESTEROV)
def test_an_exception_at_any_call_of_a_step(method, overlap):
    make, options = METHODS[method]
    seen = set()
    for number in range(500):
        run = Run(make, overlap, **options)
        fired_at, errors = run.train(BEFORE_SENDING + AFTER_SENDING, number)
        if fired_at is None:
            break
        seen.add(fired_at)
        assert [type(error) for error in errors] == [Fault], fired_at
        run.check()
    assert number > 40
    expected = {"compress_", "accumulate_", "all_gather", "all_reduce", "wait", "verdict", "merge"}
    assert seen >= expected | {"apply_", "apply_dense_", "plan", "flat_grads"}
    assert ("mask_" in seen) == (method == "DGC")


@pytest.mark.parametrize("method", WITHOUT_NESTEROV)
@pytest.mark.parametrize("error", [Interrupt, EarlyInterrupt])
def test_an_interrupt_at_any_operator(method, error):
    """Memory has the gradients and .grad is None, or neither."""
    make, options = METHODS[method]
    places = OPERATORS + [place for place in INTERRUPTIBLE if place[0] is ops]
    seen = set()
    for number in range(500):
        run = Run(make, False, **options)
        fired_at, errors = run.train(places, number, error)
        if fired_at is None:
            break
        seen.add(fired_at)
        assert [type(met) for met in errors] == [error], fired_at
        run.check()
    assert seen >= {"compress_", "accumulate_", "verdict", "merge", "apply_", "apply_dense_"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "places,error",
    [(AFTER_SENDING, Fault), (INTERRUPTIBLE, Interrupt), (INTERRUPTIBLE, EarlyInterrupt)],
)
def test_an_exception_or_interrupt_at_any_call_after_sending(method, places, error):
    make, options = METHODS[method]
    for number in range(500):
        run = Run(make, False, **options)
        fired_at, errors = run.train(places, number, error)
        if fired_at is None:
            break
        assert [type(met) for met in errors] == [error], fired_at
        run.check()
        assert run.tries == STEPS, "the step was made"
    assert number > 12


def disturbed(group, method, overlap, error):
    """One of two workers raises; what do both see?"""
    places = BEFORE_SENDING + AFTER_SENDING if error is Fault else INTERRUPTIBLE + OPERATORS
    if overlap:  # what step() refuses on one worker when all is sent, the other has done by then
        places = [place for place in places if place[1] != "check"]
    make, options = (METHODS | TWO_SIDED)[method]
    rank, outcomes = dist.get_rank(group), {}
    for number in range(500):
        run = Run(make, overlap, group, rank, **options)
        fired_at, errors = run.train(places if rank == 1 else (), number, error)
        told = [None, None]
        dist.all_gather_object(told, (fired_at, [repr(e) for e in errors]), group=group)
        if told[1][0] is None:
            return outcomes, number
        run.check(group)
        fired_at = told[1][0]
        assert len(told[1][1]) == 1, told
        assert fired_at in told[1][1][0], told
        outcomes.setdefault(fired_at, set()).add(tuple(told[0][1]))
    raise AssertionError("the fault came for ever")


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("method", [*WITHOUT_NESTEROV, *TWO_SIDED])
def test_an_exception_on_one_worker(pool, method, overlap):
    (outcomes, number), _ = pool.run(2, disturbed, method, overlap, Fault)
    assert number > 40
    for place in ("verdict", "merge", "wait", "apply_", "apply_dense_"):
        assert outcomes[place] == {()}, "what all have sent is done"
    # Before the first bucket goes nobody notices; later the others are told.
    for place in ("compress_", "accumulate_"):
        for errors in outcomes[place]:
            assert not errors or "another worker left it by an exception" in errors[0]
    assert any(outcomes["accumulate_"])


@pytest.mark.parametrize("error", [Interrupt, EarlyInterrupt])
@pytest.mark.parametrize("method", ["GMC", *TWO_SIDED])
def test_an_interrupt_on_one_worker(pool, method, error):
    (outcomes, number), _ = pool.run(2, disturbed, method, False, error)
    assert number > 15
    for place, errors in outcomes.items():
        told = all("another worker left it" in text for told in errors for text in told)
        assert told if place in ("compress_", "accumulate_") else errors == {()}, place


def abandon(group, ranks, arrived, options):
    """Some workers give a backward pass up, when the gradients of so many parameters are there."""
    rank = dist.get_rank(group)
    run, errors = Run(gmc_cuda.GMC, True, group, rank, momentum=0.5, **options), []
    while run.steps() < STEPS and run.tries < MOST_TRIES:
        if rank not in ranks or run.tries != FAULTY:
            errors += map(str, run.try_a_step())
            continue
        run.tries += 1
        for param in run.params[:arrived]:
            (2 * param).sum().backward()
        for param in run.params[:arrived]:  # what has arrived and is not there was sent
            if param.grad is None:
                run.came_in += flat([p * 0 + 2.0 * (p is param) for p in run.params])
        run.optimizer.zero_grad()
    if run.steps() == STEPS:
        run.check(group)
    return run.steps(), errors


@pytest.mark.parametrize("arrived", range(7))
@pytest.mark.parametrize("ranks", [[1], [0, 1]])
@pytest.mark.parametrize("way", ["all_gather", "reduce_scatter"])
def test_an_abandoned_backward_pass(pool, way, ranks, arrived):
    """What was sent of it is not lost, and who waits for the rest learns that there is none."""
    found = pool.run(2, abandon, ranks, arrived, {"exchange": way})
    for rank, (steps_made, errors) in enumerate(found):
        # All of it, where nothing is sent back: rank 0 makes the step that rank 1 does not.
        if arrived == 6 and ranks == [1] and way == "all_gather":
            assert steps_made < STEPS
            assert errors
            assert all(f"step: {FAULTY + 2} on rank 0, {FAULTY + 1}" in error for error in errors)
        else:
            told = rank not in ranks and arrived >= 3
            assert steps_made == STEPS
            assert ["another worker left it" in error for error in errors] == [True] * told, errors


CHANGES = {
    "lr of group 0": {"lr": 0.02},
    "momentum of group 0": {"momentum": 0.3},
    "weight_decay of group 0": {"weight_decay": 0.1},
    "memory_decay of group 0": {"memory_decay": 0.9},
    "nesterov of group 0": {"nesterov": True},
    "maximize of group 0": {"maximize": True},
    "density of group 0": {"density": 0.2},
    "bytes_ratio of group 0": {"density": None, "bytes_ratio": 30.0},
    "momentum_form of group 0": {"momentum_form": "iterate"},
}


def change_on_one(group, change, overlap):
    """Options that one worker alone changes in mid-run; both are told, and can go on."""
    rank = dist.get_rank(group)
    run = Run(gmc_cuda.GMC, overlap, group, rank, momentum=0.5)
    options = run.optimizer.param_groups[0]
    for _ in range(2):
        assert not run.try_a_step()
    before, old = flat(run.params), {name: options[name] for name in CHANGES[change]}
    words = []
    for _ in range(2):
        options.update(CHANGES[change] if rank == 1 else {})
        words += map(str, run.try_a_step())
        assert torch.equal(flat(run.params), before)
    options.update(old)
    run.train()
    assert run.steps() == STEPS
    assert same_on_all_ranks(group, run.params)
    if not {"momentum", "weight_decay", "memory_decay", "maximize"} & old.keys():
        run.check(group)  # with these, rank 1 took something else in
    return words


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_an_option_that_one_worker_changes(pool, change, overlap):
    for words in pool.run(2, change_on_one, change, overlap):
        assert len(words) == 2
        assert words[0].startswith("step 3: what the workers sent does not belong together")
        assert f"\n  {change}: " in words[0], words
        assert " on rank 0, " in words[0], words


def freeze_on_one(group, overlap):
    """The payloads' sizes and even their number are others on this worker."""
    run = Run(gmc_cuda.GMC, overlap, group, dist.get_rank(group), momentum=0.5)
    assert not run.try_a_step()
    for param in run.params[3:5] if run.rank == 1 else []:
        param.requires_grad_(False)
    words = [str(error) for error in run.try_a_step()]
    for param in run.params:
        param.requires_grad_(True)
    run.train()
    assert run.steps() == STEPS
    assert same_on_all_ranks(group, run.params)
    return words


@pytest.mark.parametrize("overlap", [False, True])
def test_layers_that_one_worker_freezes(pool, overlap):
    for words in pool.run(2, freeze_on_one, overlap):
        assert len(words) == 1
        assert "requires_grad of parameter 0, group 1: True on rank 0" in words[0]


def change_on_all(group, overlap):
    run = Run(gmc_cuda.GMC, overlap, group, dist.get_rank(group), momentum=0.5)
    for density in (0.2, 0.02, 1.0, 0.5):
        assert not run.try_a_step()
        run.optimizer.param_groups[0]["density"] = density
    assert not run.train()[1]
    run.check(group)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_density_that_all_change(pool, overlap):
    pool.run(2, change_on_all, overlap)


def behind(group):
    """One worker alone does not make a step that the other has made."""
    run = Run(gmc_cuda.GMC, False, group, dist.get_rank(group), momentum=0.5)
    assert not run.try_a_step()
    if run.rank == 1:
        real, ops.merge = ops.merge, lambda *args, **kwargs: 1 / 0
    lost = run.optimizer.step
    try:
        lost()
    except ZeroDivisionError:
        ops.merge = real
    return [str(error) for _ in range(2) for error in run.try_a_step()]


def test_a_worker_that_is_a_step_behind_is_noticed(pool):
    for words in pool.run(2, behind):
        assert len(words) == 2
        assert all("step: 3 on rank 0, 2 on rank 1" in word for word in words)


def cross(group, first, second):
    """Two optimizers of equal layers, whose steps one worker makes in the other order."""
    layers = [torch.nn.Linear(8, 8) for _ in range(2)]
    optimizers = [
        gmc_cuda.GMC(layer.parameters(), lr=LR, density=density, process_group=group)
        for layer, density in zip(layers, (first, second), strict=True)
    ]
    words = []
    for step in range(5):
        for layer in layers:
            for param in layer.parameters():
                param.grad = torch.ones_like(param)
        # Not in the first steps, where what differs in the weights would tell too.
        reverse = step == 3 and dist.get_rank(group) == 1
        for optimizer in optimizers[::-1] if reverse else optimizers:
            try:
                optimizer.step()
            except ValueError as error:
                words.append(str(error))
    return words


@pytest.mark.parametrize("density", [0.1, 1.0])
def test_optimizers_whose_steps_cross(pool, density):
    for words in pool.run(2, cross, density, density):
        assert len(words) == 2, words
        assert all("optimizers crossed" in word for word in words), words
