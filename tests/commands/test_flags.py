import pytest

from triton_embeddings.flags import rewrite


@pytest.mark.parametrize(
    ("given", "ours"),
    [
        # SGLang's launch command.
        (
            "serve --model-path org/model --is-embedding --host 0.0.0.0 --port 30000 --trust-remote-code",
            "serve org/model --host 0.0.0.0 --port 30000 --trust-remote-code",
        ),
        # RTP-LLM's, as its documentation writes it.
        (
            "serve --checkpoint_path /models/bert --model_type bert --act_type fp16 --start_port 8088 "
            "--TASK_TYPE DENSE_EMBEDDING --MAX_CONTEXT_BATCH_SIZE 20",
            "serve /models/bert --model-type bert --dtype float16 --port 8088 --task DENSE_EMBEDDING "
            "--max-context-batch-size 20",
        ),
        # Either spelling, and values behind an equals sign.
        (
            "serve --checkpoint-path=/models/bert --act-type=bf16 --task_type=x --max_context_batch_size=3",
            "serve /models/bert --dtype bfloat16 --task=x --max-context-batch-size=3",
        ),
        ("serve --dtype half a b", "serve --dtype float16 a b"),
        ("add x --name A_b --max_length 5", "add x --name A_b --max-length 5"),
        ("list", "list"),
        ("serve --dtype", "serve --dtype "),
    ],
)
def test_rewrites(given, ours):
    assert rewrite(given.split(" ")) == ours.split(" ")


def test_a_checkpoint_flag_without_a_value_stays_to_be_refused():
    assert rewrite(["serve", "--model-path"]) == ["serve", "--model-path"]
