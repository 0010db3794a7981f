"""The vocabulary of the built-in model: what is drawn, in which styles, on which backgrounds.

A concept is the name of a drawing that all three icon sets have. The names are the sets' own, and chosen so
that two concepts differ at 32 px. The list is part of the recipe: its order fixes the ids in the drawings file.
"""

from typing import Final

ANIMALS_AND_NATURE: Final = (
    "bat", "bear", "bouquet", "butterfly", "cactus", "camel", "cat-face", "chicken", "crocodile", "deciduous-tree",
    "dog-face", "dolphin", "dragon-face", "duck", "elephant", "evergreen-tree", "flamingo", "four-leaf-clover", "fox",
    "frog", "giraffe", "hamster", "hedgehog", "hibiscus", "honeybee", "horse-face", "jellyfish", "koala",
    "lady-beetle", "lion", "maple-leaf", "monkey-face", "octopus", "owl", "palm-tree", "panda", "parrot", "penguin",
    "pig-face", "potted-plant", "rabbit-face", "raccoon", "rose", "scorpion", "shark", "snail", "snake", "spider",
    "sunflower", "swan", "t-rex", "tiger-face", "tropical-fish", "tulip", "turtle", "unicorn", "whale", "zebra",
)  # fmt: skip
FOOD_AND_DRINK: Final = (
    "avocado", "banana", "beer-mug", "birthday-cake", "bread", "broccoli", "brown-mushroom", "carrot", "cheese-wedge",
    "cherries", "cookie", "cooking", "croissant", "cupcake", "doughnut", "ear-of-corn", "eggplant", "french-fries",
    "grapes", "green-apple", "hamburger", "hot-beverage", "hot-dog", "hot-pepper", "kiwi-fruit", "lemon", "lollipop",
    "onion", "pancakes", "peach", "pear", "pineapple", "pizza", "popcorn", "pretzel", "red-apple", "soft-ice-cream",
    "strawberry", "sushi", "tangerine", "taco", "tomato", "watermelon", "wine-glass",
)  # fmt: skip
CONCEPTS: Final = ANIMALS_AND_NATURE + FOOD_AND_DRINK

STYLES: Final = ("noto", "twemoji", "fluent")
"""Names as they stand in captions; `ICON_SETS` has the package of each."""
ICON_SETS: Final = {"noto": "noto", "twemoji": "twemoji", "fluent": "fluent-emoji-flat"}

BACKGROUNDS: Final = {
    "white": (255, 255, 255),
    "black": (32, 33, 36),
    "red": (233, 106, 98),
    "yellow": (252, 228, 121),
    "green": (129, 201, 125),
    "blue": (112, 170, 240),
    "purple": (172, 133, 224),
    "pink": (248, 187, 208),
}
"""sRGB. Soft enough that a drawing of the same colour still stands out."""


def spoken(concept: str) -> str:
    """A concept as it is said in a caption: `cat-face` is "cat face", with its article."""
    words = concept.replace("-", " ")
    return f"{'an' if words[0] in 'aeio' else 'a'} {words}"


def caption(concept: str, style: str | None, background: str | None) -> str:
    """ "{a concept} on a {colour} background, {style} style"; None leaves that part unsaid."""
    text = spoken(concept)
    if background is not None:
        text += f" on a {background} background"
    return text if style is None else f"{text}, {style} style"
