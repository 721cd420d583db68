from types import SimpleNamespace

from tests.support.checkpoints import sentence_transformer
from triton_embeddings import shared_memory
from triton_embeddings.models import add


def test_what_full_turns_may_take_is_counted_and_told_where_there_is_less(tmp_path, monkeypatch):
    checkpoint = sentence_transformer(tmp_path / "tiny", {"pooling_mode": "mean"})
    repository = tmp_path / "repository"
    add(repository, str(checkpoint), None, {"task": "embed", "dtype": "float32", "max_batch_tokens": 2**19})
    # The encoder gives 32 values of 4 bytes for each token, the head takes them.
    assert shared_memory.need(repository) == 2 * 2**19 * 32 * 4
    room = {}
    monkeypatch.setattr(shared_memory.shutil, "disk_usage", lambda _: SimpleNamespace(**room))
    room["total"] = 128 * 2**20
    assert shared_memory.warn_of_small(repository) is None
    room["total"] = 64 * 2**20
    assert shared_memory.warn_of_small(repository) == (
        "/dev/shm has 64 MiB, and the models may need 128 MiB: large requests will be answered with 503; "
        "give the container more with --shm-size, or lower --max-batch-tokens (triton-embeddings add)"
    )
    add(repository, str(checkpoint), None, {"task": "embed", "fuse_heads": True, "max_batch_tokens": 2**19})
    assert shared_memory.need(repository) == 0
