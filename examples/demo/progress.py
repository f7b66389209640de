"""Progress of one method: a bar on a terminal, a few plain lines elsewhere, nothing off rank 0."""

import sys

LINES = 5


class Progress:
    def __init__(self, label: str, total: int, shown: bool) -> None:
        self.label, self.total, self.done = label, total, 0
        self.bar = None
        self.lines = shown and not sys.stderr.isatty()
        if shown and not self.lines:
            from tqdm import tqdm

            self.bar = tqdm(total=total, desc=f"{label:<18}", unit="step", dynamic_ncols=True,
                            bar_format="{desc} {percentage:3.0f}% |{bar}| {n}/{total} "
                            "[{elapsed}<{remaining}{postfix}]")  # fmt: skip

    def step(self, loss: float) -> None:
        """One step done; `loss` is the held-out loss measured last."""
        self.done += 1
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            self.bar.update()
        elif self.lines and self.done * LINES // self.total > (self.done - 1) * LINES // self.total:
            print(f"{self.label}: step {self.done} of {self.total}, loss {loss:.3f}", flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
