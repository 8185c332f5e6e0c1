"""Model families: one folder each, named in `FAMILIES` of training/config."""
