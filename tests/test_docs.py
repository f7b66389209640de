"""What README and the pages of docs/ say is so: their programs run, their links lead somewhere."""

import contextlib
import datetime
import functools
import inspect
import json
import os
import re
import statistics
import time
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import gmc_cuda
from support.problems import same_on_all_ranks

ROOT = Path(__file__).parent.parent
OUTSIDE = {"build", "dist", "demo-output"}  # folders without pages; hidden ones too
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for pattern in ("*.md", "*/*.md", "tests/*/*.md")
    for path in sorted(ROOT.glob(pattern))
    if not (path.relative_to(ROOT).parts[0].startswith(".") or path.parts[-2] in OUTSIDE)
}
README = PAGES["README.md"]
WHOLE_PROGRAM = "Train on several workers"  # test_minimal.py runs it
EQUATIONS = "top_k(v)"  # test_the_three_lines_are_gmc runs them
ON_A_GPU = 'device="cuda"'  # test_optim_cuda.py does what these blocks do


def blocks():
    """Name of a Python block, by its page, section and number there -> its code.

    Of a diff it is what stands there afterwards.
    """
    found: dict[str, str] = {}
    for page, text in PAGES.items():
        heading, number = "", 0
        parts = re.findall(r"^#+ ([^\n]*)$|^```(python|diff)\n(.*?)^```$", text, re.M | re.S)
        for title, language, code in parts:
            if title:
                heading, number = title, 0
                continue
            number += 1
            found[f"{page}#{anchor(heading)} {number}"] = (
                side(code, "+") if language == "diff" else code
            )
    return found


def side(diff, sign):
    """The lines of a diff that are on this side of it."""
    return "".join(line[1:] for line in diff.splitlines(True) if line[0] in (" ", sign))


def anchor(heading):
    """The part of a link after #, as hosts of Markdown make it."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def example_of(code):
    """The program in examples/ that a framework's block is taken from."""
    module = re.match(r"from gmc_cuda\.integrations\.(\w+) import", code)
    names = {"transformers": "trainer.py", "accelerate": "with_accelerate.py"}
    return names.get(module[1], f"with_{module[1]}.py") if module else None


BLOCKS = blocks()
OF_FRAMEWORKS = [name for name, code in BLOCKS.items() if example_of(code)]
TO_RUN = [
    name
    for name, code in BLOCKS.items()
    if not (name in OF_FRAMEWORKS or WHOLE_PROGRAM in code or EQUATIONS in code or ON_A_GPU in code)
]


def run(group, code, folder):
    """Returns whether the block trained the model; where it makes an optimizer, that must train."""
    rank = dist.get_rank(group)
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(6, 20), torch.nn.BatchNorm1d(20), torch.nn.ReLU(), torch.nn.Linear(20, 3)
    )
    optimizer = gmc_cuda.GMC(model.parameters(), lr=0.1, density=0.1)
    torch.manual_seed(1 + rank)
    names = {
        "torch": torch,
        "contextlib": contextlib,
        "datetime": datetime,
        "functools": functools,
        "time": time,
        "gmc_cuda": gmc_cuda,
        "device": torch.device("cpu"),
        "rank": rank,
        "nodes": 2,
        "per_node": 2,
        "model": model,
        "loader": [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(4)],
        "loss_fn": torch.nn.functional.cross_entropy,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 10),
        "step": 7,
    }
    if "fully_shard" not in code:  # which takes a model without gradients
        for x, y in names["loader"][:1]:
            names["loss_fn"](model(x), y).backward()
    before = weights(model)
    at_home = os.getcwd()
    os.chdir(folder)
    try:
        exec(code, names)
    finally:
        os.chdir(at_home)
    trained = not torch.equal(before, weights(model))
    if names["optimizer"] is not optimizer:
        before = weights(model)
        for x, y in names["loader"]:
            names["optimizer"].zero_grad()
            names["loss_fn"](names.get("ddp_model", model)(x), y).backward()
            names["optimizer"].step()
        after = weights(model)
        assert after.isfinite().all()
        assert not torch.equal(before, after)
        if isinstance(names["optimizer"], gmc_cuda.LocalUpdates):
            names["optimizer"].synchronize()
        assert same_on_all_ranks(group, [weights(model)])
    return trained


