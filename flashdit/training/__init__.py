"""Training of any task: the loop, what a task gives it, and its parts."""
