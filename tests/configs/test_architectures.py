"""Parameters and FLOPs are counted without building the network; tests/models compares the parameters with it."""

import pytest

from configs.architectures import flops_per_image, num_parameters, parameter_shapes


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
    assert num_parameters(parameter_shapes(name, num_classes=1000)) == expected


def test_classes_and_stem_change_what_they_should():
    full = num_parameters(parameter_shapes("resnet50", num_classes=1000))
    assert full - num_parameters(parameter_shapes("resnet50", num_classes=10)) == 990 * (2048 + 1)
    assert (
        full - num_parameters(parameter_shapes("resnet50", num_classes=1000, stem="small"))
        == (7 * 7 - 3 * 3) * 3 * 64
    )


@pytest.mark.parametrize(
    ("name", "giga"), [("resnet18", 1.81), ("resnet34", 3.66), ("resnet50", 4.09), ("resnet152", 11.51)]
)
def test_flops_of_an_image_are_the_published_ones(name, giga):
    """torchvision's table of multiply-adds at 224 pixels; two FLOPs each."""
    flops = flops_per_image(name, image_size=224, num_classes=1000, width=64, stem="imagenet")
    assert flops / 2e9 == pytest.approx(giga, abs=0.01)


def test_flops_of_a_small_image_by_hand():
    """resnet18 of width 1 on a pixel: the stem, then each block of in, out channels on one pixel."""
    blocks = [(1, 1), (1, 1), (1, 2), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8)]
    by_hand = 9 * 3 + sum(9 * i * o + 9 * o * o + (i * o if i != o else 0) for i, o in blocks) + 8 * 10
    assert flops_per_image("resnet18", image_size=1, num_classes=10, width=1, stem="small") == 2 * by_hand
