"""Runs the PTX that Triton compiles in numpy, without a GPU, and reports errors that a GPU might not show.

    parse.py     text to instructions               integers.py, floats.py    what one instruction does:
    values.py    types, and exact roundings         movement.py, control.py   tables by its name
    memory.py    global memory                      lanes.py, products.py     within a warp, and a warp group
    shared.py    shared memory, and its races       copies.py, bulk.py        asynchronous copies
    order.py     order of accesses: vector clocks   mbarriers.py, tensor_maps.py
    warp.py      registers, and operands            launch.py                 a CTA, a grid
    under_way.py copies and products under way      arguments.py              the parameters of a kernel
    table.py     where instructions are looked up   faults.py                 the exceptions

    device.py    Triton's launches, run here        steps.py                  a sequence of launches that overlap
    traffic.py   bytes that a program moves

Warps and CTAs alternate in a random order that a seed fixes. A ``Fault`` names the kernel's line and the error:

- an access to global memory that is not an element of an argument, is misaligned, or comes before
  ``griddepcontrol.wait``; a warp that never waits; a store that a releasing atomic does not cover;
- a read of shared memory that another warp has written since the last barrier, that an asynchronous copy may still
  write (copies and products arrive as late as allowed), or that was never written; a write to memory that others may
  still read; data of ordinary stores that products or bulk copies use without ``fence.proxy.async``;
- a barrier that not all warps reach; a deadlock at mbarriers; a branch that divides a warp; an address, a guard or a
  stored value that comes from a register that was never written, or that a product may still write.

The runner does not show the order of sums inside a tensor core, races between the lanes of one warp, the memory model
between CTAs except the release, and the effects of ptxas. An instruction that is not implemented raises ``Unknown``
with its name.

Sections in docstrings are those of NVIDIA's "PTX ISA", release 9.0.
"""
