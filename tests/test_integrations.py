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

ROOT = Path(__file__).parent.parent
STEPS, SAVED_AT = 30, 20


def torchrun(script, workers, *arguments):
    """Runs an example and returns what it printed, without what torchrun says itself."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={workers}", str(ROOT / "examples" / script), *map(str, arguments),
    ]  # fmt: skip
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def needs(framework):
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed (pip install gmc_cuda[frameworks])")


def losses(folder):
    return {int(k): v for k, v in json.loads((folder / "losses.json").read_text()).items()}


@pytest.mark.parametrize(
    "framework,script",
    [
        ("transformers", "trainer.py"),
        ("accelerate", "with_accelerate.py"),
        ("lightning", "with_lightning.py"),
    ],
)
def test_example_trains_saves_and_resumes(framework, script, tmp_path):
    needs(framework)
    run = ("--folder", tmp_path, "--steps", STEPS, "--save-every", SAVED_AT)
    printed = torchrun(script, 2, *run)
    straight = losses(tmp_path)
    assert sorted(straight) == list(range(1, STEPS + 1))
    assert straight[STEPS] < straight[1] - 1.5
    (tmp_path / "losses.json").unlink()
    printed += torchrun(script, 2, *run, "--resume")
    resumed = losses(tmp_path)
    # Both runs averaged memory when they saved; besides that, stopping must not be seen.
    for step in range(SAVED_AT + 1, STEPS + 1):
        assert abs(resumed[step] - straight[step]) < 1e-3, (step, straight, resumed)
    complaints = re.findall(
        r".*(?:sent the same payload|was saved by rank|gmc_cuda\S*:\d+).*", printed
    )
    assert not complaints, printed


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
    "In Trainer, Accelerate and Lightning gmc_cuda.integrations does it."
)
ALONE = (
    "the checkpoint of step 2 has rank 0's memory only: what the other workers had not sent is not "
    "in it. A callback asked for it after GMCCallback: add that one before\n"
    "    trainer.add_callback(GMCCallback(trainer))",
    "this optimizer is rank 1 of 2, but the state was saved by rank 0 of 2: what other ranks had "
    "not sent is lost, and what this one had counts more than once. Call "
    "optimizer.average_memory_() on all ranks before saving, let each rank save and load its own "
    "state, or use gmc_cuda.checkpoint",
)


@pytest.mark.parametrize(
    "framework,how",
    [
        (framework, how)
        for framework in ("transformers", "accelerate", "lightning")
        for how in ("communicates", "clips", "accumulates")
    ]
    + [("transformers", "saves alone"), ("transformers", "saves the best")]
    + [("accelerate", "saves alone")],
)
def test_wrong_use_is_refused_with_the_line_to_write(framework, how, tmp_path):
    """tests/wrong_uses.py does it and prints what it met."""
    needs(framework)
    names = {
        "transformers": ("max_grad_norm", "gradient_accumulation_steps"),
        "accelerate": ("accelerator.clip_grad_norm_", "gradient_accumulation_steps"),
        "lightning": ("gradient_clip_val", "accumulate_grad_batches"),
    }
    clips, accumulates = (
        f"{name}: got {value} {OVERLAP} {name} out"
        for name, value in zip(names[framework], (1.0, 2), strict=True)
    )
    expected = {
        "communicates": f"RuntimeError: {TWICE}",
        "clips": f"ValueError: {clips}",
        "accumulates": f"ValueError: {accumulates}",
        "saves alone": f"UserWarning: {ALONE[framework == 'accelerate']}",
        "saves the best": "nothing",
    }[how]
    times = 1 if (framework, how) == ("accelerate", "saves alone") else 2  # by rank 1 only
    said = torchrun("../tests/wrong_uses.py", 2, framework, how, tmp_path)
    assert re.findall(r"^met (.*?) end$", said, re.M | re.S) == [expected] * times, said


# ----------------------------------------------------------------------------------------- FSDP2

NODES, PER_NODE = 2, 2


def fsdp2(folder, *arguments):
    run = ("--folder", folder, "--per-node", PER_NODE, "--save-every", SAVED_AT)
    torchrun("fsdp2.py", NODES * PER_NODE, *run, *arguments)
    return losses(folder)


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
