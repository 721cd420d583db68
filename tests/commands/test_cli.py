"""The command as a person types it, in the environment that scripts/setup made for users."""

import socket
import subprocess

import pytest

from backends.repository.pbtxt import parse
from backends.repository.writer import list_pipelines
from tests.conftest import ROOT
from tests.support import decoders
from tests.support.checkpoints import bert, sentence_transformer, write_json
from triton_embeddings import models

COMMAND = ROOT / ".venv" / "bin" / "triton-embeddings"


PORT_FLAGS = ("--port", "--http-port", "--grpc-port", "--metrics-port")


def run(*arguments, folder="/", **environment):
    """Ports of `serve` are any free ones: what else is served on this machine does not matter."""
    if arguments[0] == "serve":
        arguments = ["serve", *(f"{flag}=0" for flag in PORT_FLAGS), *arguments[1:]]
    return subprocess.run(
        [COMMAND, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment or None,
        timeout=60,
    )


@pytest.fixture
def checkpoint(tmp_path):
    return sentence_transformer(tmp_path / "tiny", {"pooling_mode": "mean"})


def test_add_list_remove(tmp_path, checkpoint):
    repository = tmp_path / "models"
    options = "--name mine --served-model-name org/mine --dtype fp32 --max-batch-size 9 --max-length 20"
    added = run("add", "tiny", *options.split(), "--model-repository", repository, folder=tmp_path)
    assert added.returncode == 0, added.stderr
    assert added.stdout.splitlines() == [
        f"added mine: bert, 32 dimensions, 20 tokens, from {checkpoint}",
        "  embed    its tokens are pooled (mean)",
        "  tokens   every encoder has them",
    ]
    listed = run("list", "--model-repository", repository)
    assert "mine" in listed.stdout
    assert "org/mine" in (repository / "mine" / "config.pbtxt").read_text()
    assert parse((repository / "mine.encoder" / "config.pbtxt").read_text()).max_batch_size == 9
    removed = run("remove", "mine", "--model-repository", repository)
    assert removed.stdout == "removed mine\n"
    assert list(repository.iterdir()) == []
    assert "has no models; add one with" in run("list", "--model-repository", repository).stdout


def test_decoders_are_added_with_their_reasons_and_options(tmp_path):
    repository = tmp_path / "models"
    decoders.qwen3_reranker(tmp_path / "reranker")
    decoders.gte_qwen2(tmp_path / "gte")

    def add(*arguments):
        added = run("add", *arguments, "--model-repository", repository, folder=tmp_path)
        assert added.returncode == 0, added.stderr
        return added

    reranker = add("reranker", "--no-share-prefix")
    assert reranker.stdout.splitlines()[1] == (
        "  score    it is a bare language model, so a reranker; its prompt is Qwen3-Reranker's"
    )
    assert "it is taken for a reranker; if it is an embedding model, give --task embed" in reranker.stderr
    gte = add("gte")
    assert "its tokens look both ways: config.json names gte-Qwen2's code" in gte.stderr
    assert "modeling_qwen" not in add("gte", "--name", "causal", "--causal").stderr
    rtp = add("gte", "--name", "rtp", "--model_type", "qwen_2_embedding", "--TASK_TYPE", "DENSE_EMBEDDING")
    assert "its tokens look both ways: --model-type qwen_2_embedding" in rtp.stderr
    config = (repository / "reranker.encoder" / "config.pbtxt").read_text()
    assert parse(config).parameters["share_prefix"].string_value == "false"
    config = (repository / "causal.encoder" / "config.pbtxt").read_text()
    assert parse(config).parameters["causal"].string_value == "true"
    fused = add("gte", "--name", "fused", "--fuse-heads")
    assert [line.split()[0] for line in fused.stdout.splitlines()] == ["added", "embed"]
    assert {entry.name for entry in repository.glob("fused*")} == {
        "fused",
        "fused.tokenizer",
        "fused.encoder",
    }
    bert(tmp_path / "bert")
    refused = run("add", "bert", "--no-causal", "--model-repository", repository, folder=tmp_path)
    one_line_error(refused, "bert models are encoders, whose tokens look both ways; leave --causal and")


def test_list_shows_the_default_model_from_any_folder(tmp_path):
    listed = run("list", folder=tmp_path)
    assert "all-MiniLM-L6-v2" in listed.stdout
    assert "384" in listed.stdout


def one_line_error(result, text):
    assert result.returncode == 1, result.stdout
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.strip().splitlines()) == 1
    assert text in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("command", ["add", "serve"])
