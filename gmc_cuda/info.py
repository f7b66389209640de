"""`python -m gmc_cuda.info`: how the package was built, what it found here, and whether it works.

Exit status 0 if every check that can run here passed, 1 otherwise.
"""

import os
import platform
import sys

import torch
import torch.distributed as dist

import gmc_cuda
from gmc_cuda._engine.library import build_config


def describe_build() -> list[str]:
    """Lines of text that say how the extension was built."""
    target = f"CUDA {build_config['cuda']}" if build_config["with_cuda"] else "the CPU only"
    lines = [
        f"{build_config['version']} for {target}, torch {build_config['target_torch']} and later "
        f"(headers of {build_config['torch']}), Python {build_config['python']}",
        f"{build_config['compiler']}, C++{build_config['cplusplus'] // 100 % 100}, "
        f"{build_config['cxx_flags']}",
    ]
    if build_config["with_cuda"]:
        lines.append(f"nvcc for {build_config['arch_list']}, {build_config['nvcc_flags']}")
    return lines


def describe_torch() -> list[str]:
    """Lines of text about the torch and the Python that are running."""
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return [
        f"{torch.__version__}, {cuda}; Python {platform.python_version()} on "
        f"{platform.system()} {platform.machine()}",
        f"{torch.get_num_threads()} threads on {os.cpu_count()} cores",
    ]


def describe_distributed() -> list[str]:
    """A line of text with the backends that torch.distributed can use here."""
    if not dist.is_available():
        return ["none: this torch is built without torch.distributed"]
    available = [
        name
        for name in ("gloo", "nccl", "mpi", "ucc")
        if getattr(dist, f"is_{name}_available", lambda: False)()
    ]
    return [", ".join(available) or "none"]


def describe_devices() -> list[str]:
    """Lines of text about the CUDA devices, or why there are none."""
    if not build_config["with_cuda"]:
        seen = torch.cuda.device_count() or "no"
        return [f"{seen} devices visible; this build is for the CPU only and uses none"]
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:  # a torch without CUDA; no driver, no device
        return [f"no device: {str(error).splitlines()[0]}"]
    lines = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        lines.append(
            f"cuda:{index} {device.name}, capability {device.major}.{device.minor}, "
            f"{device.multi_processor_count} multiprocessors, {device.L2_cache_size >> 20} MiB L2"
        )
    return lines


def check_step(device: str) -> str:
    """Compares one step of GMC at density 1/4 with its closed form; returns what is wrong, or "".

    Memory is empty, so v = g: the largest quarter of the gradient is sent and applied, and the
    rest stays in memory. bfloat16 holds all the numbers exactly, so the results must be bit-equal.
    """
    model = torch.nn.Linear(8, 2, bias=False, dtype=torch.float32, device=device)
    before = model.weight.detach().clone()
    x = 2.0 ** torch.arange(-4, 4, dtype=torch.float32, device=device)
    y = torch.tensor([1.0, -3.0], dtype=torch.float32, device=device)
    optimizer = gmc_cuda.GMC(model.parameters(), lr=0.5, momentum=0.9, density=0.25)
    (model(x) * y).sum().backward()
    gradient = torch.outer(y, x)
    optimizer.step()

    threshold = gradient.abs().flatten().topk(4).values.min()
    sent = torch.where(gradient.abs() >= threshold, gradient, 0.0)
    wrong = []
    if not torch.equal(model.weight.detach(), before - 0.5 * sent):
        wrong.append("the parameters are not w - lr * sent")
    if not torch.equal(optimizer.state[model.weight]["memory"], gradient - sent):
        wrong.append("the memory is not what was left unsent")
    return "; ".join(wrong)


def check(device: str) -> tuple[str, bool]:
    """Runs the self-check on a device; returns a line of text, and whether it passed."""
    name = f"one GMC step on {device} against its closed form"
    try:
        wrong = check_step(device)
    except NotImplementedError as error:
        return f"{name}: not available: {str(error).splitlines()[0]}", True
    except Exception as error:  # the report must go on after any error
        wrong = f"{type(error).__name__}: {error}"
    return f"{name}: {'failed: ' + wrong if wrong else 'ok'}", not wrong


def main() -> int:
    """Prints the report; returns the exit status."""
    checks = [check("cpu")]
    if build_config["with_cuda"] and torch.cuda.is_available():
        checks += [check(f"cuda:{index}") for index in range(torch.cuda.device_count())]
    sections = {
        "gmc_cuda": describe_build(),
        "torch": describe_torch(),
        "distributed": describe_distributed(),
        "CUDA": describe_devices(),
        "self-check": [line for line, _ in checks],
    }
    for title, lines in sections.items():
        for number, line in enumerate(lines):
            print(f"{title if number == 0 else '':<12}  {line}")
    passed = all(ok for _, ok in checks)
    print("ok" if passed else "failed")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