def weights(model):
    return torch.cat([getattr(p, "full_tensor", lambda p=p: p)().detach().reshape(-1).clone()
                      for p in model.parameters()])  # fmt: skip


@pytest.mark.parametrize("name", TO_RUN)
def test_block(pool, name, tmp_path):
    # The workers of the tests have been through this already.
    code = BLOCKS[name].replace("torch.distributed.init_process_group(", "dict(")
    # What inductor would add takes minutes.
    code = code.replace("torch.compile(model)", 'torch.compile(model, backend="aot_eager")')
    trains = "optimizer.step()" in code or "scaler.step(" in code
    assert pool.run(4, run, code, str(tmp_path)) == [trains] * 4


def test_every_block_compiles():
    for name, code in BLOCKS.items():
        compile(code, name, "exec")


@pytest.mark.parametrize("name", OF_FRAMEWORKS)
def test_block_of_a_framework_is_taken_from_its_example(name):
    """test_integrations.py runs the examples, where the frameworks are installed."""
    rest = iter((ROOT / "examples" / example_of(BLOCKS[name])).read_text().splitlines())
    rest = iter([line.strip() for line in rest])
    for line in filter(None, map(str.strip, BLOCKS[name].splitlines())):
        assert line in rest, f"{line!r} does not follow in examples/{example_of(BLOCKS[name])}"


def three_lines(group, code):
    """README's equations and GMC, side by side: the largest difference of the weights."""
    workers, momentum, lr = 2, 0.9, 0.1

    def top_k(v):
        kept = torch.zeros_like(v)
        places = v.abs().topk(40).indices
        kept[places] = v[places]
        return kept

    def all_reduce(tensor):
        dist.all_reduce(tensor, group=group)
        return tensor

    names = {"memory": torch.zeros(400), "a": torch.zeros(400), "momentum": momentum}
    names |= {"workers": workers, "top_k": top_k, "all_reduce": all_reduce}
    weight, param = torch.zeros(400), torch.nn.Parameter(torch.zeros(400))
    optimizer = gmc_cuda.GMC(
        [param], lr, momentum=momentum, density=0.1, wire_dtype=torch.float32, process_group=group
    )
    torch.manual_seed(dist.get_rank(group))
    for _ in range(20):
        param.grad = torch.randn(400)
        names["grad"] = param.grad.clone()
        exec(code, names)
        weight -= lr * names["a"]
        optimizer.step()
    return (weight - param.detach()).abs().max().item()


def test_the_three_lines_are_gmc(pool):
    (code,) = [code for code in BLOCKS.values() if EQUATIONS in code]
    assert len(code.strip().splitlines()) == 3
    assert max(pool.run(2, three_lines, code)) < 1e-5


def test_the_side_of_the_diff_that_goes_is_a_program():
    for diff in re.findall(r"^```diff\n(.*?)^```$", README, re.M | re.S):
        compile(side(diff, "-"), "README.md", "exec")


def test_every_stack_has_a_block():
    """The links of the table of stacks lead to sections with code."""
    (table,) = re.findall(r"^\| your stack .*?\n\n", README, re.M | re.S)
    rows = table.strip().splitlines()[2:]
    assert len(rows) == 12
    with_code = {name.rpartition(" ")[0] for name in BLOCKS}
    for row in rows:
        target = re.findall(r"\]\(([^)]*#[^)]*)\)", row)
        assert len(target) == 1, row
        assert target[0] in with_code, row


def test_every_section_with_a_promise_has_code():
    promised = {"using.md#gradient-clipping", "using.md#non-finite-gradients"}
    promised |= {"using.md#mixed-precision", "using.md#overlap-with-the-backward-pass"}
    promised |= {"tuning.md#does-it-pay", "tuning.md#coming-from-dense-sgd"}
    promised |= {"checkpoints.md#save", "checkpoints.md#resume-also-on-other-workers"}
    promised |= {"checkpoints.md#lost-workers-and-time-outs", "kernels.md#a-step-by-hand"}
    assert {f"docs/{section}" for section in promised} <= {n.rpartition(" ")[0] for n in BLOCKS}


def test_the_whole_program_is_examples_minimal():
    assert (ROOT / "examples" / "minimal.py").read_text() in PAGES["docs/using.md"]


