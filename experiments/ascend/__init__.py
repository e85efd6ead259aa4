"""The checks that need a real Ascend NPU."""
