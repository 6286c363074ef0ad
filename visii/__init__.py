"""Visual instruction inversion: an edit instruction learned from a picture before and after (Nguyen et al., NeurIPS 2023).

`objective` and `learn` are pure mathematics; `learn_run` trains inside the host's own sampling path; `instruction` is the
value that travels on the wire, `start` makes one from text, `compose` changes one, `storage` and `published` keep it in files;
`direction` is what the edit looks like to CLIP; `report` and `plot` show what came of it.
"""
