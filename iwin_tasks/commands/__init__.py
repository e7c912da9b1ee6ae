"""One file a command of `iwin`."""
