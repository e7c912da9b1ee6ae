"""A checkpoint to images: options, generator, folders, the diffusers pipeline."""
