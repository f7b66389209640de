"""Random sequences of what users do with an optimizer, and the step that follows them.

At density 1 torch.optim.SGD is told the same and must end up at the same place. Below, the mass
equation must hold between what the public state says before a step and what it says after it.
"""

import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

import test_public_state as by_hand
from test_public_state import KINDS, Run, assert_close, assert_refused, pair

SETTINGS = settings(
    max_examples=60,
    stateful_step_count=20,
    report_multiple_bugs=False,
    phases=set(Phase) - {Phase.explain},  # which takes minutes
)

indices = st.integers(0, 11)  # of parameters or groups, modulo their number
some = st.sets(st.integers(0, 9), max_size=4)
shapes = st.sampled_from([(1,), (5,), (3, 4), (2, 3, 2), (2, 1, 3, 2), (40,), (0,)])
OPTIONS = {
    "lr": [0.05, 0.1, 0.3, torch.tensor(0.1), torch.tensor(1)],
    "momentum": [0.3, 0.5, 0.9],  # never 0: SGD keeps its buffer then, and GMC has no such thing
    "weight_decay": [0.0, 0.1],
    "maximize": [False, True],
}
STATE = [
    "cleared", "another defaultdict", "a defaultdict with copies in it", "__setstate__",
    "an entry popped", "an entry cleared", "an entry without momentum", "replaced by zeros",
    "replaced by clones", "replaced by halves", "offloaded and back", "float64", "bfloat16",
    "by columns", "parts of one tensor", "zeroed in place", "halved in place",
    "one element zeroed", "another storage", "another storage of zeros",
]  # fmt: skip
COPIES = {**by_hand.COPIES, "none": lambda value: value}


