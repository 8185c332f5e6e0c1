"""What doctor looks at, one file an area."""
