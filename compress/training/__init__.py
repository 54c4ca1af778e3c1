"""One loop, its losses, and what is computed once: image features and teacher targets."""
