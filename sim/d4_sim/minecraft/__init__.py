"""Minecraft, and games played like it: the benchmark, its tasks and ladder, the games behind one interface."""
