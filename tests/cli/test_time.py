"""`fitprune time`."""

import pytest

from fitprune.cli.main import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["time", "--recipe", "llava-1.5-7b:60"], "pass either MODEL or --random-model"),
        (["time", "digit-scenes"], "pass --recipe or --flops-reduction"),
        (["time", "digit-scenes", "--recipe", *["llava-1.5-7b:60"] * 2], "two have the same name"),
        (["time", "--random-model", "gpt-5", "--recipe", "llava-1.5-7b:60"], "must be one of llava-1.5-7b"),
    ],
)
def test_wrong_use_is_refused(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
