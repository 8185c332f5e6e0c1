"""Model families, one folder each; `FAMILIES` in training/config lists them."""
