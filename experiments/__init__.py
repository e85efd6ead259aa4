"""The commands of lumina, and what must be set up before a command imports PyTorch."""

import ctypes
import importlib.util
import os

import lumina_fn  # noqa: F401  (from here until the command runs, Ctrl-C ends the process at once)

LAUNCHER = os.getppid()  # the parent's process id, read before the slow imports, during which the parent may die

# If torchrun dies while this rank is stopped (SIGSTOP), the kernel wakes the rank (PR_SET_PDEATHSIG), which then ends by itself.
if "TORCHELASTIC_RUN_ID" in os.environ:
    from experiments.launching import guard

    guard.wake_with_parent()

# `import torch` also loads torch_npu if it is installed, which fails without CANN. In that case torch_npu is not loaded: other devices
# work, and `--device npu` reports what is missing.
if importlib.util.find_spec("torch_npu") is not None:
    try:
        ctypes.CDLL("libascendcl.so")
    except OSError:
        os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
