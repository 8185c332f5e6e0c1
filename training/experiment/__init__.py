"""`capstan experiment blend`: one recipe, several caption blends, and which model follows prompts best."""
