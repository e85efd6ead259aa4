"""Check what only an Ascend NPU can show; say SKIPPED, with the reason, where there is none.

    python -m experiments.npu_check

Exits 0 where it skips, 1 where something failed.
"""

import importlib.util
from collections.abc import Sequence

from lumina_fn import errors


def missing() -> str | None:
    """Why nothing can be checked here, or None where an NPU is."""
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed"
    import torch  # after the check: with torch_npu but without CANN even this import fails

    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is not None and found.type == "npu" else "no NPU is available"


def main(argv: Sequence[str] | None = None) -> int:
    if reason := missing():
        print(f"SKIPPED: {reason}; nothing was checked")
        return 0
    print("FAILED: an NPU is here, but this version has no NPU kernels to check yet (see CHANGELOG.md)")
    return 1


if __name__ == "__main__":
    errors.run(main)
