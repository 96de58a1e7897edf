"""A program that runs an op of the installed package in C. It prints where the package lies and what ran, and fails if
torch ran instead."""

import logging

import torch

from qwenkern.kernels import c as c_backend
from qwenkern.kernels import linear

logging.basicConfig(format="%(message)s")
x = torch.arange(64).reshape(2, 32).bfloat16()
assert c_backend.prepare() is None, "no C functions"
assert torch.equal(linear(x, x), x @ x.T)
print(c_backend.__file__)
print(c_backend.describe()["CPU"])
