"""The examples for each stack: they train, save, and resume as if they had not stopped."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gmc_cuda
from gmc_cuda import integrations
from support.scripts import ENVIRONMENT, Scripts

ROOT = Path(__file__).parent.parent
STEPS, SAVED_AT = 30, 20


FRAMEWORKS = {
    "transformers": ("transformers.trainer",),
    "accelerate": ("accelerate",),
    "lightning": ("lightning", "lightning.pytorch", "lightning.fabric"),
    "pytorch_lightning": ("pytorch_lightning",),
    "lightning_fabric": ("lightning_fabric",),
}


# Starts scripts where all of the frameworks that are installed have been imported.
scripts = Scripts(*(
    module for name in FRAMEWORKS if importlib.util.find_spec(name) for module in FRAMEWORKS[name]
))  # fmt: skip


def launch(script, workers, *arguments):
    """Runs an example as torchrun does and returns what it printed."""
    done = scripts.run(ROOT / "examples" / script, *arguments, workers=workers)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def torchrun(script, workers, *arguments):
    """The same by torchrun itself."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={workers}", str(ROOT / "examples" / script), *map(str, arguments),
    ]  # fmt: skip
    done = subprocess.run(
        command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def needs(framework):
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed (pip install gmc_cuda[frameworks])")


def losses(folder):
    return {int(k): v for k, v in json.loads((folder / "losses.json").read_text()).items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "framework,script",
    [
        ("transformers", "trainer.py"),
        ("accelerate", "with_accelerate.py"),
        ("lightning", "with_lightning.py"),
        ("lightning", "with_fabric.py"),
    ],
)
def test_example_trains_saves_and_resumes(framework, script, tmp_path):
    needs(framework)
    run = ("--folder", tmp_path, "--steps", STEPS, "--save-every", SAVED_AT)
    if script == "with_lightning.py":  # which asks for the launcher that it is under
        printed = torchrun(script, 2, *run)
    else:
        printed = launch(script, 2, *run)
    straight = losses(tmp_path)
    assert sorted(straight) == list(range(1, STEPS + 1))
    assert straight[STEPS] < straight[1] - 1.5
    (tmp_path / "losses.json").unlink()
    printed += launch(script, 2, *run, "--resume")
    resumed = losses(tmp_path)
    # Both runs averaged memory when they saved; besides that, stopping must not be seen.
    for step in range(SAVED_AT + 1, STEPS + 1):
        assert abs(resumed[step] - straight[step]) < 1e-3, (step, straight, resumed)
    complaints = re.findall(
        r".*(?:sent the same payload|was saved by rank|gmc_cuda\S*:\d+).*", printed
    )
    assert not complaints, printed


# --------------------------------------------------------------------------------------- float16


@pytest.mark.slow
@pytest.mark.parametrize(
    "package,framework",
    [
        ("transformers", "transformers"),
        ("accelerate", "accelerate"),
        ("lightning", "lightning"),
        ("lightning", "fabric"),
        ("pytorch_lightning", "pytorch_lightning"),
        ("lightning_fabric", "lightning_fabric"),
    ],
)
def test_workers_agree_on_the_scale_that_a_framework_makes(package, framework, tmp_path):
    """Gradients are clipped as well, and rank 1 alone meets an overflow in the third step."""
    needs(package)
    launch("../tests/support/scaled_training.py", 2, framework, tmp_path)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for met in ranks:
        assert all(run["scaler"] == "gmc_cuda.amp.GradScaler" for run in met.values())
        small, large, overflow = met["small scale"], met["large scale"], met["overflow"]
        # Memory holds no scaled value: a power of two as scale is not seen.
        assert {**large, "scale": 1.0} == small
        assert (small["scale"], large["scale"], overflow["scale"]) == (1.0, 256.0, 128.0)
        assert [run["skipped"] for run in (small, large, overflow)] == [0, 0, 1]
        assert all(run["steps"] == 6 for run in met.values())
        if small["scheduled"] is not None:
            assert (small["scheduled"], overflow["scheduled"]) == (6, 5)
        assert overflow["parameters"] != large["parameters"]
    for run in ranks[0]:
        assert ranks[0][run]["parameters"] == ranks[1][run]["parameters"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.amp.GradScaler("cpu", init_scale=8.0),
        lambda: torch.amp.GradScaler("cuda", init_scale=8.0, enabled=False),
        lambda: torch.cpu.amp.GradScaler(init_scale=8.0),
    ],
)
@pytest.mark.filterwarnings("ignore:.*GradScaler:FutureWarning")
def test_a_plain_scaler_becomes_ours_with_the_scale_it_has(make):
    scaler, expected = make(), make()
    integrations.share_scale(scaler, "scaler", "line")
    assert type(scaler) is gmc_cuda.GradScaler
    ours = gmc_cuda.GradScaler("cpu", enabled=scaler.is_enabled())
    assert vars(scaler).keys() == vars(ours).keys()  # no attribute of its class is missing
    assert scaler.get_scale() == expected.get_scale()
    assert scaler.state_dict() == expected.state_dict()
    integrations.share_scale(scaler, "scaler", "line")
    integrations.share_scale(None, "scaler", "line")


