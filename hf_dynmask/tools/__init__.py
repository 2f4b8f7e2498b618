"""What looks at data sets, masks and checkpoints, and shares these."""
