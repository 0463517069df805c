"""Training: data, losses, the loop that the scripts in `training/` share."""