@pytest.mark.parametrize(
    ("harm", "options", "text"),
    [
        (lambda path: (path / "config.json").unlink(), [], "has no config.json"),
        (lambda path: (path / "model.safetensors").unlink(), [], "has no weights"),
        (
            lambda path: write_json(path / "config.json", {"model_type": "gpt2", "hidden_size": 1}),
            [],
            "is a 'gpt2' model",
        ),
        (lambda path: None, ["--dtype", "int3"], "dtype is 'int3'; it takes one of"),
        (lambda path: None, ["--device", "tpu"], "device is 'tpu'"),
        (lambda path: None, ["--max-length", "100"], "max_length is 100; this model takes at most 64"),
        (lambda path: None, ["--TASK_TYPE", "FROB"], "task is 'FROB'; it takes embed,"),
        (lambda path: None, ["--model_type", "gpt2"], "--model-type is 'gpt2', but"),
        (lambda path: None, ["--threads", "0"], "threads is 0; it takes a number of at least 1"),
    ],
)
def test_a_checkpoint_that_cannot_be_served_is_one_line(tmp_path, checkpoint, command, harm, options, text):
    harm(checkpoint)
    repository = ["--model-repository", tmp_path / "models"] if command == "add" else []
    one_line_error(run(command, checkpoint, *options, *repository), text)


def test_a_checkpoint_that_is_nowhere(tmp_path):
    one_line_error(run("serve", "./nowhere", folder=tmp_path), "there is no directory ./nowhere")


@pytest.mark.parametrize("flag", PORT_FLAGS)
def test_a_taken_port_names_its_flag(flag):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        result = run("serve", flag, port)
    one_line_error(result, f"port {port} on 127.0.0.1 cannot be used (Address already in use)")
    assert result.stderr.strip().endswith(f"or give another with {flag}")


def test_a_repository_that_cannot_be_written(tmp_path, checkpoint):
    file = tmp_path / "file"
    file.touch()
    one_line_error(run("add", checkpoint, "--model-repository", file / "models"), f"{file}")


def test_what_the_environment_sets_for_the_gateway_is_looked_at_first(checkpoint):
    result = run("serve", checkpoint, GATEWAY_MAX_ITEMS="many", PATH="/usr/bin:/bin")
    one_line_error(result, "the environment's GATEWAY_MAX_ITEMS is 'many': input should be a valid integer")


def test_hosts_of_images_are_looked_at_first(checkpoint):
    result = run("serve", checkpoint, "--allow-image-urls", "--image-hosts", "cdn.example,10.0.0.1/8")
    one_line_error(result, "--image-hosts is 'cdn.example,10.0.0.1/8': '10.0.0.1/8' is not a network")
    result = run("serve", checkpoint, GATEWAY_IMAGE_HOSTS="a B", PATH="/usr/bin:/bin")
    one_line_error(result, "the environment's GATEWAY_IMAGE_HOSTS is 'a B': 'a B' is neither a name")


def test_a_chat_template_is_refused_in_one_line(checkpoint):
    one_line_error(
        run("serve", checkpoint, "--chat-template", "gme-qwen2-vl"), "--chat-template gme-qwen2-vl is for"
    )