def test_a_scaler_of_another_class_is_refused_with_the_line_to_write():
    class Mine(torch.amp.GradScaler):
        pass

    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    for scaler, name in ((Mine("cpu"), "Mine"), (ShardedGradScaler("cpu"), "ShardedGradScaler")):
        with pytest.raises(TypeError, match=rf"trainer.scaler: got .*\.{name}, must be") as error:
            integrations.share_scale(scaler, "trainer.scaler", "Trainer(scaler=...)")
        assert str(error.value).endswith("Write\n    Trainer(scaler=...)")

    class OfOurs(gmc_cuda.GradScaler):
        pass

    own = OfOurs("cpu")
    integrations.share_scale(own, "scaler", "line")
    assert type(own) is OfOurs


def test_the_optimizer_is_found_in_wrappers_that_take_its_class():
    model = torch.nn.Linear(2, 2)
    own = gmc_cuda.GMC(model.parameters(), lr=0.1)

    class Wraps:
        def __init__(self, optimizer, attribute):
            setattr(self, attribute, optimizer)

    class Imitates:  # as Lightning's and Fabric's
        def __init__(self, optimizer):
            self._optimizer = optimizer
            self.__class__ = type("Lightning", (Imitates, type(optimizer)), {})

    local = gmc_cuda.LocalUpdates(torch.optim.AdamW(model.parameters()), every=2)
    for optimizer in (own, local):
        assert integrations.unwrap(optimizer) is optimizer
        assert integrations.unwrap(Wraps(optimizer, "optimizer")) is optimizer
        assert integrations.unwrap(Imitates(optimizer)) is optimizer
        assert integrations.unwrap(Wraps(Imitates(optimizer), "optimizer")) is optimizer
    sgd = torch.optim.SGD(model.parameters())
    for foreign in (sgd, Wraps(sgd, "optimizer"), Imitates(sgd), None, 3, {"optimizer": own}):
        assert integrations.unwrap(foreign) is None


# ------------------------------------------------------------------------------------ wrong uses

OVERLAP = (
    "with overlap=True, which sends gradients during each backward pass, so that they can be "
    "neither clipped nor accumulated. Write\n    gmc_cuda.GMC(..., overlap=False)\nor leave"
)
TWICE = (
    "the model is inside DistributedDataParallel, which averages the gradients before this "
    "optimizer sees them: everything would be sent twice, and compressed after the averaging. "
    "Leave DDP out, or write, once, right after the model is wrapped:\n"
    "    gmc_cuda.local_gradients(ddp_model)\n"
    "In Trainer, Accelerate, Lightning and Fabric gmc_cuda.integrations does it."
)
ALONE = (
    "the checkpoint of step 2 has rank 0's memory only: what the other workers had not sent is not "
    "in it. A callback requested it after GMCCallback: add that one before\n"
    "    trainer.add_callback(GMCCallback(trainer))",
    "this optimizer is rank 1 of 2, but the state was saved by rank 0 of 2: what other ranks had "
    "not sent is lost, and what this one had counts more than once. Call "
    "optimizer.average_memory_() on all ranks before saving, let each rank save and load its own "
    "state, or use gmc_cuda.checkpoint",
)

