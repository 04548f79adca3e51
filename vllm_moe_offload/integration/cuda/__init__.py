"""What vLLM on CUDA (or ROCm) needs besides: covered kernels, graphs, device memory, rows of a step."""
