"""Numbers to files and tables that people read."""