def test_the_table_of_names_has_every_argument():
    def arguments(function):
        parameters = inspect.signature(function).parameters
        return [name for name in parameters if name not in ("args", "wait", "keep", "name")]

    page = PAGES["docs/api.md"]
    (row,) = re.findall(r"^\| `GMC\((.*?)\)`", page, re.MULTILINE)
    assert row.replace("*, ", "").split(", ") == arguments(gmc_cuda.GMC)
    (row,) = re.findall(r"^\| `DGC\(\.\.\.\)` (.*?) \|", page, re.MULTILINE)
    without, plus = (re.findall(r"`(\w+)`", part) for part in row.split("plus"))
    assert set(arguments(gmc_cuda.DGC)) == set(arguments(gmc_cuda.GMC)) - set(without) | set(plus)
    others = ["broadcast_buffers", "DensityWarmup", "local_gradients", "GMCHookState"]
    others += ["NodeAverage", "LocalUpdates", "checkpoint.save"]
    for name in others:
        (row,) = re.findall(rf"`{re.escape(name)}\((.*?)\)`", page)
        listed = [argument.split("=")[0] for argument in row.replace("*, ", "").split(", ")]
        function = functools.reduce(getattr, name.split("."), gmc_cuda)
        assert listed == arguments(function), name


def test_the_api_has_every_public_name():
    page = PAGES["docs/api.md"]
    missing = [name for name in gmc_cuda.__all__ if f"gmc_cuda.{name}\n" not in page]
    assert not missing


def test_the_table_of_operators_names_operators():
    (table,) = re.findall(r"^\| operator .*?\n\n", PAGES["docs/kernels.md"], re.M | re.S)
    rows = table.strip().splitlines()[2:]
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert len(names) > 10
    assert [name for name in names if name not in gmc_cuda.ops.__all__] == []


def test_readme_is_short():
    assert len(README.split()) <= 1500


def newest(benchmark):
    """The content of the newest file of results of this name."""
    dated = sorted((ROOT / "benchmarks" / "results").glob(f"{benchmark}-????-??-??.json"))
    return json.loads(max(dated, key=lambda path: path.stem[-10:]).read_text())


def test_the_figures_of_the_readme_are_those_of_the_files():
    steps, losses = newest("network-amd-epyc"), newest("time-to-loss-*")
    ms = {(r["method"], r["rate_mbit"]): round(1e3 * r["step"]["median"]) for r in steps["results"]}
    to_loss = {(r["method"], r["rate_mbit"]): r["seconds"] for r in losses["seconds"]}
    last = {r["method"]: r["losses"][-1] for r in losses["training"]}
    assert losses["options"]["target"] == 1.9
    names = ["DDP", "PowerSGD rank 4", "GMC two-sided float4", "DGC two-sided float4"]
    table = rows_of("README.md", "| method | ms a step")
    for method, row in zip(names, table.values(), strict=True):
        seconds = to_loss[method, 100]
        shown = [ms[method, 1000], ms[method, 100]]
        shown += ["not reached" if seconds is None else round(seconds), f"{last[method]:.3f}"]
        assert row == list(map(str, shown)), method
    text = " ".join(README.split())
    assert (
        f"{ms['GMC two-sided float4', 100]} ms with GMC, and in {ms['DDP', 100]} ms with DDP"
        in text
    )
    alone = {r["rate_mbit"]: round(1e3 * r["compute_alone"]) for r in steps["results"]
             if r["method"] == "GMC"}  # fmt: skip
    assert f"{alone[1000]} ms at 1 Gbit/s and {alone[100]} ms" in text


def rows_of(page, header):
    """Cells of the table whose header begins so, by the first cell of each row."""
    (table,) = re.findall(rf"^{re.escape(header)}.*?\n\n", PAGES[page], re.M | re.S)
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.split("\n")[2:-2]]
    return {row[0]: row[1:] for row in cells}


def losses_at_their_best(content):
    """For each method: the loss with its spread over the seeds, momentum and learning rate."""
    shown = {}
    for method, best in content["best"].items():
        seeds = content["seeds"]["compared"]
        losses = [run["loss"] for run in content["results"] if run["method"] == method
                  and run["seed"] in seeds
                  and best == {"momentum": run["momentum"], "lr": run["lr"]}]  # fmt: skip
        assert len(losses) == len(seeds)
        spread = f"{statistics.mean(losses):.3f} ± {statistics.stdev(losses):.3f}"
        shown[method] = f"{spread} ({best['momentum']:g}, {best['lr']:.2g})"
    return shown


