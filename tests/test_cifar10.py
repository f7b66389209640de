"""CIFAR-10's reader on made-up files of its layout, and ResNet-20."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from bench import cifar10  # noqa: E402


class Harmful:
    def __reduce__(self):
        return print, ("this must not run",)


def content(count, seed):
    numbers = numpy.random.default_rng(seed)
    return {
        b"batch_label": b"made up",
        b"labels": numbers.integers(0, 10, count).tolist(),
        b"data": numbers.integers(0, 256, (count, 3072), dtype=numpy.uint8),
        b"filenames": [b"image.png"] * count,
    }


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(cifar10.TRAIN + cifar10.TEST):
        (tmp_path / name).write_bytes(pickle.dumps(content(20, number), protocol=2))
    return tmp_path


@pytest.mark.parametrize("non_iid", [False, True])
def test_load(folder, non_iid):
    tasks = [cifar10.load(rank, 4, non_iid, folder) for rank in range(4)]
    assert sum(len(task.test[1]) for task in tasks) == 20
    images, labels = tasks[0].batch(6, torch.Generator().manual_seed(0))
    assert images.shape == (6, 3, 32, 32) and images.dtype == torch.float32
    assert labels.shape == (6,) and labels.dtype == torch.int64
    again, _ = tasks[0].batch(6, torch.Generator().manual_seed(0))
    assert torch.equal(images, again)
    if non_iid:
        assert max(tasks[0].batch(200, torch.Generator())[1]) < 9
    model = tasks[0].make_model()
    assert model(images).shape == (6, 10)
    assert sum(p.numel() for p in model.parameters()) == 269_722


def test_pixels(folder):
    images, labels = cifar10.read(folder, cifar10.TRAIN)
    first = content(20, 0)
    assert images.shape == (100, 3, 32, 32) and labels[:20].tolist() == first[b"labels"]
    assert images[0, 1, 2, 3] == first[b"data"][0, 1024 + 2 * 32 + 3]


def test_augmented_is_a_shift_and_perhaps_a_mirror():
    image = torch.arange(3 * 32 * 32).remainder(251).to(torch.uint8).view(1, 3, 32, 32)
    padded = torch.nn.functional.pad(cifar10.normalized(image), [cifar10.PAD] * 4)
    windows = [padded[:, :, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
    generator, mirrored = torch.Generator().manual_seed(0), 0
    for _ in range(20):
        made = cifar10.augmented(image, generator)
        straight = any(torch.equal(made, window) for window in windows)
        mirrored += not straight
        assert straight or any(torch.equal(made, window.flip(3)) for window in windows)
    assert 3 < mirrored < 17


def test_wrong_folders(folder, capsys):
    (folder / "data_batch_3").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no file data_batch_3; .*python version"):
        cifar10.load(0, 1, False, folder)
    (folder / "data_batch_3").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(ValueError, match=r"data_batch_3 is damaged: it holds builtins.print"):
        cifar10.load(0, 1, False, folder)
    assert "this must not run" not in capsys.readouterr().out
    (folder / "data_batch_3").write_bytes(pickle.dumps(content(20, 0))[:5000])
    with pytest.raises(ValueError, match=r"data_batch_3 is damaged"):
        cifar10.load(0, 1, False, folder)
    short = content(20, 0)
    short[b"labels"].pop()
    (folder / "data_batch_3").write_bytes(pickle.dumps(short))
    with pytest.raises(ValueError, match=r"images and labels do not match"):
        cifar10.load(0, 1, False, folder)


def test_convergence(folder):
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "convergence.py"), "--task", "cifar10", "--data",
         str(folder), "--fixed", "--steps", "2", "--global-batch", "8", "--seeds", "1",
         "--methods", "dense", "gmc:float4", "--output", str(folder / "results")],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "results").glob("convergence-cifar10-*.json")
    assert str(folder) not in path.read_text()
    methods = {run["method"] for run in json.loads(path.read_text())["results"]}
    assert methods == {"dense", "gmc:float4"}
