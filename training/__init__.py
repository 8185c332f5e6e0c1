"""Train every model that Capstan learns; sample, evaluate and export it."""
