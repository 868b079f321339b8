"""Brackets and colons in a path are text: rich would read them as styles and emoji."""

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from granvit.cost.flops import Sizes
from granvit.cost.plan import PlanConfig, _model_table
from granvit.train.presets import PRESETS, Model

PATH = "/data/[bold]runs[/bold]/[x]:dog:/a"


def test_what_builds_a_dataset_says_where(capsys):
    pytest.importorskip("datasets")
    from granvit.data.__main__ import _built
    from granvit.data.build import Summary

    _built(Path(PATH), Summary("row", read=3))
    assert f"wrote {PATH}\n" in capsys.readouterr().err


def test_commands_have_consoles_without_markup(capsys):
    pytest.importorskip("datasets")
    from granvit.audit import command
    from granvit.data import __main__ as data

    for console in (command.console, data.console):
        console.print(f"wrote {PATH}")
        assert capsys.readouterr().err == f"wrote {PATH}\n"


def test_a_plan_names_its_models(tiny, capsys):
    plan = PlanConfig(replace(PRESETS["paper"], model=Model(encoder=PATH)))
    Console(width=200).print(_model_table(plan, Sizes.of(tiny()[0])))
    assert f"encoder ({PATH})" in capsys.readouterr().out
