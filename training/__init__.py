"""Fits every model that Capstan learns; samples, evaluates and exports it."""
