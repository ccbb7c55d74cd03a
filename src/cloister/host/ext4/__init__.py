"""ext4 images of guests, read and filled without a mount: `image`, `mapping`, `tree` read, `fill` writes a fresh one.

The layout is that of Documentation/filesystems/ext4 in the kernel's tree. Reading trusts nothing: a guest wrote the
image. Filling takes what mke2fs has just made. What needs repair (an open journal) is e2fsck's, in a jail:
`host/e2fs.py`.
"""
