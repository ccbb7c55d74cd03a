"""The only room that touches the machine: probing it, applying steps, undoing them. Decides nothing."""
