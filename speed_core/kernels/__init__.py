"""GPU kernels. Each has a plain PyTorch path beside it that gives the same numbers."""
