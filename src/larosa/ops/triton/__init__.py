"""Portable kernels in Triton: every GPU that it compiles for, and its interpreter on a CPU.

Chosen by `LAROSA_CUDA_KERNELS=triton`. They follow the paper's kernels more closely than those of `larosa.ops.cuda`:
one program a vector for selections, tiles of outputs times parts of the list for sparse products.
"""
