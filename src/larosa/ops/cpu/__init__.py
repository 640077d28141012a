"""Kernels for the CPU: a C++ library (`csrc/`), how it is loaded, and the operators it implements."""
