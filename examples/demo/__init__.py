"""The demo: one model trained with four methods, next to each other.

__main__    where `python -m examples.demo` starts
options     the command line
arguments   types of numbers on a command line, which the benchmarks use too
launch      starts the workers with torchrun, says why they ended early
worker      one process: joins the group, picks its device, trains every method
device      a GPU for each worker, or the CPU for all
training    one run of one method with one seed
methods     the four methods as optimizers of gmc_cuda
text        language model on the standard library's sources
digits      convolutional network on scikit-learn's digits
task        what a task consists of
progress    a bar, or plain lines where there is no terminal
provenance  hardware, versions, date
report      the table and the JSON file
figure      the picture
"""

NAME = "demo"  # before every message
