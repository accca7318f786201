import pytest
from manifests import CAPTIONS


@pytest.fixture
def videos(tmp_path):
    """A folder with files v0.mp4 ... v9.mp4."""
    root = tmp_path / "videos"
    root.mkdir()
    for number in range(len(CAPTIONS)):
        (root / f"v{number}.mp4").write_bytes(b"no video")
    return root
