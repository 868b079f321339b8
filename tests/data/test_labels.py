"""Captions from labels."""

import pytest

from granvit.data.sources.labels import class_phrase


@pytest.mark.parametrize(
    ("label", "phrase"),
    [
        ("person", "a person"),
        ("apple", "an apple"),
        ("potted_plant", "a potted plant"),
        ("wine glass", "a wine glass"),
        ("skis", "skis"),
        ("bus", "a bus"),
        ("a red car", "a red car"),
        ("man on the left", "man on the left"),
        ("  ", ""),
        # by sound, not by letter
        ("unicycle", "a unicycle"),
        ("unidentified_object", "an unidentified object"),
        ("umbrella", "an umbrella"),
        ("utensil", "a utensil"),
        ("European road", "a European road"),
        ("one-way sign", "a one-way sign"),
        ("onion", "an onion"),
        ("hourglass", "an hourglass"),
        ("honey", "a honey"),
        ("8-ball", "an 8-ball"),
        ("3d printer", "a 3d printer"),
        ("T-shirt", "a T-shirt"),
        ("X-ray", "an X-ray"),
        ("éclair", "an éclair"),
        ("hors d'oeuvre", "an hors d'oeuvre"),
        ("Uruguayan flag", "a Uruguayan flag"),
        # what stays: plurals, what is not counted, what has an article or a number
        ("SCISSORS", "SCISSORS"),
        ("BUS", "a BUS"),
        ("women", "women"),
        ("firemen", "firemen"),
        ("specimen", "a specimen"),
        ("overalls (clothing)", "overalls (clothing)"),
        ("glass_(drink_container)", "a glass (drink container)"),
        ("vegetation", "vegetation"),
        ("orange juice", "orange juice"),
        ("swimwear", "swimwear"),
        ("two people", "two people"),
        ("der Hund", "der Hund"),
        ("Mr. X", "Mr. X"),
        # capitals: by letter, as a word where both agree, or not at all
        ("SUV", "an SUV"),
        ("TV", "a TV"),
        ("USB stick", "a USB stick"),
        ("lcd", "an lcd"),
        ("suv", "an suv"),
        ("St Bernard", "a St Bernard"),
        ("ATM", "an ATM"),
        ("CAR", "a CAR"),
        ("NATO", "NATO"),
        # what English does not tell
        ("行人", "行人"),
        ("собака", "собака"),
        ("犬 dog", "犬 dog"),
        ("2 dog", "2 dog"),
        ("¿que?", "¿que?"),
    ],
)
def test_articles_are_those_of_english_or_none(label, phrase):
    assert class_phrase(label) == phrase


def test_without_articles_a_name_stays():
    assert class_phrase("potted_plant", articles=False) == "potted plant"
