"""Small helpers that several methods share and that belong to none of them."""
