"""The paper's other systems on Iwin backbones: classification, detection, segmentation."""
