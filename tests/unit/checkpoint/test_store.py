"""The checkpoint folder at every point where a crash can leave it."""

from __future__ import annotations

import pytest

from megatron_intuitor.checkpoint.store import CheckpointStore


def write(store: CheckpointStore, step: int, content: str) -> None:
    (store.begin(step) / "data").write_text(content)
    store.commit(step)


def test_only_the_newest_are_kept_and_the_newest_is_found(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep=2)
    assert store.latest() is None
    for step in (10, 20, 30):
        write(store, step, str(step))
    assert store.complete() == [20, 30]
    assert (store.latest() / "data").read_text() == "30"
    assert sorted(p.name for p in store.folder.iterdir()) == ["step_00000020", "step_00000030"]


def test_an_unfinished_checkpoint_is_never_found_and_goes_at_the_next_save(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    write(store, 10, "whole")
    (store.begin(20) / "data").write_text("half")  # the process dies here
    again = CheckpointStore(tmp_path, keep=2)
    assert again.latest() == again.path(10)
    write(again, 15, "after the restart")
    assert not list(tmp_path.glob(".step_*"))
    assert again.complete() == [10, 15]


@pytest.mark.parametrize("dies_in", ["flush", "rename", "thin"])
def test_a_crash_inside_commit_leaves_a_whole_newest_checkpoint(tmp_path, monkeypatch, dies_in):
    from megatron_intuitor.checkpoint import store as module

    store = CheckpointStore(tmp_path, keep=1)
    write(store, 10, "old")
    (store.begin(20) / "data").write_text("new")

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    target = {"flush": (module, "_flush"), "rename": (module.Path, "rename"), "thin": (module.shutil, "rmtree")}
    monkeypatch.setattr(*target[dies_in], die)
    with pytest.raises(KeyboardInterrupt):
        store.commit(20)
    newest = CheckpointStore(tmp_path, keep=1).latest()
    assert (newest / "data").read_text() == ("new" if dies_in == "thin" else "old")


def test_saving_a_step_again_replaces_it(tmp_path):
    store = CheckpointStore(tmp_path, keep=3)
    write(store, 10, "first")
    write(store, 10, "second")
    assert (store.latest() / "data").read_text() == "second"
    assert store.complete() == [10]
