import sys

from emulator.delete_barriers import barriers, main

SOURCE = """\
// __syncthreads() in a comment
__global__ void kernel(int* x) {
  __syncthreads();
  const char* text = "__syncthreads()"; /* __syncwarp() */
  if (__syncthreads_or(f(x[0], 1))) __syncwarp(0xffu);
}
"""


def test_each_barrier_is_deleted_once():
    found = list(barriers(SOURCE))
    assert [line for line, _ in found] == [3, 5, 5]
    lines = [text.split("\n")[line - 1].strip() for line, text in found]
    assert lines == [
        "((void)0);",
        "if (((f(x[0], 1)) != 0)) __syncwarp(0xffu);",
        "if (__syncthreads_or(f(x[0], 1))) ((void)0);",
    ]


def test_missed_barriers_are_listed(tmp_path, capsys):
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda" / "kernel.cu").write_text(SOURCE)
    # A command that looks at one of the three alone.
    look = (
        "import os, pathlib, sys; text = pathlib.Path(os.environ['GMC_CUDA_SOURCES'], 'cuda',"
        "'kernel.cu').read_text(); sys.exit('__syncthreads_or' not in text)"
    )
    command = ["--", sys.executable, "-c", look]
    assert main(["--sources", str(tmp_path), *command]) == 1
    printed = capsys.readouterr().out
    assert "3 barriers deleted, 2 missed" in printed
    assert "caught  cuda/kernel.cu:5" in printed
    assert main(["--sources", str(tmp_path), "--only", "kernel.cu:3", *command]) == 1
    assert "1 barriers deleted" in capsys.readouterr().out
