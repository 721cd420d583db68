"""transformers in processes of their own, as each stage imports it."""

import json
import os
import subprocess
import sys

import pytest
from huggingface_hub import constants

from backends import import_cache
from tests.conftest import ROOT

# Imports transformers, and tells what it knows of its models and how many of their sources were read.
CODE = """
import json, sys
opened = []
sys.addaudithook(lambda event, args: event == "open" and opened.append(str(args[0])))
if {uses_cache}:
    from backends import import_cache
    import_cache.install()
import transformers, transformers.models
from transformers import AutoConfig, BertConfig
from transformers.utils import import_utils
folder = transformers.__path__[0] + "/models"
known = import_utils.define_import_structure(folder, prefix="models")
read = sum(name.startswith(folder) and name.endswith(".py") for name in opened)
told = sorted((sorted(needs), sorted((file, sorted(names)) for file, names in files.items()))
              for needs, files in known.items())
print(json.dumps([read, told, BertConfig.__name__]))
"""


def run(folder, *, uses_cache=True):
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(uses_cache=uses_cache)],
        cwd=ROOT,
        env={**os.environ, "HF_ASSETS_CACHE": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_the_second_start_reads_what_the_first_found_out(tmp_path):
    plain_read, plain, _ = run(tmp_path, uses_cache=False)
    assert plain_read > 1000, "else there is nothing to save"
    assert not (tmp_path / "triton-embeddings").exists()

    first_read, first, name = run(tmp_path)
    assert (first, name) == (plain, "BertConfig")
    assert first_read <= plain_read / 2 + 100, "once, not twice"
    (file,) = (tmp_path / "triton-embeddings").iterdir()

    second_read, second, name = run(tmp_path)
    assert (second, name) == (plain, "BertConfig")
    assert second_read < 100

    # Negative control: what stands in the file is what is used.
    file.write_text(file.read_text().replace("BertForTokenClassification", "BertForAnythingElse"))
    assert run(tmp_path)[1] != plain


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", "[1]", '[["bert", 3]]', '[["bert", {}]]', '{"a": 1}']
)
def test_a_file_that_cannot_be_used_is_made_anew(content, tmp_path, monkeypatch):
    known = {"bert": {frozenset({"torch"}): {"modeling_bert": {"BertModel"}}}, frozenset(): {"x": {"Y"}}}
    calls = []

    def read(path):
        calls.append(path)
        return known

    models = tmp_path / "transformers" / "models"
    models.mkdir(parents=True)
    (models / "__init__.py").write_text("")
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path))
    import_cache.keep(read, "1.0")(models)
    (file,) = (tmp_path / "triton-embeddings").iterdir()
    file.write_text(content)
    assert import_cache.keep(read, "1.0")(models / "__init__.py") == known
    assert import_cache.keep(read, "1.0")(models) == known
    assert calls == [models, models], "the third time it is read from the file again"


def test_goes_on_without_a_folder_to_write_to(tmp_path):
    (tmp_path / "file").write_text("")
    read, _, name = run(tmp_path / "file")
    assert read > 500
    assert name == "BertConfig"


def test_a_version_under_development_is_read_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path))
    models = tmp_path / "transformers" / "models"
    models.mkdir(parents=True)
    import_cache.keep(lambda path: {}, "6.0.dev0")(models)
    import_cache.keep(lambda path: {}, "6.0")(models / "bert")
    assert not (tmp_path / "triton-embeddings").exists()
    import_cache.keep(lambda path: {}, "6.0")(models)
    assert (tmp_path / "triton-embeddings").exists(), "negative control"
