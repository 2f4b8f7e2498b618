"""Tools that inspect data sets, masks and checkpoints, and export checkpoints."""
