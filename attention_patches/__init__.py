"""Edits of a running UNet: rewrites of q, k and v, and the reference pass that feeds them."""
