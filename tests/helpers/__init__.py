"""Helpers shared by the tests (imported as a package next to conftest.py)."""
