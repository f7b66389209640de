"""Byte-level language model on the sources of the Python standard library.

Every Python has them, so nothing is downloaded. They differ between versions: a loss is comparable
within one run, not between machines with different Pythons.
"""

import platform
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.demo.task import Task, split

MAX_BYTES = 4_000_000
TEST_EVERY = 10  # every tenth file is held out
TEST_WINDOWS = 256
CONTEXT, WIDTH, HEADS, LAYERS = 64, 128, 4, 2


def load(rank: int, world: int, non_iid: bool) -> Task:
    train, test, files = read_sources()
    if non_iid:
        part = split(len(train), rank, world)
        first, last = part.start, part.stop
    else:
        # Each worker draws windows from all of the text, at its own random places.
        first, last = 0, len(train)
    starts = torch.linspace(0, len(test) - CONTEXT - 1, TEST_WINDOWS).long()
    starts = starts[split(TEST_WINDOWS, rank, world)]

    def batch(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return _windows(
            train, torch.randint(first, last - CONTEXT - 1, (size,), generator=generator)
        )

    return Task(
        title="Text: byte-level transformer on the Python standard library",
        data=f"Python {platform.python_version()} standard library, {files} files: "
        f"{len(train) / 1e6:.2f} MB to train on, {len(test) / 1e6:.2f} MB held out",
        make_model=Transformer,
        batch=batch,
        test=_windows(test, starts),
        unit="next byte",
    )


def read_sources() -> tuple[Tensor, Tensor, int]:
    """(training text, held-out text) as uint8 tensors, and the number of files read."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts, total = [], 0
    for path in sorted(folder.glob("*.py")):
        if path.name.startswith("_sysconfigdata"):  # made by the build, different on every machine
            continue
        text = path.read_bytes()
        if total + len(text) > MAX_BYTES:
            break
        texts.append(text)
        total += len(text)
    if total < 200_000:
        raise FileNotFoundError(
            f"found only {total} bytes of Python sources in {folder}; this Python comes without "
            "its standard library's sources: use --task digits, or another Python"
        )
    test = b"".join(texts[TEST_EVERY - 1 :: TEST_EVERY])
    train = b"".join(text for i, text in enumerate(texts) if i % TEST_EVERY != TEST_EVERY - 1)
    as_tensor = lambda text: torch.frombuffer(bytearray(text), dtype=torch.uint8)  # noqa: E731
    return as_tensor(train), as_tensor(test), len(texts)


def _windows(text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    windows = text[starts[:, None] + torch.arange(CONTEXT + 1)].long()
    return windows[:, :-1], windows[:, 1:]


class Transformer(nn.Module):
    """Decoder-only, pre-norm; int64 [batch, context] -> logits [batch, context, 256]."""

    def __init__(self, width: int = WIDTH, layers: int = LAYERS) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.places = nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256, bias=False)
        for embedding in (self.bytes, self.places):
            nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bytes(x) + self.places.weight[: x.shape[1]]
        return self.head(self.norm(self.blocks(x)))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))
