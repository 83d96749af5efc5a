"""What an answer to a prompt is worth."""
