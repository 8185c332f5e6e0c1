"""Captioned web images in, a trained text-to-image model out."""