def test_the_losses_at_equal_bytes_are_those_of_the_files():
    columns = [losses_at_their_best(newest(f"convergence-{task}-amd-epyc"))
               for task in ("text", "digits", "digits-non-iid")]  # fmt: skip
    table = rows_of("docs/results.md", "| | entries sent")
    assert [row[1:] for row in table.values()] == [
        [column[method] for column in columns] for method in columns[0]
    ]


@pytest.mark.parametrize(
    ("header", "tasks", "workers"),
    [
        ("| | text, 4 workers |", ["text"], [4, 8, 16]),
        ("| | digits, all", ["digits", "digits-non-iid"], [4, 8, 16]),
    ],
)
def test_the_losses_at_equal_bytes_on_a_link_are_those_of_the_files(header, tasks, workers):
    machine = {("text", 4): "intel-xeon-processor"}
    columns = [losses_at_their_best(
        newest(f"convergence-{task}-{p}-workers-{machine.get((task, p), 'amd-epyc')}"))
               for task in tasks for p in workers]  # fmt: skip
    names = {
        "dense momentum SGD": "dense",
        "GMC, two-sided": "gmc:float4:reduce_scatter",
        "GMC, two-sided, memory grows": "growing:float4:reduce_scatter",
        "DGC, two-sided": "dgc:float4:reduce_scatter",
        "memory SGD, two-sided": "memsgd:float4:reduce_scatter",
        "PowerSGD rank 4": "powersgd",
        "GMC, all-gather": "gmc:float4",
        "DGC, all-gather": "dgc:float4",
    }
    table = rows_of("docs/results.md", header)
    assert table == {
        name: [column.get(method, "") for column in columns]
        for name, method in names.items()
        if any(method in column for column in columns)
    }


def test_the_losses_of_a_larger_model_are_those_of_the_file():
    found = losses_at_their_best(newest("convergence-text-4-workers-272-wide-1800-steps-*"))
    names = ("dense momentum SGD", "GMC, two-sided", "GMC, two-sided, memory grows",
             "DGC, two-sided")  # fmt: skip
    table = rows_of("docs/results.md", "| | text, 4 workers, larger |")
    assert table == {name: [cell] for name, cell in zip(names, found.values(), strict=True)}


def test_the_losses_of_a_search_with_two_seeds_are_those_of_the_file():
    found = losses_at_their_best(newest("convergence-text-4-workers-amd-epyc"))
    dense, gmc, growing, dgc = found.values()
    text = " ".join(PAGES["docs/results.md"].split())
    said = f"{dense} for dense SGD, {gmc} for GMC, {growing} if its memory grows and {dgc} for DGC"
    assert said in text


def test_the_loss_at_1000_times_fewer_bytes_is_that_of_the_file():
    gmc, dgc = (losses_at_their_best(newest(f"convergence-text-4-workers-1000-times-{machine}"))
                for machine in ("amd-epyc", "intel-xeon-processor"))  # fmt: skip
    text = " ".join(PAGES["docs/results.md"].split())
    assert (
        f"two-sided GMC ends at {gmc['gmc:float4:reduce_scatter']} on text with 4 workers and DGC "
        f"at {dgc['dgc:float4:reduce_scatter']}, "
    ) in text


@pytest.mark.parametrize(("header", "files", "machines"), [
    ("| outer optimizer", "local-updates-120-rounds-of-20-{}", ["amd-epyc"]),
    ("| outer optimizer of 24 rounds", "local-updates-24-rounds-of-100-{}",
     ["intel-xeon-processor", "amd-epyc"]),
])  # fmt: skip
def test_the_outer_optimizers_are_those_of_the_files(header, files, machines):
    shown = {}
    for run in chain.from_iterable(newest(files.format(name))["results"] for name in machines):
        options = [run["lr"], run["momentum"], run.get("memory_decay", 1), run.get("step_ahead", 0)]
        shown[f"{run['name']} ({', '.join(f'{option:g}' for option in options)})"] = [
            f"{run['loss']:.3f}",
            f"{run['link_ratio']:.0f}",
            f"{run['bytes_sent'] / 1e6:.1f} MB",
        ]
    options = "(lr, momentum, memory decay, step_ahead)"
    header = f"{header} {options} | loss | fewer bytes | handed to collectives |"
    assert rows_of("docs/results.md", header) == shown


