"""A pretended CUDA device: tensors that say `cuda:0`, hold CPU numbers and refuse to be mixed with those of the CPU.

Every path of the package runs on it without a GPU. What it records is what a GPU would be asked for: kernel launches,
copies from the host, and *syncs*, at which the host waits for the device.

* `guard.cpp`, `library`: what torch's CPU build lacks for tensors of a CUDA device; loaded before torch.
* `device`: the tensor and the mode that runs and records its operations; `rules`: which of them copy and wait.
* `patches`: the parts of torch.cuda that the package calls.
* `paths`: every path of the package; `steps`: the steps whose budgets `budgets.json` holds; `faults`: planted mistakes.
* `program`: runs all of it in a process of its own and writes what it found as JSON.

Not shown by it: NCCL, streams and races, `torch.compile`, whether an operation has a CUDA kernel, and any time.
"""
