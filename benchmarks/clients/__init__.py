"""One client a file: each asks COUNT prompts of a server and prints what that cost its process."""
