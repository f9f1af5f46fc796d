"""`python -m moe_ext plot`, and the pictures of readings."""

from types import SimpleNamespace

import pytest
import torch
from scripts import python

from moe_ext import __main__, plot, stats

PNG = b"\x89PNG"


@pytest.fixture
def command(monkeypatch, capsys):
    """Run `python -m moe_ext plot` in this process."""

    def run_plot(*arguments) -> SimpleNamespace:
        monkeypatch.setattr("sys.argv", ["moe_ext", "plot", *map(str, arguments)])
        code = __main__.main()
        printed = capsys.readouterr()
        return SimpleNamespace(code=code, out=printed.out, err=printed.err)

    return run_plot


def assert_refused(done: SimpleNamespace, text: str) -> None:
    """The command ends with code 2 and one line on stderr that has the text."""
    assert done.code == 2
    assert done.err.startswith("moe_ext plot: ")
    assert text in done.err
    assert len(done.err.splitlines()) == 1


def layer_of(*load: int, **numbers) -> stats.LayerStats:
    counts = torch.tensor(load)
    return stats.LayerStats(4, 1, counts, counts, **numbers)


def test_plot_prints_the_table_and_the_files(run, command, tmp_path):
    readings, path = run
    done = command(path, "--out", tmp_path / "new" / "folder")
    assert done.code == 0, done.err
    assert done.out.startswith(f"step 40\n{readings[-1][1]}\n")
    names = ["load.png", "sorted.png", "over-time.png", "pairs.png"]
    files = [tmp_path / "new" / "folder" / name for name in names]
    assert done.out.splitlines()[-4:] == list(map(str, files))
    for file in files:
        assert file.read_bytes().startswith(PNG)


def test_plot_with_text_prints_on_an_ascii_terminal_and_draws_nothing(run, tmp_path):
    arguments = ("-m", "moe_ext", "plot", run[1], "--text", "--out", tmp_path)
    done = python(*arguments, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "max/mean" in done.stdout
    assert "a bar for an expert" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", [None, b"", b"nonsense\n", b'{"step": 50, "mode"', PNG + b"\r\n"])
def test_plot_refuses_a_wrong_file_in_one_line(command, tmp_path, text):
    path = tmp_path / "run.jsonl"
    if text is not None:
        path.write_bytes(text)
    assert_refused(command(path), str(path))


def test_plot_refuses_a_wrong_layer_or_folder(run, command, tmp_path):
    done = command(run[1], "--layer", "ffn", "--text")
    assert_refused(done, "--layer must be 0 or 1, got ffn")
    assert done.out == ""
    out = tmp_path / "out"
    out.write_text("")
    assert_refused(command(run[1], "--out", out), str(out))


def test_a_heat_map_shows_shares_on_one_scale(drawn, tmp_path):
    """Numbers are percentages; the scale of every picture ends at twice the even share."""
    plot.plot_load({"a": [0.5, 0.25, 0.25, 0], "b": [0.5, 0.5]}, tmp_path, "training")
    axes = drawn[0].axes[0]
    assert [text.get_text() for text in axes.texts] == ["50%", "25%", "25%", "idle", "50%", "50%"]
    assert axes.images[0].get_clim() == (plot.LEAST, 2)
    table = axes.images[0].get_array()
    assert table[0].tolist() == [2, 1, 1, 0]
    assert table[1].filled(-1).tolist() == [1, 1, -1, -1]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]


def test_pictures_have_titles_and_named_axes(run, drawn, tmp_path):
    plot.plot_run(run[0], tmp_path)
    curves = {"moe, held out": [(1, 2.0)], "moe, training": [(1, 3.0)]}
    plot.plot_curves(curves, tmp_path, "loss of a model", "bits per byte")
    titles = [figure.axes[0].get_title() for figure in drawn]
    words = ("Load", "evenly", "over time", "Pairs", "loss")
    assert all(word in title for word, title in zip(words, titles, strict=True))
    assert all(mark in title for title in titles[:2] for mark in ("training", "step 40"))
    for axes in (axes for figure in drawn for axes in figure.axes):
        is_scale = axes.get_label() == "<colorbar>"
        assert axes.get_ylabel()
        assert is_scale or axes.get_xlabel()
    assert [axes.get_ylabel() for axes in drawn[0].axes] == ["layer", "load / even share"]
    one, other = drawn[-1].axes[0].lines
    assert one.get_color() == other.get_color()
    assert one.get_linestyle() != other.get_linestyle()


def test_pictures_show_any_printable_name(tmp_path):
    """A dollar sign does not begin a formula."""
    layer = layer_of(2, 3, pairs=torch.tensor([[0, 90], [90, 0]]))
    readings = [(step, stats.Reading({r"a$\frac$": layer}, {})) for step in (1, 2)]
    assert len(plot.plot_run(readings, tmp_path)) == 4


def test_co_routing_is_1_by_chance_and_higher_for_pairs():
    for load in ([1.0, 1, 1, 1], [5.0, 2, 2, 1]):
        chances = torch.tensor(load, dtype=torch.float64)
        pairs = 1e6 * torch.outer(chances, chances)
        lift = plot.co_routing(pairs)
        off = ~torch.eye(4, dtype=torch.bool)
        torch.testing.assert_close(lift[off], torch.ones(12).double(), rtol=1e-4, atol=0)
        assert lift.diagonal().isnan().all()
    always = torch.block_diag(torch.full((2, 2), 90), torch.full((2, 2), 90))
    lift = plot.co_routing(always)
    assert lift[0, 1] == lift[1, 0] > 2
    assert lift[0, 2] == 0
    idle = plot.co_routing(torch.tensor([[40, 40, 0], [40, 40, 0], [0, 0, 0]]))
    assert idle[2].isnan().all()
    assert idle[0, 1] == pytest.approx(1)


def test_co_routing_of_few_pairs_is_nan():
    """For few tokens chance alone gives far more or far fewer pairs than expected."""
    few = torch.full((8, 8), plot.FEW_PAIRS - 1)
    assert plot.co_routing(few).isnan().all()
    assert not plot.co_routing(2 * few).fill_diagonal_(1).isnan().any()


def test_plot_run_draws_the_least_even_layer_or_the_named_one(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plot, "plot_over_time", lambda *args: drawn.append(args[-1]))
    even, uneven = layer_of(2, 2), layer_of(1, 3)
    readings = [(step, stats.Reading({"a": even, "b": uneven}, {})) for step in (1, 2)]
    plot.plot_run(readings, tmp_path)
    plot.plot_run(readings, tmp_path, "a")
    assert drawn == ["layer b (the least even), training", "layer a, training"]
    with pytest.raises(ValueError, match="layer must be a or b, got c"):
        plot.plot_run(readings, tmp_path, "c")


def test_layers_with_one_choice_have_no_picture_of_pairs(tmp_path):
    layer = layer_of(3, 1, pairs=torch.diag(torch.tensor([3, 1])))
    paths = plot.plot_run([(1, stats.Reading({"a": layer}, {}))], tmp_path)
    assert [path.name for path in paths] == ["load.png", "sorted.png"]


def test_a_file_may_hold_two_runs_with_different_experts(tmp_path):
    runs = [(1, (2, 2)), (2, (3, 1)), (1, (1, 1, 2)), (2, (0, 1, 3))]
    readings = [(step, stats.Reading({"a": layer_of(*load)}, {})) for step, load in runs]
    paths = plot.plot_run(readings, tmp_path)
    assert [path.name for path in paths] == ["load.png", "sorted.png", "over-time.png"]