def test_two_models_cannot_have_one_served_name(tmp_path, checkpoint):
    repository = ["--model-repository", tmp_path / "models"]
    assert run("add", checkpoint, "--name", "a", "--served-model-name", "x", *repository).returncode == 0
    assert run("add", checkpoint, "--name", "a", "--served-model-name", "x", *repository).returncode == 0, (
        "the same"
    )
    one_line_error(
        run("add", checkpoint, "--name", "b", "--served-model-name", "x", *repository), "is served as 'x'"
    )
    one_line_error(run("add", checkpoint, "--name", "x", *repository), "the model a is served as 'x' already")


def test_add_says_what_it_replaced_and_what_it_guessed(tmp_path):
    path = bert(tmp_path / "bare")
    repository = ["--model-repository", tmp_path / "models"]
    added = run("add", path, *repository)
    assert added.stdout.startswith("added bare")
    assert added.stderr.startswith(
        "note on bare: it has no modules.json: its embeddings are the mean of its tokens"
    )
    assert run("add", path, *repository).stdout.startswith("replaced bare")


def test_a_folder_that_would_stop_the_server_is_named(tmp_path, checkpoint):
    models.add(tmp_path / "models", str(checkpoint), "mine", {})
    (tmp_path / "models" / "empty").mkdir()
    one_line_error(
        run("serve", "--model-repository", tmp_path / "models"), "models/empty has no config.pbtxt"
    )


def test_a_checkpoint_that_went_away_names_its_model(tmp_path, checkpoint):
    models.add(tmp_path / "models", str(checkpoint), "mine", {})
    checkpoint.rename(tmp_path / "elsewhere")
    one_line_error(
        run("serve", "--model-repository", tmp_path / "models"), "error: the model mine: the checkpoint's"
    )


def test_version_and_short_help():
    assert run("--version").stdout.strip() == "0.1.0"
    assert "serve" in run("-h").stdout


def test_a_gateway_for_a_server_without_a_port():
    one_line_error(run("gateway", "--server", "a:1,b"), "--server is 'a:1,b': 'b' is no host:port")


def test_an_empty_repository(tmp_path):
    one_line_error(run("serve", "--model-repository", tmp_path / "none"), "has no models; add one with")


def test_one_name_for_two_models(tmp_path, checkpoint):
    other = bert(tmp_path / "other")
    one_line_error(
        run("serve", checkpoint, other, "--served-model-name", "x"), "names one model, but there are several"
    )
    one_line_error(run("serve", checkpoint, checkpoint), "have the same name")


def served(repository, checkpoints, options, scratch):
    """(name, options) of what would be served, and the repository that holds it."""
    with models.served_repository(repository, checkpoints, options, scratch) as found:
        return found, [(entry.name, entry.options) for entry in list_pipelines(found)]


def test_a_given_checkpoint_is_served_alone(tmp_path, checkpoint):
    repository, scratch = tmp_path / "models", tmp_path / "scratch"
    models.add(repository, str(checkpoint), "kept", {})
    models.add(scratch, str(checkpoint), "left-by-a-killed-process", {})
    found, ((name, options),) = served(repository, [str(checkpoint)], {"dtype": "float32"}, scratch)
    assert (found, name, options.dtype) == (scratch, "tiny", "float32")
    assert not scratch.exists(), "it is deleted afterwards"
    assert [entry.name for entry in list_pipelines(repository)] == ["kept"]


def test_options_win_over_those_a_model_was_added_with(tmp_path, checkpoint):
    repository, scratch = tmp_path / "models", tmp_path / "scratch"
    models.add(repository, str(checkpoint), "one", {"dtype": "bfloat16", "max_length": 20})
    assert served(repository, [], {}, scratch)[0] == repository
    found, ((name, options),) = served(repository, [], {"dtype": "float32"}, scratch)
    assert (found, name, options.dtype, options.max_length) == (scratch, "one", "float32", 20)


def test_rtp_llm_s_batch_size_is_in_texts_of_full_length(tmp_path, checkpoint):
    models.add(tmp_path / "models", str(checkpoint), "one", {"max_context_batch_size": 20})
    (entry,) = list_pipelines(tmp_path / "models")
    assert entry.options.max_batch_tokens == 20 * 48
