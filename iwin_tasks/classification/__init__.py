"""Image classification by the Iwin backbones."""
