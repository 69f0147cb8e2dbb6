"""`peftsurgery combine` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from peftsurgery.cli import main
from peftsurgery.cli.combine import METHODS as NAMES
from peftsurgery.merge_methods import METHODS
from tests.codec.build import write
from tests.codec.parts import Maker

KEY = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    return [
        str(write(tmp_path / f"{s}.safetensors", Maker(s).lora(KEY, 320, 768, s, alpha=1)))
        for s in (2, 3)
    ]


def test_names_are_those_of_the_methods() -> None:
    assert tuple(METHODS) == NAMES


def test_json_report(files: list[str], tmp_path: Path) -> None:
    out = tmp_path / "o.safetensors"
    arguments = ["combine", "-a", f"{files[0]}=0.5", "-a", files[1], "-o", str(out), "--json"]
    arguments += ["--method", "ties", "--density", "0.3", "--lambda", "2", "--no-normalize"]
    result = CliRunner().invoke(main, [*arguments, "--rank", "4"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["operation"] == "combine"
    assert report["summary"]["option density"] == 0.3
    assert report["summary"]["option scale"] == 2.0
    assert report["summary"]["option normalize"] is False
    assert report["modules"][0]["rank"] == 4
    assert out.exists()


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--method", "dare_ties"], 2, "dare_ties: needs density"),
        (["--epsilon", "0.1"], 2, "linear: has no option 'epsilon'"),
        (["--method", "nothing"], 2, "nothing"),
        (["--rank", "ratio:0.5"], 2, "ratio"),
    ],
)
def test_exit_codes(
    more: list[str], code: int, message: str, files: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "o.safetensors"
    arguments = ["combine", "-a", files[0], "-a", files[1], "-o", str(out), *more]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert not out.exists()
