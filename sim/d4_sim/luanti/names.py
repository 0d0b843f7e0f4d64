"""The game's names for things as Minecraft 1.16's, and its counters as contractors' recordings have them.

What has no counterpart keeps its own name, which no task looks for. Iron is the one case in which a
counterpart is not the same thing: Minecraft's ore is smelted as it is, here a lump of it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

_WOODS = {"": "oak", "jungle": "jungle", "pine_": "spruce", "acacia_": "acacia", "aspen_": "birch"}
_TOOLS = {"pick": "pickaxe", "axe": "axe", "shovel": "shovel", "sword": "sword"}
_METALS = {"wood": "wooden", "stone": "stone", "steel": "iron", "diamond": "diamond"}
_SAME = (
    "stick", "furnace", "chest", "torch", "stone", "dirt", "sand", "gravel", "clay", "glass",
    "diamond", "apple", "cactus", "obsidian", "ice", "paper", "book", "bookshelf", "sandstone",
)  # fmt: skip

# the game's name without `default:` to Minecraft's
_NAMES = {
    **{name: name for name in _SAME},
    **{f"{prefix}tree": f"{wood}_log" for prefix, wood in _WOODS.items()},
    **{f"{prefix}wood": f"{wood}_planks" for prefix, wood in _WOODS.items()},
    **{f"{prefix}sapling": f"{wood}_sapling" for prefix, wood in _WOODS.items()},
    **{f"{prefix}leaves": f"{wood}_leaves" for prefix, wood in _WOODS.items() if prefix != "pine_"},
    "pine_needles": "spruce_leaves", "ladder_wood": "ladder",
    **{f"{tool}_{of}": f"{made}_{kind}" for tool, kind in _TOOLS.items() for of, made in _METALS.items()},
    "cobble": "cobblestone", "mossycobble": "mossy_cobblestone", "dirt_with_grass": "grass_block",
    "stone_with_coal": "coal_ore", "stone_with_iron": "iron_ore", "stone_with_gold": "gold_ore",
    "stone_with_diamond": "diamond_ore", "coal_lump": "coal", "iron_lump": "iron_ore",
    "gold_lump": "gold_ore", "steel_ingot": "iron_ingot", "gold_ingot": "gold_ingot",
    "furnace_active": "furnace", "snowblock": "snow_block", "papyrus": "sugar_cane",
}  # fmt: skip

_PREFIX = "default:"
_COUNTERS = {
    "dig": "minecraft.mine_block:minecraft.", "craft": "minecraft.craft_item:minecraft.",
    "place": "minecraft.use_item:minecraft.", "use": "minecraft.use_item:minecraft.",
    "open": "minecraft.custom:minecraft.interact_with_",
}  # fmt: skip


def name_of(name: str) -> str:
    """Minecraft's name of a thing, or its own."""
    return _NAMES.get(name[len(_PREFIX) :], name) if name.startswith(_PREFIX) else name


def items(found: Mapping[str, int]) -> dict[str, int]:
    """How many of each item, by Minecraft's names."""
    return _summed((name_of(name), count) for name, count in found.items())


def counters(found: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """The mod's counters by the names of recordings (`minecraft.mine_block:minecraft.oak_log`)."""
    return _summed(
        (_COUNTERS[kind] + name_of(name), count)
        for kind, counts in found.items()
        if kind in _COUNTERS
        for name, count in counts.items()
    )


def _summed(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    out: dict[str, int] = {}
    for name, count in pairs:
        out[name] = out.get(name, 0) + count
    return out
