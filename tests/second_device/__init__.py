"""The library on a device whose tensors have no contents; `tests/features/test_second_device.py` runs these files."""
