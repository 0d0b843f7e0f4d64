"""Luanti (Debian's minetest and its game) as a `Game`: real first-person voxels by keyboard and mouse."""
