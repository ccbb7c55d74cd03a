"""A look-alike of Firecracker for machines without KVM: the same API, strict as the real one, over QEMU.

What it judges requests by is written from Firecracker's own description of its API, and shares nothing with
`cloister`: it is a second opinion. It is not Firecracker: no KVM, no seccomp filter, other timing. Standard library
only, since it runs in the jail of a run, where nothing else is; `support.firecracker_programs` packs it into one file.
"""
