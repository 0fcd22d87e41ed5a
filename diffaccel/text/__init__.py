"""Text for users: terminal output, escapes, and descriptions of files of the wrong kind."""
