"""Minecraft and games played like it: the benchmark, its tasks and ladder, games behind one interface."""
