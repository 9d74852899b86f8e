# SPDX-License-Identifier: Apache-2.0
"""What kind of thing an emoji shows: a noun, and a broader one that takes in several."""

# broad noun -> narrower nouns -> subgroups of Unicode
KINDS: dict[str, dict[str, tuple[str, ...]]] = {
    "an animal": {
        "a mammal": ("animal-mammal",),
        "a bird": ("animal-bird",),
        "an insect": ("animal-bug",),
        "a sea animal": ("animal-marine",),
        "a reptile": ("animal-reptile", "animal-amphibian"),
    },
    "a plant": {"a flower": ("plant-flower",), "a tree or leaf": ("plant-other",)},
    "food": {
        "a fruit": ("food-fruit",),
        "a vegetable": ("food-vegetable",),
        "a dish": ("food-prepared", "food-asian"),
        "a dessert": ("food-sweet",),
    },
    "a drink": {"a drink": ("drink",)},
    "a face": {
        "a happy face": ("face-smiling", "face-affection", "face-tongue"),
        "an unhappy face": ("face-concerned", "face-negative", "face-unwell"),
        "an animal face": ("cat-face", "monkey-face"),
        "a calm face": ("face-neutral-skeptical", "face-sleepy"),
    },
    "a heart": {"a heart": ("heart",)},
    "a part of the body": {
        "a hand": (
            "hand-fingers-open",
            "hand-fingers-partial",
            "hand-single-finger",
            "hand-fingers-closed",
            "hand-prop",
            "hands",
        ),
        "an organ or limb": ("body-parts",),
    },
    "a person": {
        "a worker": ("person-role",),
        "a creature of fantasy": ("person-fantasy",),
        "an athlete": ("person-sport",),
        "a person at rest": ("person", "person-gesture", "person-resting"),
        "a person in motion": ("person-activity",),
    },
    "a vehicle": {
        "a land vehicle": ("transport-ground",),
        "a ship": ("transport-water",),
        "an aircraft": ("transport-air",),
    },
    "a place": {
        "a building": ("place-building", "place-religious"),
        "a landscape": ("place-geographic", "place-other", "place-map"),
    },
    "the sky": {"the sky": ("sky-weather",)},
    "a clock": {"a clock": ("time",)},
    "an object": {
        "clothing": ("clothing",),
        "a musical instrument": ("musical-instrument",),
        "a tool": ("tool", "science", "medical"),
        "a machine": ("computer", "phone", "light-video"),
        "stationery": ("book-paper", "office", "writing", "mail"),
        "a household item": ("household", "lock"),
        "money": ("money",),
        "a game or sport": ("sport", "game", "award-medal"),
    },
    "a symbol": {
        "an arrow": ("arrow", "av-symbol"),
        "a letter or number": ("alphanum", "keycap"),
        "a shape": ("geometric",),
        "a sign": ("warning", "transport-sign"),
        "a sign of the zodiac": ("zodiac",),
        "a sign of religion": ("religion",),
    },
}
KIND_OF = {subgroup: noun for nouns in KINDS.values() for noun, subgroups in nouns.items() for subgroup in subgroups}
BROAD = {noun: broad for broad, nouns in KINDS.items() for noun in nouns}  # kind -> its broader noun
NOUNS = tuple(dict.fromkeys([*KINDS, *BROAD]))  # all that can be said