class Changes(RuleBasedStateMachine):
    """What is done between steps, to every run alike.

    Attributes:
        run: of the optimizer that is tested.
        runs: that one, and SGD's where there is one.
        together: how many changes come before the next step, besides the next one.
    """

    together = 0

    def do(self, change):
        for run in self.runs:
            with torch.no_grad():
                change(run)
            run.loose = False  # each step is compared by itself
        self.step_after_a_change()

    def step_after_a_change(self):
        if self.together:
            self.together -= 1
        else:
            self.make_step(())

    @rule(number=st.integers(1, 3))
    def several_changes_at_once(self, number):
        self.together = number

    def i(self, number):
        return number % len(self.run.params)

    def g(self, number):
        return number % len(self.run.groups)

    def make_step(self, without):
        raise NotImplementedError

    @rule(without=some)
    def step(self, without):
        self.make_step(without)

    @rule(numbers=st.lists(indices, min_size=1, max_size=3), on=st.booleans())
    def freeze(self, numbers, on):
        self.do(by_hand.freeze(*{self.i(number) for number in numbers}, on=on))

    @rule(order=st.permutations(range(12)), in_place=st.booleans())
    def reorder(self, order, in_place):
        order = [g for g in order if g < len(self.run.groups)]

        def change(run):
            groups = [run.groups[g] for g in order]
            if in_place:
                run.groups[:] = groups
            else:
                run.optimizer.param_groups = groups

        self.do(change)

    @rule(number=indices, options=st.booleans())
    def copy_a_group(self, number, options):
        g = self.g(number)

        def change(run):
            run.groups[g] = {**run.groups[g], "params": list(run.groups[g]["params"])}
            if options:
                run.groups[g] = dict(reversed(run.groups[g].items()))

        self.do(change)

    @precondition(lambda self: len(self.run.groups) > 1)
    @rule(first=indices, second=indices)
    def merge(self, first, second):
        first, second = self.g(first), self.g(second)
        if first != second:
            self.do(by_hand.merge(first, second))

    @precondition(lambda self: len(self.run.groups) > 1 and len(self.run.params) > 3)
    @rule(number=indices, state=st.sampled_from(["dropped", "left"]))
    def pop_a_group(self, number, state):
        g = self.g(number)
        if len(self.run.groups[g]["params"]) < len(self.run.params):
            self.do(by_hand.pop_group(g, state))

    @rule(number=indices, into=indices)
    def move(self, number, into):
        self.do(by_hand.move(self.i(number), self.g(into)))

    @precondition(lambda self: len(self.run.params) > 2)
    @rule(number=indices, state=st.sampled_from(["dropped", "left"]))
    def remove(self, number, state):
        self.do(by_hand.remove(self.i(number), state))

    @precondition(lambda self: self.run.gone)
    @rule(into=indices)
    def bring_back(self, into):
        self.do(by_hand.bring_back(self.g(into)))

    @precondition(lambda self: len(self.run.params) < 10)
    @rule(shape=shapes, into=indices, directly=st.booleans())
    def add(self, shape, into, directly):
        if directly:
            self.do(by_hand.append(shape, self.g(into), 0.5))
        else:
            self.do(by_hand.add_group(lr=0.1, momentum=0.5))

    @rule(
        number=indices,
        way=st.sampled_from(
            [by_hand.grown, lambda t: t[:2], lambda t: t.reshape(-1), lambda t: t.flip(0)]
        ),
        state=st.sampled_from(["moved", "dropped", "left"]),
        in_place=st.booleans(),
    )
    def replace(self, number, way, state, in_place):
        i = self.i(number)
        param = self.run.params[i]
        if state == "dropped" and any(param not in run.state for run in self.runs):
            state = "left"
        if state == "moved":
            for run in self.runs:  # which have no state yet where no step was made
                run.state.setdefault(run.params[i], {})
        self.do(by_hand.replace(i, way, state, in_place))

    @rule(number=indices, key=st.sampled_from(sorted(OPTIONS)), value=indices)
    def set_an_option(self, number, key, value):
        value = OPTIONS[key][value % len(OPTIONS[key])]
        g = self.g(number)

        def change(run):
            # The integer is for us: what torch.optim.SGD makes of it is what it is as a float.
            taken = value if run.ours or not isinstance(value, torch.Tensor) else value.float()
            run.groups[g][key] = taken

        self.do(change)

    @rule(way=st.sampled_from(STATE))
    def change_the_state(self, way):
        self.do(by_hand.STATE[way])

    @rule(
        number=indices, way=st.sampled_from(["columns", "clone", "contiguous", "seen transposed"])
    )
    def change_the_layout(self, number, way):
        def layout(t):
            if way == "columns":
                return t.mT.contiguous().mT if t.dim() > 1 else t.clone()
            if way == "seen transposed":
                return t.mT if t.dim() > 1 and t.size(-1) == t.size(-2) else t
            return t.clone() if way == "clone" else t.contiguous()

        self.do(by_hand.laid_out(self.i(number), layout))

    @rule(
        numbers=st.lists(indices, min_size=1, max_size=3),
        dtype=st.sampled_from([torch.bfloat16, torch.float32]),
        by_data=st.booleans(),
    )
    def convert(self, numbers, dtype, by_data):
        chosen = sorted({self.i(number) for number in numbers})
        self.do(by_hand.converted(dtype, chosen, by_data))

    @rule()
    def convert_back(self):
        self.do(by_hand.converted(torch.float32))

    @rule(way=st.sampled_from(sorted(COPIES)))
    def go_on_with_a_copy(self, way):
        run = self.run
        made = COPIES[way]((run.optimizer, run.params, run.gone))
        run.optimizer, run.params, run.gone = made
        self.step_after_a_change()

    @precondition(lambda self: self.run.state.keys() <= set(self.parameters()))
    @rule(saved=st.booleans())
    def load_its_own_state_dict(self, saved):
        """torch's state_dict() refuses state of a parameter that is in no group."""
        state = self.run.optimizer.state_dict()
        self.run.optimizer.load_state_dict(by_hand.through_torch_save(state) if saved else state)
        self.step_after_a_change()

    def parameters(self):
        return [p for group in self.run.groups for p in group["params"]]

    @rule(number=indices, value=st.sampled_from([("lr", -1.0), ("momentum", 1.0), ("density", 0)]))
    def meet_a_refused_option(self, number, value):
        group, (key, wrong) = self.run.groups[self.g(number)], value
        right, group[key] = group[key], wrong
        assert_refused(self.run, f"{key} of param group {self.g(number)}")
        group[key] = right
        self.step_after_a_change()

    @precondition(lambda self: any(p.requires_grad and p.numel() for p in self.run.params))
    @rule(number=indices)
    def meet_a_refused_parameter(self, number):
        chosen = [i for i, p in enumerate(self.run.params) if p.requires_grad and p.numel()]
        i = chosen[number % len(chosen)]
        dtype = self.run.params[i].dtype
        by_hand.converted(torch.float64, [i], by_data=True)(self.run)
        assert_refused(self.run, "parameter .* of group .*float64")
        by_hand.converted(dtype, [i], by_data=True)(self.run)
        self.step_after_a_change()


