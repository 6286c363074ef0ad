"""InstructPix2Pix (Brooks, Holynski, Efros, CVPR 2023): a picture edited by a written instruction.

guidance.py the second guidance scale, a patch of a MODEL; guidance_run.py what it remembers during a run; size.py and conditioning.py
the picture; checks.py which models can edit; weights.py checkpoints with two sets of weights.
"""
