"""The suite beside rivals, without them: it says who is missing, compares and writes as it should. Nothing here is timed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from paths import ROOT

sys.path.insert(0, str(ROOT))  # benchmarks/ is not installed

from benchmarks import __main__ as command
from benchmarks import calls, pagecache, report, rivals, suite
from benchmarks.common import interleaved, write_section
from benchmarks.compare import Line, Options, Skipped, WrongError, compare


@pytest.fixture
def nobody(monkeypatch):
    """A machine without any rival."""
    monkeypatch.setattr(rivals, "_reasons", {})
    for name in (*(module for module, _ in rivals.MODULES.values()), "torchvision"):
        monkeypatch.setitem(sys.modules, name, None)


def test_missing_rivals_are_named_with_the_way_to_install_them(nobody):
    for name, (_, distribution) in rivals.MODULES.items():
        reason = rivals.why_not(name)
        assert distribution in reason and "pip install" in reason and "\n" not in reason
    assert rivals.present(["cpprb", "np.take", "torchrl"]) == ["np.take"]
    assert rivals.why_not("np.take") is None and rivals.why_not("pread pool") is None


def test_a_rival_that_breaks_on_import_is_skipped_too(monkeypatch, tmp_path):
    monkeypatch.setattr(rivals, "_reasons", {})
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "cpprb.py").write_text("raise RuntimeError('built for another numpy')")
    monkeypatch.delitem(sys.modules, "cpprb", raising=False)
    assert "built for another numpy" in rivals.why_not("cpprb")


@pytest.mark.parametrize("name", ["saturated", "open", "class-balanced"])
def test_works_run_without_rivals(nobody, tmp_path, name):
    lines = suite.WORKS[name](Options(True, str(tmp_path)))
    assert lines
    for line in lines:
        assert (line.rival == "np.memmap") if isinstance(line, Line) else ("is not installed" in line.reason)
    assert "pip install" in report.comparisons(lines)


def test_sampling_meets_np_take_without_rivals(nobody, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "IMAGES", 2000)
    suite.images.cache_clear()
    lines = suite.sampling(Options(True, str(tmp_path)))
    suite.images.cache_clear()
    measured = [line for line in lines if isinstance(line, Line)]
    assert [line.rival for line in measured] == ["np.take", "one piece", "np.take"] * 2  # among all, and in turn with np.take alone
    assert {line.rival for line in lines if isinstance(line, Skipped)} == {"cpprb", "torchrl", "avalanche"}
    for line in measured:
        assert line.wanted == {"np.take": 0.8, "one piece": None}[line.rival] and len(line.ours) == len(line.theirs) == 50
        assert line.met == (None if line.wanted is None else line.ratio >= 0.8)


def test_wrong_samples_are_noticed(tmp_path):
    ours = rivals.OursRing(str(tmp_path), 300)
    suite.feed(ours, 300, 100)
    (x, y), meta = ours.sample(256)
    assert sorted(suite.check_samples("ours", ours, ((x, y), meta), 256)) == sorted(meta["position"])
    x[7, 0, 0, 0] ^= 1
    with pytest.raises(WrongError, match="differ"):
        suite.check_samples("ours", ours, ((x, y), meta), 256)
    ours.close()


def test_every_contender_takes_turns_and_slow_ones_fewer():
    turns = []

    def call(name, seconds):
        return lambda: turns.append(name) or seconds

    found = interleaved({"ours": call("a", 1.0), "theirs": call("b", 2.0)}, 30)
    rounds = list(zip(turns[::2], turns[1::2], strict=True))
    assert len(rounds) == 31 and set(rounds) == {("a", "b"), ("b", "a")}  # in any order, the same in every run
    assert found == {"ours": [1.0] * 30, "theirs": [2.0] * 30}
    first = list(turns)
    turns.clear()
    interleaved({"ours": call("a", 1.0), "theirs": call("b", 2.0)}, 30)
    assert turns == first
    found = interleaved({"ours": call("a", 1.0), "theirs": call("b", 2.0)}, 5, budget=0.0)
    assert found == {"ours": [1.0] * 2, "theirs": [2.0] * 2}


def test_a_line_for_each_rival_with_ratio_and_verdict():
    calls = {"ours": lambda: 2.0, "np.take": lambda: 3.0, "h5py, images only": lambda: 4.0}
    lines = compare("work", calls, {"np.take": 2.0, "h5py, images only": 1.0}, 3, scale={"h5py, images only": 2.0})
    assert [(line.rival, line.ratio, line.met) for line in lines] == [("np.take", 1.5, False), ("h5py, images only", 1.0, True)]
    text = report.comparisons([*lines, Skipped("other", "cpprb", "not installed")])
    rows = [row for row in text.splitlines() if row.startswith("|")]
    assert len(rows) == 4 and len({row.count("|") for row in rows}) == 1
    assert "**missed**" in rows[2] and "met" in rows[3] and "- other, cpprb: skipped, not installed" in text
    assert report.summary(lines).startswith("1 of 2 wanted ratios met. Missed:\n\n- work, beside np.take: 1.5 of 2")
    assert "out of reach" not in report.summary(lines)
    lines = compare("work", calls | {"cpprb": lambda: 9.0}, {"np.take": None, "cpprb": 5.0}, 3)  # np.take itself is 3 times as fast
    assert report.summary(lines) == ("0 of 1 wanted ratios met. Missed:\n\n- work, beside cpprb: 4.5 of 5; out of reach here, np.take is 3")
    lines = compare("work", calls | {"cpprb": lambda: 9.0, "one piece": lambda: 1.0}, {"np.take": None, "one piece": None, "cpprb": 5.0}, 3)
    assert report.summary(lines).endswith("4.5 of 5; np.take is 3, one piece is 9")  # the faster of two limits is what counts


def test_sections_of_others_survive(tmp_path):
    path = tmp_path / "RESULTS.md"
    write_section(path, "rivals", "first")
    write_section(path, "accuracy", "table of another")
    write_section(path, "rivals", "second \\1")
    text = path.read_text()
    assert "first" not in text and "second \\1" in text and "table of another" in text and text.index("second") < text.index("another")
    write_section(path, "rivals", "second \\1")
    assert path.read_text() == text


def test_the_command_writes_table_and_picture(nobody, tmp_path, monkeypatch, capsys):
    line = Line("a work", "np.take", [1e-3, 2e-3], [4e-3, 5e-3], 2.0, "a note")
    monkeypatch.setattr(command, "WORKS", {"good": lambda o: [line], "bad": lambda o: 1 / 0})
    monkeypatch.setattr(command, "starting", lambda quick, folder: (("library", "import"), [("leanreplay", "0.2 s")]))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--quick", "--out", str(tmp_path)])
    assert command.main() == 1  # because a work failed
    text = (tmp_path / "RESULTS-quick.md").read_text()
    assert "failed: ZeroDivisionError" in text and "| 3 | 2: met |" in text and "leanreplay" in text
    assert (tmp_path / "ratios-quick.png").stat().st_size < 100_000
    assert "a work" in capsys.readouterr().out


@pytest.mark.skipif(not pagecache.available(), reason="Linux only")
def test_a_mapped_file_leaves_the_page_cache_whole(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("disk")  # not in memory, as tmp_path is
    plain = tmp_path / "plain"
    plain.write_bytes(bytes(1 << 20))
    if pagecache.forget(plain) > 0.5:
        pytest.skip("this file system keeps its files in memory")
    ours = rivals.OursRing(str(tmp_path), 2000)
    suite.feed(ours, 2000, 1000)
    assert pagecache.resident(Path(ours.path)) > 0.3
    assert pagecache.forget(tmp_path) == pagecache.resident(Path(ours.path)) == 0
    assert sorted(suite.check_samples("ours", ours, ours.sample(2000), 2000)) == list(range(2000))
    assert pagecache.resident(Path(ours.path)) > 0.3
    ours.close()


def test_calls_are_counted_the_same_each_time(capsys):
    found, again = calls.measure(), calls.measure()
    assert set(found) == set(calls.BEFORE_AND_WANTED)
    for name, count in found.items():
        if name != "resize":  # a lock is looked at now and then, which follows the clock
            assert again[name] == count, name
    assert all(1 < len(set(count.files)) <= count.calls and 0 < count.moves < count.calls and count.depth for count in found.values())
    calls.main()
    text = capsys.readouterr().out
    assert all(f"| {name} |" in text and (name == "resize" or f"| {count} |" in text) for name, count in found.items())
