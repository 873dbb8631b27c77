"""`fitprune measure`."""

import json

from PIL import Image

from fitprune.cli.main import main


def test_a_measurement_that_stopped_at_a_bad_image_goes_on_after_the_repair(tmp_path, capsys):
    for number in range(4):
        Image.new("RGB", (96, 96), (60 * number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "2.png").write_text("broken")
    lines = [{"question_id": n, "image": f"{n}.png", "text": "Is there a 7?"} for n in range(4)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out" / "s.safetensors"
    command = ["measure", "digit-scenes", "--data", f"{tmp_path}/q.jsonl", "-o", str(out)]
    assert main(command) == 2
    assert "q.jsonl:3" in capsys.readouterr().err
    assert len(list((tmp_path / "out" / "s.safetensors.parts").iterdir())) == 2
    Image.new("RGB", (96, 96), (9, 9, 99)).save(tmp_path / "2.png")
    assert main(command) == 0
    assert [p.name for p in out.parent.iterdir()] == ["s.safetensors"]
