"""Worlds to validate in: small environments, scripted drivers, batched episodes and a bag recorder."""
