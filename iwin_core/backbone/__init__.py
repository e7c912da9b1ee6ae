"""The Iwin Transformer backbones: configuration, stages, weights, timm entry points."""
