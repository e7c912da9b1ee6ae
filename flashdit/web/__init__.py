"""The web page that samples from trained models."""
