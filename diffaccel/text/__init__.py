"""Text for people: the terminal, escapes, and what a mistaken file is."""
