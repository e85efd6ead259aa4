"""What only an Ascend NPU can show."""
