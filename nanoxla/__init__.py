"""What the five scripts lean on. README.md has a line on each module. Nothing here imports a
script."""
