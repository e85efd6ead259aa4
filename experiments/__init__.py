import ctypes
import importlib.util
import os

import lumina_fn  # noqa: F401  (from here on Ctrl-C ends a command at once, until it runs)

LAUNCHER = os.getppid()  # who started this process, read before the seconds that imports take

# A rank of torchrun's that is stopped when torchrun dies is woken by the kernel (PR_SET_PDEATHSIG), and then ends by itself.
if "TORCHELASTIC_RUN_ID" in os.environ:
    from experiments.launching import guard

    guard.wake_with_parent()

# `import torch` loads torch_npu where it is installed, and fails where CANN is not found. Without it everything else works, and
# `--device npu` says what is missing.
if importlib.util.find_spec("torch_npu") is not None:
    try:
        ctypes.CDLL("libascendcl.so")
    except OSError:
        os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
