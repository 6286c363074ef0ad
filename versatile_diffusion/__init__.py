"""Versatile Diffusion (Xu et al., ICCV 2023): text and pictures as contexts of one model."""
