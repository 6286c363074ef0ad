"""SeeCoder (Prompt-Free Diffusion, Xu et al., CVPR 2024): a picture is encoded into the tokens that a text prompt would give."""
