"""What every package uses and knows no model: files, settings, registries, run folders, pictures."""
