"""What a teacher looks at: what is asked about, in bounds that images share."""

from granvit.data.crops import ASKED, Crops
from granvit.questions.prompts import describe_box, questions
from granvit.questions.schema import Region, Sample

BOX = (0.1, 0.1, 0.5, 0.5)


def sample(name: str, regions: int, kind: str = "natural") -> Sample:
    return Sample(name, None, "a scene", tuple(Region(BOX, f"thing {i}", kind) for i in range(regions)), "test", "")


def test_the_regions_that_are_asked_about_are_chosen_once_each():
    samples = [sample("a", 3), sample("b", 2), sample("c", 1)]
    asked = [questions(samples[0], ("bbox2caption", "caption2bbox", "global_caption"))[1:5], [], []]
    asked[2] = [describe_box(BOX, "thing 0", 0)] * 2
    assert ASKED.choose(samples, asked, [[2, 0], [1]]) == [(0, 0), (0, 1), (0, 2), (2, 0)]


def test_images_of_a_sequence_share_the_teacher_s_tokens():
    samples = [sample("page", 480, "ocr"), sample("b", 2), sample("c", 3), sample("d", 5)]
    asked = [questions(each, ("bbox2caption",)) for each in samples]
    bounded = Crops(tokens=49, capacity=500)  # ten regions
    chosen = bounded.choose(samples, asked, [[0, 1, 2], [3]])
    assert chosen == [(0, i) for i in range(5)] + [(1, 0), (1, 1), (2, 0), (2, 1), (2, 2)] + [(3, i) for i in range(5)]
    assert {image for image, _ in Crops(ocr=False).choose(samples, asked, [[0, 1, 2], [3]])} == {1, 2, 3}
    assert Crops(tokens=9, capacity=8).choose(samples, asked, [[1]]) == []


def test_so_many_an_image_are_drawn_anew_with_its_questions():
    page = sample("page", 100)
    drawn = Crops(per_image=4)
    asked = [questions(page, ("bbox2caption",))[i : i + 6] for i in (0, 6)]
    first, again, later = (drawn.choose([page], [some], [[0]]) for some in (asked[0], asked[0], asked[1]))
    assert first == again != later and len(first) == len(set(first)) == 4
    assert max(number for _, number in first + later) > 12
    assert drawn.choose([sample("b", 2)], [[]], [[0]]) == [(0, 0), (0, 1)]
