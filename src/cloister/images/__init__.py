"""Guest images as data: recipes, the signed manifest, dm-verity's table, the initramfs, command lines.

Pure, as all rooms that decide: building, storing and opening images is for `host/`.
"""