def test_the_outer_optimizers_of_two_seeds_are_those_of_the_files():
    files = ["local-updates-120-rounds-of-20-amd-epyc", "local-updates-120-rounds-of-20-seed-1-*"]
    best = [("dense Nesterov", 0.7, 0), ("SparseLoCo 5 %, two-sided", 3.0, 1)]
    losses = [
        {(run["name"], run["lr"], run.get("step_ahead", 0)): f"{run['loss']:.3f}"
         for run in newest(file)["results"]} for file in files
    ]  # fmt: skip
    assert rows_of("docs/results.md", "| seed | dense Nesterov") == {
        str(seed): [of_seed[way] for way in best] for seed, of_seed in enumerate(losses)
    }


def steps_over_a_network(content):
    """For each method: ms and times compute alone, from the highest rate to the lowest."""
    shown: dict[str, list[str]] = {}
    for run in content["results"]:
        estimated = "*" if run["estimated"] else ""
        ms, ratio = 1e3 * run["step"]["median"], run["times_compute_alone"]["median"]
        shown.setdefault(run["method"], []).append(f"{ms:.0f}{estimated} ({ratio:.3g})")
    return shown


def test_the_steps_over_a_network_are_those_of_the_file():
    shown = steps_over_a_network(newest("network-amd-epyc"))
    assert (
        rows_of("docs/results.md", "| | 10 Gbit/s | 1 Gbit/s | 100 Mbit/s | 10 Mbit/s |\n") == shown
    )


def test_the_steps_of_eight_workers_are_those_of_the_file():
    content = newest("network-8-workers-*")
    shown = steps_over_a_network(content)
    sent = {run["method"]: f"{run['link_bytes'] / 1e6:.3g} MB"
            for run in content["results"] if run["rate_mbit"] == 100}  # fmt: skip
    rates = "| | 10 Gbit/s | 1 Gbit/s | 100 Mbit/s | 10 Mbit/s |"
    table = rows_of("docs/results.md", f"{rates} sent by a worker at 100 Mbit/s |")
    assert table == {method: [*cells, sent[method]] for method, cells in shown.items()}


def test_the_steps_with_a_delay_are_those_of_the_files():
    columns = [steps_over_a_network(newest(f"network-{ms}-ms-*")) for ms in ("0", "0.1", "20")]
    assert rows_of("docs/results.md", "| | no delay |") == {
        method: [cell for column in columns for cell in column[method]] for method in columns[0]
    }


def test_the_advice_is_that_of_the_file():
    shown: dict[str, list[str]] = {}
    for run in newest("advice-*")["results"]:
        estimated = "*" if run["estimated"] else ""
        said = f"{1e3 * run['said']:.0f}{estimated}, {1e3 * run['took']:.0f}"
        shown.setdefault(run["method"], []).append(said)
    assert rows_of("docs/results.md", "| | 4 workers, 1 Gbit/s |") == shown


def test_the_times_to_a_loss_are_those_of_the_file():
    content = newest("time-to-loss-*")
    shown = {run["method"]: [f"{run['losses'][-1]:.3f}"] for run in content["training"]}
    for run in content["seconds"]:
        seconds = run["seconds"]
        shown[run["method"]].append("not reached" if seconds is None else f"{seconds:.0f}")
    assert rows_of("docs/results.md", "| | loss after") == shown


def links(page):
    prose = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.M | re.S)
    return re.findall(r"\]\(([^)\s]+)\)", prose)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    wrong = []
    for link in links(page):
        if link.startswith("https://"):
            continue
        path, _, section = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        # A folder is no page of the site.
        found = target.is_file()
        if found and section:
            text = PAGES[str(target.resolve().relative_to(ROOT))]
            found = section in map(anchor, re.findall(r"^#+ (.*)$", text, re.M))
        if not found:
            wrong.append(link)
    assert not wrong


def test_make_has_the_targets_that_the_pages_name():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page, text in PAGES.items():
        in_code = re.findall(r"`(?:sudo )?make ([a-z-]+)", text) + re.findall(
            r"^ *(?:sudo )?make ([a-z-]+)", "".join(re.findall(r"```sh\n.*?```", text, re.S)), re.M
        )
        assert set(in_code) <= targets, page
