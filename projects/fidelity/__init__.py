"""How right the gradients are."""