class AsSGD(Changes):
    """At density 1: the parameters and the momentum of torch.optim.SGD after every step."""

    @initialize(
        kind=st.sampled_from(["GMC", "GMC-overlap", "DGC", "DGC-overlap"]), nesterov=st.booleans()
    )
    def begin(self, kind, nesterov):
        self.runs = self.run, self.sgd = pair(KINDS[kind])
        for run in self.runs:
            for group in run.groups:
                group["nesterov"] = nesterov
            run.optimizer.defaults["nesterov"] = nesterov  # of groups to come
        self.make_step(())

    def make_step(self, without):
        for twin in self.sgd.params:
            if twin.dtype == torch.bfloat16:
                # SGD makes its first buffer in the gradient's dtype. Ours is always float32.
                zeros = torch.zeros_like(twin, dtype=torch.float32)
                self.sgd.state[twin].setdefault("momentum_buffer", zeros)
        before = self.run.optimizer.stats()["steps"]
        for run in self.runs:
            run.step(without)
        assert self.run.optimizer.stats()["steps"] == before + 1
        close = {"rtol": 1e-5, "atol": 2e-5}
        for i, (param, twin) in enumerate(zip(self.run.params, self.sgd.params, strict=True)):
            assert param.dtype == twin.dtype
            assert param.shape == twin.shape
            if param.dtype == torch.bfloat16:
                close = {"rtol": 2e-2, "atol": 2e-2}
            momentum = self.run.momentum(param)
            assert_close(param, twin, f"parameter {i}", **close)
            assert_close(momentum, self.sgd.momentum(twin), f"momentum {i}", **close)
            assert not self.run.memory(param).any(), f"memory {i} is not empty"
            if param.dtype == torch.bfloat16:  # that the rounding of many steps does not add up
                twin.data.copy_(param.data)
                self.sgd.state[twin]["momentum_buffer"] = momentum.clone()
        for param, values in self.run.gone:
            assert torch.equal(param, values), "a parameter that was taken away has moved"


class Mass(Changes):
    """At any density memory_{t+1} + a_t = memory_t + g_t + weight_decay * w_t + beta * a_{t-1}."""

    @initialize(overlap=st.booleans())
    def begin(self, overlap):
        make = KINDS["GMC-overlap" if overlap else "GMC"]
        self.run = Run(make)
        self.runs = (self.run,)
        for group in self.run.groups:
            group.update(density=0.1, momentum=0.5)
        self.run.optimizer.defaults.update(density=0.1, momentum=0.5)
        self.make_step(())

    @rule(number=indices, density=st.sampled_from([0.05, 0.1, 0.5, 1.0]))
    def set_the_density(self, number, density):
        self.run.groups[self.g(number)]["density"] = density
        self.step_after_a_change()

    def make_step(self, without):
        run = self.run
        before = [tuple(t.double() for t in tensors) for tensors in run.snapshot()]
        run.step(without)
        generator = torch.Generator().manual_seed(run.steps)
        for i, (param, (value, memory, momentum)) in enumerate(
            zip(run.params, before, strict=True)
        ):
            gradient = torch.randn(param.shape, generator=generator).to(param.dtype).double()
            after, left = param.detach().double(), run.memory(param).double()
            aggregate = run.momentum(param).double()
            if not param.requires_grad:
                assert torch.equal(after, value)
                assert torch.equal(left, memory)
                assert torch.equal(aggregate, momentum)
                continue
            group = next(g for g in run.groups if any(p is param for p in g["params"]))
            moved = (value - after) / float(group["lr"])
            if i in without:
                # What waits may be sent; momentum and weight decay stay away with the gradient.
                if param.dtype == torch.float32:
                    assert_close(left + moved, memory, f"mass {i}", rtol=0, atol=2e-4)
                continue
            came_in = -gradient if group["maximize"] else gradient
            came_in = came_in + group["weight_decay"] * value + group["momentum"] * momentum
            assert_close(left + aggregate, memory + came_in, f"mass {i}", rtol=1e-5, atol=2e-5)
            if param.dtype == torch.float32:
                assert_close(moved, aggregate, f"update {i}", rtol=0, atol=2e-4)
            else:  # rounded to 8 bits: relative to the parameter, and then divided by lr
                assert (
                    (moved - aggregate).abs() * float(group["lr"]) <= after.abs() / 128 + 1e-6
                ).all()
        for param, values in run.gone:
            assert torch.equal(param, values), "a parameter that was taken away has moved"


def test_any_sequence_of_changes_goes_where_sgd_goes():
    run_state_machine_as_test(AsSGD, settings=SETTINGS)


def test_any_sequence_of_changes_keeps_the_mass():
    run_state_machine_as_test(Mass, settings=SETTINGS)
