"""The fast path on NVIDIA GPUs: CUDA C++ (sources in `source/`), compiled by NVRTC when first used.

Needs compute capability 8.0 or newer and the extra `larosa[cuda]`; no CUDA toolkit. From 9.0 on, blocks form
clusters, and the decode engine's kernels are launched before the ones they depend on have finished
(`launch.early_launches`).
"""
