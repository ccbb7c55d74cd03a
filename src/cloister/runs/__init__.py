"""One run from request to receipt: compile, launch, supervise, record. The place where the rooms below meet."""
