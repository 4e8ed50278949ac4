"""What the processor's caches are said to be."""

from pathlib import Path

import pytest

from dynamize import devices


@pytest.mark.parametrize(
    ("sizes", "found"),
    [(["48K", "2048K", "32M"], 32 * 2**20), (["512K"], 512 * 2**10), (["", "no size"], 2**25), ([], 2**25)],
)
def test_the_last_cache(sizes: list[str], found: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, size in enumerate(sizes):
        (tmp_path / f"index{i}").mkdir()
        (tmp_path / f"index{i}" / "size").write_text(f"{size}\n")
    monkeypatch.setattr(devices, "_CACHES", tmp_path)
    assert devices.cache_bytes() == found
