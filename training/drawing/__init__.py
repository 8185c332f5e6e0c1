"""What trained models draw: the interfaces of families that draw or encode, and sheets of what was drawn."""
