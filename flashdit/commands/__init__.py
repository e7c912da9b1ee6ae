"""One file a command of `flashdit`, and the arguments they share."""
