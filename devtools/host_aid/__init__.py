"""No nodes: beside it, prestartup_script.py makes a headless server observable and mortal."""
NODE_CLASS_MAPPINGS = {}
