"""Parameters are counted right without building the network; tests/models holds the network to the count."""

import pytest

from configs.architectures import num_parameters


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", 11_689_512),
        ("resnet34", 21_797_672),
        ("resnet50", 25_557_032),
        ("resnet101", 44_549_160),
        ("resnet152", 60_192_808),
    ],
)
def test_parameters_at_1000_classes_are_the_published_ones(name, expected):
    assert num_parameters(name, num_classes=1000) == expected


def test_classes_and_stem_change_what_they_should():
    full = num_parameters("resnet50", num_classes=1000)
    assert full - num_parameters("resnet50", num_classes=10) == 990 * (2048 + 1)
    assert full - num_parameters("resnet50", num_classes=1000, stem="small") == (7 * 7 - 3 * 3) * 3 * 64
