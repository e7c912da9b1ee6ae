"""Where latents and labels come from."""