AT_A_SIGNAL = (
    "enable_jit_checkpoint: got True, must be False on several workers: its checkpoint would have "
    "rank 0's memory only, without what the other workers had not sent. Write\n"
    "    TrainingArguments(..., enable_jit_checkpoint=False)"
)
ANOTHER = (
    "got SGD, must be a GMC, DGC, LocalUpdates or NodeAverage: DistributedDataParallel leaves the "
    "gradients to the optimizer here, and with another one the workers would train apart. Write\n"
)
LINES = {
    "transformers": 'optimizer_cls_and_kwargs=(gmc_cuda.GMC, {"lr": 0.1})',
    "accelerate": "optimizer = gmc_cuda.GMC(model.parameters(), lr=0.1)",
    "lightning": "return gmc_cuda.GMC(self.parameters(), lr=0.1)",
    "fabric": "optimizer = gmc_cuda.GMC(model.parameters(), lr=0.1)",
}
OPTIMIZERS = {
    "transformers": "the Trainer's optimizer",
    "accelerate": "the optimizer given to accelerator.prepare()",
    "lightning": "configure_optimizers",
    "fabric": "the optimizer given to fabric.setup()",
}
EARLY = (
    "accelerator: it has prepared no optimizer. Write, in this order,\n"
    "    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)\n"
    "    leave_gradients_to_optimizer(accelerator, model)"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "framework,how",
    [
        (framework, how)
        for framework in ("transformers", "accelerate", "lightning", "fabric")
        for how in ("communicates", "clips", "accumulates", "takes another optimizer")
    ]
    + [("lightning", "clips by hand")]
    + [("transformers", "saves alone"), ("transformers", "saves the best")]
    + [("transformers", "saves at a signal")]
    + [("accelerate", "saves alone"), ("accelerate", "comes too early")]
    + [("accelerate", "names no model"), ("fabric", "saves alone")],
)
def test_wrong_use_is_refused_with_the_line_to_write(framework, how, tmp_path):
    """tests/support/wrong_uses.py does it and prints what it met."""
    needs("lightning" if framework == "fabric" else framework)
    names = {
        "transformers": ("max_grad_norm", "gradient_accumulation_steps"),
        "accelerate": ("accelerator.clip_grad_norm_", "gradient_accumulation_steps"),
        "lightning": ("gradient_clip_val", "accumulate_grad_batches"),
        "fabric": ("max_norm", ""),
    }
    clips, accumulates = (
        f"ValueError: {name}: got {value} {OVERLAP} {name} out"
        for name, value in zip(names[framework], (1.0, 2), strict=True)
    )
    another = (
        f"{OPTIMIZERS[framework]}: {ANOTHER}    {LINES[framework]}\n"
        "or leave gmc_cuda.integrations out"
    )
    expected = {
        "communicates": f"RuntimeError: {TWICE}",
        "clips": clips,
        "clips by hand": clips,
        "accumulates": "nothing" if framework == "fabric" else accumulates,
        "takes another optimizer": f"ValueError: {another}",
        "comes too early": f"ValueError: {EARLY}",
        "saves alone": f"UserWarning: {ALONE[framework != 'transformers']}",
        "saves at a signal": f"UserWarning: {AT_A_SIGNAL}",
        "saves the best": "nothing",
        "names no model": "nothing",
    }[how]
    times = 1 if how == "saves alone" and framework != "transformers" else 2  # by rank 1 only
    said = launch("../tests/support/wrong_uses.py", 2, framework, how, tmp_path)
    assert re.findall(r"^met (.*?) end$", said, re.M | re.S) == [expected] * times, said


# ----------------------------------------------------------------------------------------- FSDP2

NODES, PER_NODE = 2, 2


def fsdp2(folder, *arguments):
    run = ("--folder", folder, "--per-node", PER_NODE, "--save-every", SAVED_AT)
    launch("fsdp2.py", NODES * PER_NODE, *run, *arguments)
    return losses(folder)


@pytest.mark.slow
def test_fsdp2_trains_saves_and_resumes(tmp_path):
    straight = fsdp2(tmp_path, "--steps", STEPS)
    assert sorted(straight) == list(range(1, STEPS + 1))
    assert straight[STEPS] < straight[1] - 1.5
    resumed = fsdp2(tmp_path, "--steps", STEPS, "--resume")
    assert resumed == {step: straight[step] for step in range(SAVED_AT + 1, STEPS + 1)}


def test_fsdp2_at_density_1_is_dense_momentum_sgd(tmp_path):
    """In one process: each node's gradient is clipped, then their mean is stepped with."""
    spec = importlib.util.spec_from_file_location("fsdp2", ROOT / "examples" / "fsdp2.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    size, steps, data = NODES * PER_NODE, 8, example.windows()
    model = example.make_model()
    sgd = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5)
    expected = {}
    for step in range(1, steps + 1):
        nodes, expected[step] = [], 0.0
        for node in range(NODES):
            sgd.zero_grad()
            for rank in range(PER_NODE * node, PER_NODE * (node + 1)):
                for part in range(4):
                    x = example.batch(data, step, part, rank, size)
                    loss = torch.nn.functional.cross_entropy(model(x[:, :-1]), x[:, -1])
                    (loss / 4 / PER_NODE).backward()
                    expected[step] += loss.item() / 4 / size
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            nodes.append([p.grad.clone() for p in model.parameters()])
        for p, *gradients in zip(model.parameters(), *nodes, strict=True):
            p.grad = torch.stack(gradients).mean(0)
        sgd.step()
    got = fsdp2(tmp_path, "--steps", steps, "--density", 1)
    assert got == pytest.approx(expected, abs=1e-4)
