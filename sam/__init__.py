"""Masks from a box or points by Segment Anything, whose package is optional: imported inside functions only."""
