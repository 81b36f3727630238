"""The picture of a pipeline's lineage."""

import base64
import re
import xml.etree.ElementTree as ET

from rlhf_core.lineage_graph import LETTERS, Node, lineage_markdown, lineage_svg

SVG = "{http://www.w3.org/2000/svg}"
STAGES = ("data", "sft", "reward", "ppo", "evaluate")
NODES = [Node(name, ("built", "0123456789ab"), STAGES[:i], "made") for i, name in enumerate(STAGES)]


def test_every_stage_has_a_box_and_every_input_a_line_inside_the_picture():
    picture = ET.fromstring(lineage_svg(NODES))
    titles = [text.text for text in picture.iter(f"{SVG}text") if text.get("font-weight") == "600"]
    assert titles == list(STAGES)
    edges = [path for path in picture if path.tag == f"{SVG}path"]
    assert len(edges) == 10
    width, height = float(picture.get("width", 0)), float(picture.get("height", 0))
    for box in picture.iter(f"{SVG}rect"):
        assert float(box.get("x", 0)) + float(box.get("width", 0)) <= width
    for edge in edges:
        numbers = [float(n) for n in re.findall(r"-?[0-9.]+", edge.get("d", ""))]
        if "C" in edge.get("d", ""):  # the lowest point of a cubic with level handles
            floor, depth = numbers[1], numbers[3]
            assert 0.25 * floor + 0.75 * depth < height


def test_what_a_line_cannot_hold_is_cut_and_markup_is_text():
    text = lineage_svg([Node("data", ("x" * 100, "<b>&", "3", "4"), ("gone",), "failed")])
    shown = [element.text for element in ET.fromstring(text).iter(f"{SVG}text")]
    assert shown == ["data", "x" * (LETTERS - 1) + "…", "<b>&", "3"]


def test_in_markdown_it_is_one_image_of_a_few_kilobytes():
    text = lineage_markdown(NODES)
    assert len(text) < 10_000
    assert base64.b64decode(text.split("base64,")[1].rstrip(")\n")).decode() == lineage_svg(NODES)
