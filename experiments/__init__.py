import ctypes
import importlib.util
import os

LAUNCHER = os.getppid()  # who started this process, read before the seconds that imports take

# `import torch` loads torch_npu where it is installed, and fails where CANN is not found. Without it everything else works, and
# `--device npu` says what is missing.
if importlib.util.find_spec("torch_npu") is not None:
    try:
        ctypes.CDLL("libascendcl.so")
    except OSError:
        os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
