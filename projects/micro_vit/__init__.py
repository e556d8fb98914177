"""The pretrained ViT that the package ships."""
