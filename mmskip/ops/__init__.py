"""Kernels shared by every method: a naive reference beside each fast path."""
