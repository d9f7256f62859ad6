"""Vision transformers, and any other image classifier of timm, through the same core."""
