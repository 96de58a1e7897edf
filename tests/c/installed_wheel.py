"""A program: runs an op of the installed package in C, and prints where the package lies and what ran. Fails if torch
ran instead."""

import logging

import torch

from qwenkern.kernels import cpu

logging.basicConfig(format="%(message)s")
x = torch.arange(64).reshape(2, 32).bfloat16()
assert cpu.takes_linear(x), "no C functions"
assert torch.equal(cpu.linear(x, x)[0], x @ x.T)
print(cpu.__file__)
print(cpu.describe()["CPU"])
