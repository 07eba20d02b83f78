"""The library on a device whose tensors have no contents; `tests/unit/test_second_device.py` runs these files."""
