"""The operators: their kernels, gradients, contracts and plain-PyTorch reference."""
