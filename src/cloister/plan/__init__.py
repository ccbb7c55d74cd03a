"""What will be done: a plan is a closed union of small frozen steps, as data.

A plan holds no secret and no file descriptor, so it can be printed, stored before its first
step runs, undone from the file alone, and digested. Nothing here touches the machine.
"""
