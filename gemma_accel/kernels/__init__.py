"""The ops: torch and Triton only.

One op a file, read downwards: reference, kernels, launchers, Function, op.
"""
