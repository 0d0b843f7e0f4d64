"""d4_core: tokenizer, dynamics, agent and imagination of Dreamer 4 (arXiv 2509.24527), and their training."""
