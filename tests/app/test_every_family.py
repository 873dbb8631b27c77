"""The app on a tiny model of every family: answers, what is left, a word's attention, and the player."""

import pytest

from fitprune.app import fragments, screen
from fitprune.app.limits import Picture
from fitprune.app.recipes import Choice
from fitprune.app.served import ServedModel
from helpers import families

# Some processors turn tensors to numpy as numpy 2 dislikes.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

REFUSED = "got_ocr2"  # by `make_batches`: its processor takes no list of pictures for each prompt
ROWS = {
    row.name: row for row in families.ROWS if row.processor and row.name != REFUSED and not row.name.endswith("-video")
}


@pytest.mark.parametrize("name", ROWS)
def test_a_family_is_served(name, tmp_path):
    row = ROWS[name]
    families.picture(3, (48, 80)).save(tmp_path / "picture.png")
    picture = Picture((tmp_path / "picture.png").read_bytes(), "picture.png")
    served = ServedModel(row.make_model(), row.processor(), prompt_template=f"see {row.image} {{question}}")
    *_, last = screen.run(served, screen.Request(picture, "what is it?", Choice(50, "uniform"), 3))
    assert len(last.pruned.ids) == len(last.dense.ids) == 3
    assert last.kept.counts[0] > last.kept.counts[-1]
    attention = served.attention_of(served.prompt(picture, "what is it?"), last.pruning, last.pruned.ids, [0, 2])
    assert len(attention) == len(last.kept.entered)
    assert 0 < attention.sum() <= 1 or "window" in name  # of few tokens, which the question fills
    assert fragments.layers(last, attention).startswith("<figure class=kept>")
