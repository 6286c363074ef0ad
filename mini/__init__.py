"""The mini checkpoint family: drawn scenes with known truth, and small latent diffusion models trained on them."""
