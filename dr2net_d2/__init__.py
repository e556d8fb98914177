"""Dr2Net for detection: finetune pretrained ViT backbones reversibly, with exact inversion."""

__version__ = "0.1.0"
