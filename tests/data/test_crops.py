"""What a teacher looks at: what is asked about, in bounds that images share, and never less finely than the student."""

from types import SimpleNamespace

import pytest
import torch

from granvit.data.crops import ASKED, Crops
from granvit.questions.prompts import describe_box, questions
from granvit.questions.schema import Region, Sample
from granvit_kernels import fit_grid

BOX = (0.1, 0.1, 0.5, 0.5)
SIXTEENS = SimpleNamespace(patch_size=16, max_image_tokens=1024)  # of a processor, what crops depend on


def sample(name: str, regions: int, kind: str = "natural") -> Sample:
    return boxed(name, [BOX] * regions, kind=kind)


def boxed(name: str, boxes: list[tuple[float, ...]], size: tuple[int, int] = (512, 512), kind="natural") -> Sample:
    image = torch.zeros((), dtype=torch.uint8).expand(*size, 3)
    regions = tuple(Region(box, f"thing {i}", kind) for i, box in enumerate(boxes))
    return Sample(name, image, "a scene", regions, "test", "")


def chosen(crops: Crops, *arguments) -> list[tuple[int, int]]:
    return sorted((crop.image, crop.region) for crop in crops.choose(*arguments, SIXTEENS))


def test_the_regions_that_are_asked_about_are_chosen_once_each():
    samples = [sample("a", 3), sample("b", 2), sample("c", 1)]
    asked = [questions(samples[0], ("bbox2caption", "caption2bbox", "global_caption"))[1:5], [], []]
    asked[2] = [describe_box(BOX, "thing 0", 0)] * 2
    assert chosen(ASKED, samples, asked, [[2, 0], [1]]) == [(0, 0), (0, 1), (0, 2), (2, 0)]


def test_images_of_a_sequence_share_the_teacher_s_tokens():
    samples = [sample("page", 480, "ocr"), sample("b", 2), sample("c", 3), sample("d", 5)]
    asked = [questions(each, ("bbox2caption",)) for each in samples]
    bounded = Crops(tokens=196, capacity=2000)  # ten regions, of 14 x 14 patches each
    expected = [(0, i) for i in range(5)] + [(1, 0), (1, 1), (2, 0), (2, 1), (2, 2)] + [(3, i) for i in range(5)]
    assert chosen(bounded, samples, asked, [[0, 1, 2], [3]]) == expected
    assert {image for image, _ in chosen(Crops(ocr=False), samples, asked, [[0, 1, 2], [3]])} == {1, 2, 3}
    assert chosen(Crops(tokens=9, capacity=8), samples, asked, [[1]]) == []


def test_each_region_counts_for_the_patches_of_its_own_grid():
    """A small box, a line, and nearly the whole image, of which the student sees more cells than a crop would have."""
    page = boxed("page", [(0.1, 0.1, 0.2, 0.2), (0, 0.5, 1, 0.52), (0, 0, 1, 0.9), BOX] * 9)
    asked = [questions(page, ("bbox2caption",))]
    crops = Crops(tokens=64).choose([page], asked, [[0]], SIXTEENS)
    assert {crop.grid for crop in crops} == {(8, 8), (1, 52), (29, 32), (13, 13)}
    assert [crop.grid for crop in crops] == sorted(crop.grid for crop in crops)
    bounded = Crops(tokens=64, capacity=2200).choose([page], asked, [[0]], SIXTEENS)
    assert sorted(crop.region for crop in bounded) == list(range(6)) and sum(c.patches for c in bounded) <= 2200


def test_so_many_an_image_are_drawn_anew_with_its_questions():
    page = sample("page", 100)
    drawn = Crops(per_image=4)
    asked = [questions(page, ("bbox2caption",))[i : i + 6] for i in (0, 6)]
    first, again, later = (chosen(drawn, [page], [some], [[0]]) for some in (asked[0], asked[0], asked[1]))
    assert first == again != later and len(first) == len(set(first)) == 4
    assert max(number for _, number in first + later) > 12
    assert chosen(drawn, [sample("b", 2)], [[]], [[0]]) == [(0, 0), (0, 1)]


@pytest.mark.parametrize("size", [(512, 512), (97, 1531), (4, 400), (1, 1)])
def test_the_teacher_never_sees_less_than_the_student_and_keeps_the_aspect_ratio(size):
    """Boxes of all sizes, down to those without a pixel."""
    torch.manual_seed(0)
    sides = 1e-6 ** (torch.rand(300, 2) ** 2)
    corners = torch.rand(300, 2) * (1 - sides)
    boxes = torch.cat([corners, corners + sides], 1).clamp(max=1).tolist()
    picture, (rows, columns) = boxed("a", boxes, size), fit_grid(*size, 16, 1024)
    for number, (x1, y1, x2, y2) in enumerate(boxes):
        height, width = Crops(tokens=256).grid(picture, number, SIXTEENS)
        seen = ((y2 - y1) * rows, (x2 - x1) * columns)
        assert height >= seen[0] and width >= seen[1]
        pixels = [max(1, round(side * whole)) for side, whole in zip((y2 - y1, x2 - x1), size, strict=True)]
        if height > max(1, seen[0] + 1) and width > max(1, seen[1] + 1):  # else the student's grid has its say
            assert height * width <= 256
            # either side is a whole number of patches, by less than one more than the scale says
            assert (height - 1) / pixels[0] < width / pixels[1] and (width - 1) / pixels[1] < height / pixels[0]
